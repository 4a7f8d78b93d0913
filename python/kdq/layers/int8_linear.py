"""Int8Linear: int8 weights, with dynamic, static or no activation quantization."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.configs import Int8Dynamic, Int8Static, Int8WeightOnly
from kdq.grids import AffineGrid, int8_weight_scale
from kdq.layers.base import InferenceLinear, PackedInt8
from kdq.layers.geometry import Geometry

Int8Config = Int8Dynamic | Int8Static | Int8WeightOnly


class Int8Product(PackedInt8):
    """What linear layers and convolutions of int8 weights share.

    Buffers: `weight` int8 `[N, K]`, `weight_scale` float32 `[N]`, `bias` float32 `[N]` or None; for `Int8Static` also
    `input_scale` float32 and `input_zero_point` int32, both 0-d.
    """

    weight: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, geometry: Geometry, bias: bool, config: Int8Config, activation: str | None) -> None:
        super().__init__(geometry, bias, config, activation)
        static = isinstance(config, Int8Static)
        self.register_buffer("weight", torch.zeros(geometry.outputs, geometry.row_length, dtype=torch.int8))
        self.register_buffer("input_scale", torch.tensor(1.0) if static else None)
        self.register_buffer("input_zero_point", torch.tensor(0, dtype=torch.int32) if static else None)
        self.pack()

    @classmethod
    def from_float(
        cls,
        layer: Any,
        config: Int8Config | None = None,
        *,
        input_grid: AffineGrid | None = None,
        weight_scale: Tensor | None = None,
        activation: str | None = None,
    ) -> Self:
        """Quantizes a float layer of the same kind, an nn.Linear or nn.Conv2d.

        Args:
            config: None means `Int8Dynamic()`.
            input_grid: the activations' grid; needed for `Int8Static`.
            weight_scale: float32 `[N]`; None: `max|w| / 127` of each output channel.
            activation: None, "relu", "gelu" (erf form) or "silu", computed by the kernel.

        Raises:
            ValueError: the grid is missing, or the convolution is one that the kernels do not compute.
        """
        config = Int8Dynamic() if config is None else config
        if isinstance(config, Int8Static) and input_grid is None:
            raise ValueError("input_grid: Int8Static needs the range of the activations; calibrate first")
        quantized = cls.sized_as(layer, config, activation)
        rows = layer.weight.detach().float().flatten(1)
        scale = int8_weight_scale(rows) if weight_scale is None else weight_scale.detach().float()
        quantized.weight_scale = scale
        quantized.weight = kk.quantize(rows, scale, quant_min=-127, quant_max=127, axis=0)
        if isinstance(config, Int8Static) and input_grid is not None:
            quantized.input_scale, quantized.input_zero_point = input_grid.scale, input_grid.zero_point
        quantized.pack()
        return quantized

    def int8_weight(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


class Int8Linear(InferenceLinear, Int8Product):
    """A linear layer on the int8 kernels; its buffers are those of `Int8Product`, with K = in_features."""

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        if isinstance(self.config, Int8WeightOnly):
            packed = self.packed_weight()
            own: dict[str, Any] = self._buffers  # see InferenceProduct.kernel
            return kk.int8_weight_only_linear(x, packed, own["weight_scale"], own["bias"], activation=activation)
        return PackedInt8.kernel(self, x, activation)  # super() would take twice as long
