"""The training twins: float weights that are fake-quantized in the forward pass, on the integers that inference will
use.

All rounding goes through `kdq_kernels.fake_quantize`, whose numerics are those of the inference kernels. `to_inference`
makes the layer that runs on them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import Binary, Int8Dynamic, Int8Static, Int8WeightOnly, LowBit
from kdq.grids import (
    SMALLEST_SCALE,
    AffineGrid,
    low_bit_weight_scale,
    search_affine_grid,
    weight_range,
)
from kdq.layers.binary_linear import BinaryLinear
from kdq.layers.int8_linear import Int8Linear
from kdq.layers.low_bit_linear import LowBitLinear


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _LearnedScale(torch.autograd.Function):
    """`max(|x|, floor)`, with its gradient multiplied by a number: one node, since it runs twice a layer and step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, floor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(x)
        return x.abs().clamp_min(floor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * x.sign().mul_(ctx.factor), None, None


def gradient_factor(elements: int, quant_max: int) -> float:
    """`1 / sqrt(elements * quant_max)`: keeps updates of scales in proportion to those of weights (LSQ, Esser et al.
    2020, section 2.2)."""
    return 1 / math.sqrt(max(elements, 1) * max(quant_max, 1))


def scale_gradient(parameter: Tensor, elements: int, quant_max: int) -> Tensor:
    """The parameter, with its gradient multiplied by `gradient_factor`."""
    y: Tensor = _ScaleGradient.apply(parameter, gradient_factor(elements, quant_max))
    return y


def learned_scale(parameter: Tensor, elements: int, quant_max: int) -> Tensor:
    """A learned scale as the forward pass uses it: its magnitude, so that a step across zero stays a valid scale, and
    its gradient multiplied by `gradient_factor`."""
    y: Tensor = _LearnedScale.apply(parameter, gradient_factor(elements, quant_max), SMALLEST_SCALE * 256)
    return y


class LearnedActivationGrid(nn.Module):
    """Unsigned activations with a learned scale and zero point (LSQ+, Bhalgat et al. 2020).

    Both are initialised from the first batch that comes through, by least squared error.
    """

    initialized: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.zero_point = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("initialized", torch.tensor(False))

    @property
    def quant_max(self) -> int:
        return 2**self.bits - 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        sample = x.detach().float().flatten()
        if sample.numel() == 0:
            return
        grid = search_affine_grid(sample, float(sample.min()), float(sample.max()), self.bits)
        self.scale.copy_(grid.scale)
        self.zero_point.copy_(grid.zero_point)
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self.initialized:
            self.initialize(x)
        features = x.shape[-1]
        scale = learned_scale(self.scale, features, self.quant_max)
        zero_point = scale_gradient(self.zero_point, features, self.quant_max)
        return kk.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=self.quant_max)

    def grid(self) -> AffineGrid:
        """What inference uses: the same rounding and clamping of the zero point as in the forward pass.

        Raises:
            RuntimeError: no batch has come through yet.
        """
        if not self.initialized:
            raise RuntimeError(
                "the activation scale is not initialized: run at least one batch through the prepared model "
                "before convert_"
            )
        scale = learned_scale(self.scale.detach(), 1, 1)
        zero_point = self.zero_point.detach().round().clamp(0, self.quant_max).to(torch.int32)
        return AffineGrid(scale, zero_point)


class QATLinear(nn.Module):
    """Base of the training twins: the float weight and bias of an nn.Linear, taken over as they are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias

    def to_inference(self) -> nn.Module:
        """The layer on the real kernels; the twin is left as it is."""
        raise NotImplementedError

    def to_float(self) -> nn.Linear:
        """A plain nn.Linear that shares the float weight and bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8QATLinear(QATLinear):
    """int8 weights with scales from the current `max|w|`, and activations as the config says."""

    def __init__(self, linear: nn.Linear, config: Int8Dynamic | Int8Static | Int8WeightOnly) -> None:
        super().__init__(linear)
        self.config = config
        self.input_grid = LearnedActivationGrid(8) if isinstance(config, Int8Static) else None

    def fake_quantize_input(self, x: Tensor) -> Tensor:
        if isinstance(self.config, Int8Dynamic):
            return kk.fake_quantize_rows(x)
        return x if self.input_grid is None else self.input_grid(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fake_quantize_input(x), kk.fake_quantize_rows(self.weight), self.bias)

    def to_inference(self) -> Int8Linear:
        grid = None if self.input_grid is None else self.input_grid.grid()
        return Int8Linear.from_float(self.to_float(), self.config, input_grid=grid)


class LowBitQATLinear(QATLinear):
    """Few-bit weights and activations with learned scales (LSQ, Esser et al. 2020; LSQ+ for the activations).

    1-bit weights are `sign(w)` times the mean magnitude of their channel, as in `BinaryQATLinear`.
    """

    def __init__(self, linear: nn.Linear, config: LowBit) -> None:
        super().__init__(linear)
        self.config = config
        self.input_grid = LearnedActivationGrid(config.act_bits)
        scale = low_bit_weight_scale(linear.weight.detach().float(), config.weight_bits)
        self.weight_scale = None if config.weight_bits == 1 else nn.Parameter(scale)

    def effective_weight_scale(self) -> Tensor:
        """float32 `[N]`, as forward and inference use it."""
        if self.weight_scale is None:
            return kk.binarize_rows(self.weight)[1].clamp_min(SMALLEST_SCALE)
        _, quant_max = weight_range(self.config.weight_bits)
        return learned_scale(self.weight_scale, self.in_features, quant_max)

    def fake_quantized_weight(self) -> Tensor:
        if self.weight_scale is None:
            signs, scale = kk.binarize_rows(self.weight)
            return signs * scale[:, None].to(signs.dtype)
        scale = self.effective_weight_scale()
        quant_min, quant_max = weight_range(self.config.weight_bits)
        return kk.fake_quantize(self.weight, scale, quant_min=quant_min, quant_max=quant_max, axis=0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_grid(x), self.fake_quantized_weight(), self.bias)

    def to_inference(self) -> LowBitLinear:
        scale = self.effective_weight_scale().detach()
        return LowBitLinear.from_float(
            self.to_float(), self.config, input_grid=self.input_grid.grid(), weight_scale=scale
        )


class BinaryQATLinear(QATLinear):
    """`sign(x) @ sign(w).T * mean|w| + bias` with straight-through gradients (XNOR-Net, Rastegari et al. 2016).

    The mean is part of the graph, so that the latent weights get both terms of the paper's gradient.
    """

    def __init__(self, linear: nn.Linear, config: Binary) -> None:
        super().__init__(linear)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        signs, scale = kk.binarize_rows(self.weight)
        y = F.linear(kk.binarize_rows(x)[0], signs) * scale.to(signs.dtype)
        return y if self.bias is None else y + self.bias

    def to_inference(self) -> BinaryLinear:
        return BinaryLinear.from_float(self.to_float(), self.config)
