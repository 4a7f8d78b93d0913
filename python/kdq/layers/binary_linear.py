"""BinaryLinear: ±1 weights and activations on the xnor-popcount kernels."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.configs import Binary
from kdq.layers.base import InferenceLinear, InferenceProduct
from kdq.layers.geometry import Geometry


class BinaryProduct(InferenceProduct):
    """What linear layers and convolutions of signs share (XNOR-Net, Rastegari et al. 2016).

    Buffers: `weight_bits` int64 `[N, ceil(K / 64)]`, `weight_scale` float32 `[N]` (the mean `|w|` of the output
    channel), `bias` float32 `[N]` or None. The binary kernels compute no activation.
    """

    read = "weight_bits"  # the buffer that the kernels read
    weight_scale: Tensor
    weight_bits: Tensor

    def __init__(self, geometry: Geometry, bias: bool, config: Binary | None, activation: str | None) -> None:
        if activation is not None:
            raise ValueError(f"activation: the binary kernels compute none, got {activation!r}")
        super().__init__(geometry, bias, Binary() if config is None else config, None)
        words = (geometry.row_length + 63) // 64
        self.register_buffer("weight_scale", torch.ones(geometry.outputs))
        self.register_buffer("weight_bits", torch.zeros(geometry.outputs, words, dtype=torch.int64))
        self.pack()

    @classmethod
    def from_float(cls, layer: Any, config: Binary | None = None) -> Self:
        """Signs and mean magnitudes of the weight of a float layer of the same kind, an nn.Linear or nn.Conv2d.

        Raises:
            ValueError: the convolution is one that the kernels do not compute.
        """
        quantized = cls.sized_as(layer, config)
        rows = layer.weight.detach().float().flatten(1)
        quantized.weight_bits = kk.pack_signs(rows)
        quantized.weight_scale = rows.abs().mean(1)
        quantized.pack()
        return quantized

    def signs(self) -> Tensor:
        """float32 `[N, K]` of ±1."""
        return kk.unpack_signs(self.weight_bits, self.geometry.row_length)

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        if activation is not None:
            raise ValueError(f"activation: the binary kernels compute none, got {activation!r}")
        own: dict[str, Any] = self._buffers  # see InferenceProduct.kernel
        return self.geometry.binary(x, own[self.read], own["weight_scale"], own["bias"])

    def dequantized_weight(self) -> Tensor:
        return (self.signs() * self.weight_scale[:, None]).view(self.geometry.weight_shape)


class BinaryLinear(InferenceLinear, BinaryProduct):
    """`sign(x) @ sign(w).T * weight_scale + bias`; its buffers are those of `BinaryProduct`, with K = in_features.

    x may be packed signs, int64 `[..., ceil(K / 64)]`, as a `BinaryThresholdLinear` puts out; the result is then
    float32.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, config: Binary | None = None) -> None:
        super().__init__(in_features, out_features, bias, config=config)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.int64:
            own: dict[str, Any] = self._buffers  # see InferenceProduct.kernel
            return kk.binary_linear(x, own["weight_bits"], own["weight_scale"], own["bias"], k=self.in_features)
        return super().forward(x)
