"""BinaryLinear: ±1 weights and activations on the xnor-popcount kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import Binary
from kdq.layers.base import InferenceLinear


class BinaryLinear(InferenceLinear):
    """`sign(x) @ sign(w).T * weight_scale + bias` (XNOR-Net, Rastegari et al. 2016).

    Buffers: `weight_bits` int64 `[N, ceil(K / 64)]`, `weight_scale` float32 `[N]` (the mean `|w|` of the output
    channel), `bias` float32 `[N]` or None. The binary kernels compute no activation. x may be packed signs, int64
    `[..., ceil(K / 64)]`, as a `BinaryThresholdLinear` puts out; the result is then float32.
    """

    weight_scale: Tensor
    weight_bits: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, config: Binary | None = None) -> None:
        super().__init__(in_features, out_features, bias)
        self.config = Binary() if config is None else config
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("weight_bits", torch.zeros(out_features, (in_features + 63) // 64, dtype=torch.int64))

    @classmethod
    def from_float(cls, linear: nn.Linear, config: Binary | None = None) -> BinaryLinear:
        """Signs and mean magnitudes of an nn.Linear's weight."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, config=config)
        weight = linear.weight.detach().float()
        layer.weight_bits = kk.pack_signs(weight)
        layer.weight_scale = weight.abs().mean(1)
        if linear.bias is not None:
            layer.bias = linear.bias.detach().float().clone()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.int64:
            own: dict[str, Any] = self._buffers  # see InferenceLinear.kernel
            return kk.binary_linear(x, own["weight_bits"], own["weight_scale"], own["bias"], k=self.in_features)
        return super().forward(x)

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        if activation is not None:
            raise ValueError(f"activation: the binary kernels compute none, got {activation!r}")
        own: dict[str, Any] = self._buffers  # see InferenceLinear.kernel
        return kk.binary_linear(x, own["weight_bits"], own["weight_scale"], own["bias"])

    def dequantized_weight(self) -> Tensor:
        return kk.unpack_signs(self.weight_bits, self.in_features) * self.weight_scale[:, None]
