"""All studies by name."""

from __future__ import annotations

from kdq.studies import claim_a, claim_b, claim_c, deep_compression, layerwise, qnn, transfer
from kdq.studies.study import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (claim_a, claim_b, claim_c, deep_compression, qnn, transfer, layerwise)
}
