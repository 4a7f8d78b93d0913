"""Post-training tools: what makes a trained float model easier to quantize, or repairs a quantized one, without labels.

Each works in place, all or nothing, and returns a `ToolReport`. In the order of use: `fold_batch_norm_`, then
`equalize_` or `smooth_`, then `quantize_` or `reconstruct_`, then `correct_bias_` and `reestimate_batch_norm_`.
"""

from kdq.ptq.batch_norm import fold_batch_norm_, reestimate_batch_norm_
from kdq.ptq.bias import correct_bias_
from kdq.ptq.equalize import equalize_
from kdq.ptq.reconstruct import reconstruct_
from kdq.ptq.smooth import smooth_
from kdq.ptq.tool_report import ToolReport

__all__ = [
    "ToolReport",
    "correct_bias_",
    "equalize_",
    "fold_batch_norm_",
    "reconstruct_",
    "reestimate_batch_norm_",
    "smooth_",
]
