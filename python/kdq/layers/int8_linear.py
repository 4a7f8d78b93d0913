"""Int8Linear: int8 weights, with dynamic, static or no activation quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import Int8Dynamic, Int8Static, Int8WeightOnly
from kdq.grids import AffineGrid, int8_weight_scale
from kdq.layers.base import PackedInt8Linear

Int8Config = Int8Dynamic | Int8Static | Int8WeightOnly


class Int8Linear(PackedInt8Linear):
    """A linear layer on the int8 kernels.

    Buffers: `weight` int8 `[N, K]`, `weight_scale` float32 `[N]`, `bias` float32 `[N]` or None; for `Int8Static` also
    `input_scale` float32 and `input_zero_point` int32, both 0-d.
    """

    weight: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: Int8Config,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, activation)
        static = isinstance(config, Int8Static)
        self.config = config
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("input_scale", torch.tensor(1.0) if static else None)
        self.register_buffer("input_zero_point", torch.tensor(0, dtype=torch.int32) if static else None)
        self.pack()

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        config: Int8Config | None = None,
        *,
        input_grid: AffineGrid | None = None,
        weight_scale: Tensor | None = None,
        activation: str | None = None,
    ) -> Int8Linear:
        """Quantizes an nn.Linear.

        Args:
            config: None means `Int8Dynamic()`.
            input_grid: the activations' grid; needed for `Int8Static`.
            weight_scale: float32 `[N]`; None: `max|w| / 127` of each output channel.
            activation: None, "relu", "gelu" (erf form) or "silu", computed by the kernel.
        """
        config = Int8Dynamic() if config is None else config
        if isinstance(config, Int8Static) and input_grid is None:
            raise ValueError("input_grid: Int8Static needs the range of the activations; calibrate first")
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, config=config, activation=activation)
        weight = linear.weight.detach().float()
        scale = int8_weight_scale(weight) if weight_scale is None else weight_scale.detach().float()
        layer.weight_scale = scale
        layer.weight = kk.quantize(weight, scale, quant_min=-127, quant_max=127, axis=0)
        if linear.bias is not None:
            layer.bias = linear.bias.detach().float().clone()
        if isinstance(config, Int8Static) and input_grid is not None:
            layer.input_scale, layer.input_zero_point = input_grid.scale, input_grid.zero_point
        layer.pack()
        return layer

    def int8_weight(self) -> Tensor:
        return self.weight

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        packed = self.packed_weight()
        own: dict[str, Any] = self._buffers  # see InferenceLinear.kernel
        if isinstance(self.config, Int8WeightOnly):
            return kk.int8_weight_only_linear(x, packed, own["weight_scale"], own["bias"], activation=activation)
        return kk.int8_linear(
            x,
            packed,
            own["weight_scale"],
            own["bias"],
            input_scale=own["input_scale"],
            input_zero_point=own["input_zero_point"],
            activation=activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"
