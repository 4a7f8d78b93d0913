"""All studies by name."""

from __future__ import annotations

from kdq.studies import claim_a, claim_b, claim_c, layerwise, transfer
from kdq.studies.study import Study

STUDIES: dict[str, Study] = {
    study.name: study for study in (claim_a.STUDY, claim_b.STUDY, claim_c.STUDY, transfer.STUDY, layerwise.STUDY)
}
