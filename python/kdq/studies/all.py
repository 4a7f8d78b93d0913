"""All studies by name."""

from __future__ import annotations

from kdq.studies import claim_a
from kdq.studies.study import Study

STUDIES: dict[str, Study] = {study.name: study for study in (claim_a.STUDY,)}
