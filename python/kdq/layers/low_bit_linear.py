"""LowBitLinear: weights of 1 to 8 bits, stored in that many bits, activations of 2 to 8 bits."""

from __future__ import annotations

from typing import Any, Self

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
from kdq.layers.base import InferenceLinear, PackedInt8
from kdq.layers.geometry import Geometry


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


def kernel_bits(config: LowBit) -> int:
    """In how many bits a weight lies in memory for the kernels: the fewest of 2, 4 and 8 that hold its integers. ±1
    take two, DoReFa's odd ones, `2 s + 1`, one more than s."""
    held = config.weight_bits + 1 if config.method == "dorefa" else max(config.weight_bits, 2)
    return next(bits for bits in (2, 4, 8) if bits >= held)


# Of the inputs and outputs of layers that run on bit planes: what smaller ones win does not pay for what planes take
# beside their products.
LEAST_SIDE = 512


def rows_for_planes(config: LowBit, inputs: int, outputs: int) -> int | None:
    """From how many rows of x on a linear layer runs on bit planes; None: never.

    Where their pairs are few enough for the CPU, they take less time than int8 products (1 bit by 2 bits half of it,
    with AVX-512 VPOPCNTDQ), but for small layers and few rows: what counts then is how the weights are read, each plane
    of which is put in order anew.
    """
    pairs = config.weight_bits * config.act_bits
    if pairs > kk.bitplane_pairs() or min(inputs, outputs) < LEAST_SIDE:
        return None
    return 4 * pairs * config.weight_bits


class LowBitProduct(PackedInt8):
    """What linear layers and convolutions of few-bit integers share. They occupy their bits on disk and run on the int8
    kernels.

    Buffers: `weight` uint8 `[N, ceil(K * weight_bits / 8)]` (`pack_bits`), `weight_scale` float32 `[N]`, `bias` float32
    `[N]` or None, `input_scale` float32 and `input_zero_point` int32, both 0-d. Activations lie in `[0, 2**act_bits -
    1]`. DoReFa's weights are odd, `2 s + 1`: s is stored.
    """

    weight: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, geometry: Geometry, bias: bool, config: LowBit, activation: str | None) -> None:
        super().__init__(geometry, bias, config, activation)
        self.input_quant_max = 2**config.act_bits - 1
        self.packed_bits = kernel_bits(config)
        row_bytes = (geometry.row_length * config.weight_bits + 7) // 8
        self.register_buffer("weight", torch.zeros(geometry.outputs, row_bytes, dtype=torch.uint8))
        self.register_buffer("input_scale", torch.tensor(1.0))
        self.register_buffer("input_zero_point", torch.tensor(0, dtype=torch.int32))
        self.pack()

    @classmethod
    def from_float(
        cls,
        layer: Any,
        config: LowBit,
        *,
        input_grid: AffineGrid,
        weight_scale: Tensor | None = None,
        activation: str | None = None,
    ) -> Self:
        """Quantizes a float layer of the same kind, an nn.Linear or nn.Conv2d.

        Args:
            input_grid: the activations' grid.
            weight_scale: float32 `[N]`; None: searched for the least squared error of each output channel. With
                method="dorefa" the scale is that of DoReFa-Net, and `layer` has the weight that training had.
            activation: None, "relu", "gelu" (erf form) or "silu", computed by the kernel.

        Raises:
            ValueError: the convolution is one that the kernels do not compute.
        """
        quantized = cls.sized_as(layer, config, activation)
        rows = layer.weight.detach().float().flatten(1)
        bits = config.weight_bits
        if config.method == "dorefa":
            odd, quantized.weight_scale = dorefa_weight_integers(dorefa_weight(rows), bits)
            integers = odd >> 1
        else:
            scale = low_bit_weight_scale(rows, bits) if weight_scale is None else weight_scale.detach().float()
            quantized.weight_scale = scale
            integers = low_bit_weight_integers(rows, scale, bits)
        quantized.weight = pack_bits(integers, bits)
        quantized.input_scale, quantized.input_zero_point = input_grid.scale, input_grid.zero_point
        quantized.pack()
        return quantized

    def int8_weight(self) -> Tensor:
        stored = unpack_bits(self.weight, self.config.weight_bits, self.geometry.row_length)
        return stored * 2 + 1 if self.config.method == "dorefa" else stored

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


class LowBitLinear(InferenceLinear, LowBitProduct):
    """A linear layer of few-bit integers; its buffers are those of `LowBitProduct`, with K = in_features.

    Beside the packed weight it may keep another for the same results in less time: the bit planes, `planes`, and the
    sums of their integers, `weight_sum`, which many rows of x are multiplied by (`rows_for_planes`). They are made and
    remade with it, and as little saved. The results are the same bits as long as the input's scale and its products
    with those of the weights are at least 2^-120 and finite.
    """

    planes: Tensor | None
    weight_sum: Tensor | None
    plane_rows: int | None

    def pack(self) -> None:
        self.plane_rows = None  # other threads may be calling: until all is there, it is int8
        super().pack()
        rows = None
        if self.weight_scale.is_cpu:
            rows = rows_for_planes(self.config, self.in_features, self.out_features)
        planes = sums = None
        if rows is not None:
            integers = self.int8_weight()
            planes = kk.pack_bitplanes(integers, self.config.weight_bits, self.plane_form)
            sums = integers.sum(1, dtype=torch.int32)
        self.register_buffer("planes", planes, persistent=False)
        self.register_buffer("weight_sum", sums, persistent=False)
        self.plane_rows = rows

    @property
    def plane_form(self) -> str:
        """Of the weight's integers, as `pack_bitplanes` names it."""
        return "odd" if self.config.weight_bits == 1 or self.config.method == "dorefa" else "signed"

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        packed = self.packed_weight()  # first: where it has to be remade, so have the planes
        own: dict[str, Any] = self._buffers  # see InferenceProduct.kernel
        planes = own["planes"]
        if planes is None or not self.on_planes(x.numel() // max(self.inputs, 1)):
            return self.int8_kernel(x, packed, activation)
        return kk.bitplane_linear(
            x,
            planes,
            own["weight_sum"],
            own["weight_scale"],
            own["bias"],
            input_scale=own["input_scale"],
            input_zero_point=own["input_zero_point"],
            input_quant_max=self.input_quant_max,
            weight_form=self.plane_form,
            activation=activation,
        )

    def on_planes(self, rows: int) -> bool:
        """Whether so many rows are multiplied by bit planes. Exported ones are not: they may be any number."""
        return self.plane_rows is not None and not torch.compiler.is_exporting() and rows >= self.plane_rows

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_buffers"] = {**state["_buffers"], "planes": None, "weight_sum": None}
        return state
