"""Training quantized networks from scratch: what Hubara et al. use beside binary and few-bit layers.

"Quantized Neural Networks: Training Neural Networks with Low Precision Weights and Activations", 2016. The layers
themselves are `prepare_qat_`'s, on untrained weights.
"""

from kdq.qnn.adamax import ShiftAdaMax
from kdq.qnn.batch_norm import ShiftBatchNorm1d
from kdq.qnn.clip import clip_weights_
from kdq.qnn.gradients import QuantizeGradient
from kdq.qnn.power_of_two import power_of_two

__all__ = ["QuantizeGradient", "ShiftAdaMax", "ShiftBatchNorm1d", "clip_weights_", "power_of_two"]
