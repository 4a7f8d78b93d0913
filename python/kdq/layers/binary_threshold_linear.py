"""BinaryThresholdLinear: a hidden binary layer that passes bits to the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import Binary
from kdq.layers.base import InferenceLinear


class BinaryThresholdLinear(InferenceLinear):
    """Signs to signs: bit n of the result is set (-1) where `sign(x) @ sign(w[n]) < threshold[n]`.

    What `kdq.fold_binary_chain_` makes of a binary layer, the batch norm behind it and the sign that the next binary
    layer takes (Hubara et al., "Quantized Neural Networks", 2016). x is packed signs, int64
    `[batch, ceil(in_features / 64)]`, or, in a chain's first layer, values `[batch, in_features]`; the result is packed
    signs, int64 `[batch, ceil(out_features / 64)]`, which a `BinaryLinear` takes too.

    Buffers: `weight_bits` int64 `[N, ceil(K / 64)]`, inverted where the norm's factor is negative; `threshold` int32
    `[N]`. Bits carry no gradient: a call that would have to pass one on is a RuntimeError.
    """

    weight_bits: Tensor
    threshold: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, config: Binary | None = None
    ) -> None:
        if bias:
            raise ValueError("bias: a layer with thresholds has none, they contain it")
        super().__init__(in_features, out_features, bias, config=Binary() if config is None else config)
        self.register_buffer("weight_bits", torch.zeros(out_features, (in_features + 63) // 64, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(out_features, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:  # the norm that was folded might have normalized another axis than the last
            raise ValueError(
                f"x: expected 2 axes, [batch, {self.in_features}] or its packed signs, got {list(x.shape)}"
            )
        own: dict[str, Any] = self._buffers  # see InferenceProduct.kernel
        if x.dtype == torch.int64:
            return kk.binary_threshold(x, own["weight_bits"], own["threshold"], k=self.in_features)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected {self.in_features} features in the last axis, got {list(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "x needs a gradient, which bits cannot carry: call the model under torch.inference_mode(), "
                "and train it before fold_binary_chain_"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return kk.binary_threshold(x, own["weight_bits"], own["threshold"])

    def dequantized_weight(self) -> Tensor:
        """float32 `[N, K]` of +-1."""
        return kk.unpack_signs(self.weight_bits, self.in_features)

    def to_float(self) -> nn.Linear:
        """An nn.Linear whose results, for inputs of +-1, have the signs that this layer puts out."""
        linear = nn.Linear(self.in_features, self.out_features)
        with torch.no_grad():
            linear.weight.copy_(self.dequantized_weight())
            linear.bias.copy_(-self.threshold)
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
