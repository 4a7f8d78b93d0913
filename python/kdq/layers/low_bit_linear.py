"""LowBitLinear: weights of 1 to 8 bits, stored in that many bits, activations of 2 to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import LowBit
from kdq.grids import (
    AffineGrid,
    dorefa_weight,
    dorefa_weight_integers,
    low_bit_weight_integers,
    low_bit_weight_scale,
)
from kdq.layers.base import PackedInt8Linear


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers `[N, K]` in two's complement -> a little-endian bit stream a row, uint8 `[N, ceil(K * bits / 8)]`.

    One bit a value stores ±1 as 0 and 1 (set for -1), as the binary kernels do.
    """
    n, k = values.shape
    codes = (values < 0).to(torch.int64) if bits == 1 else values.to(torch.int64)
    shifts = torch.arange(bits, dtype=torch.int64, device=values.device)
    stream = (codes[:, :, None] >> shifts & 1).reshape(n, k * bits)
    stream = nn.functional.pad(stream, (0, -(k * bits) % 8))
    weights = 1 << torch.arange(8, dtype=torch.int64, device=values.device)
    return (stream.reshape(n, -1, 8) * weights).sum(-1).to(torch.uint8)


def unpack_bits(stream: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of `pack_bits`: int8 `[N, k]`."""
    eight = torch.arange(8, dtype=torch.uint8, device=stream.device)
    flat = (stream[:, :, None] >> eight & 1).reshape(len(stream), 8 * stream.shape[1])[:, : k * bits]
    places = torch.arange(bits, dtype=torch.int32, device=stream.device)
    codes = (flat.reshape(len(stream), k, bits).to(torch.int32) << places).sum(-1)
    if bits == 1:
        return (1 - 2 * codes).to(torch.int8)
    half = 1 << (bits - 1)
    return torch.where(codes >= half, codes - 2 * half, codes).to(torch.int8)


class LowBitLinear(PackedInt8Linear):
    """A linear layer of few-bit integers. It occupies its bits on disk and runs on the int8 kernels.

    Buffers: `weight` uint8 `[N, ceil(K * weight_bits / 8)]` (`pack_bits`), `weight_scale` float32 `[N]`, `bias` float32
    `[N]` or None, `input_scale` float32 and `input_zero_point` int32, both 0-d. Activations lie in `[0, 2**act_bits -
    1]`. DoReFa's weights are odd, `2 s + 1`: s is stored.
    """

    weight: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: LowBit,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, activation)
        self.config = config
        row_bytes = (in_features * config.weight_bits + 7) // 8
        self.register_buffer("weight", torch.zeros(out_features, row_bytes, dtype=torch.uint8))
        self.register_buffer("input_scale", torch.tensor(1.0))
        self.register_buffer("input_zero_point", torch.tensor(0, dtype=torch.int32))
        self.pack()

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        config: LowBit,
        *,
        input_grid: AffineGrid,
        weight_scale: Tensor | None = None,
        activation: str | None = None,
    ) -> LowBitLinear:
        """Quantizes an nn.Linear.

        Args:
            input_grid: the activations' grid.
            weight_scale: float32 `[N]`; None: searched for the least squared error of each output channel. With
                method="dorefa" the scale is that of DoReFa-Net, and `linear` has the weight that training had.
            activation: None, "relu", "gelu" (erf form) or "silu", computed by the kernel.
        """
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, config=config, activation=activation)
        weight = linear.weight.detach().float()
        bits = config.weight_bits
        if config.method == "dorefa":
            odd, layer.weight_scale = dorefa_weight_integers(dorefa_weight(weight), bits)
            integers = odd >> 1
        else:
            scale = low_bit_weight_scale(weight, bits) if weight_scale is None else weight_scale.detach().float()
            layer.weight_scale = scale
            integers = low_bit_weight_integers(weight, scale, bits)
        layer.weight = pack_bits(integers, bits)
        if linear.bias is not None:
            layer.bias = linear.bias.detach().float().clone()
        layer.input_scale, layer.input_zero_point = input_grid.scale, input_grid.zero_point
        layer.pack()
        return layer

    def int8_weight(self) -> Tensor:
        stored = unpack_bits(self.weight, self.config.weight_bits, self.in_features)
        return stored * 2 + 1 if self.config.method == "dorefa" else stored

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        packed = self.packed_weight()
        own: dict[str, Any] = self._buffers  # see InferenceLinear.kernel
        return kk.int8_linear(
            x,
            packed,
            own["weight_scale"],
            own["bias"],
            input_scale=own["input_scale"],
            input_zero_point=own["input_zero_point"],
            input_quant_max=2**self.config.act_bits - 1,
            activation=activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"
