"""Training twins beside LSQ's: PACT and DoReFa-Net, for comparison with papers and for recipes that start from them.

They are composed of differentiable steps on rounded floats, where `kdq.layers.qat` has one fused node a layer, and so
take more time and memory. The integers are those of the inference layer, exactly; outputs agree to float rounding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import LowBit
from kdq.grids import (
    SMALLEST_SCALE,
    AffineGrid,
    dorefa_weight,
    dorefa_weight_integers,
    low_bit_weight_scale,
    weight_range,
)
from kdq.layers.conv2d import LowBitConv2d
from kdq.layers.geometry import Geometry
from kdq.layers.low_bit_linear import LowBitLinear, LowBitProduct
from kdq.layers.qat import QATConv2d, QATLinear, QATProduct
from kdq.layers.qat_product import gradient_factor, learned_scale
from kdq.ranks import check_first_batch, pooled_range


class _Rounded(torch.autograd.Function):
    """The rounded tensor, whose gradient goes to the smooth one: straight through."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScaledGradient(torch.autograd.Function):
    """The tensor as it is; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _unsigned(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x on the unsigned grid whose zero point is 0, without a gradient."""
    return kk.fake_quantize(x.detach(), scale.detach(), quant_min=0, quant_max=2**bits - 1)


def _zero_point() -> Tensor:
    return torch.tensor(0, dtype=torch.int32)


def _product(geometry: Geometry, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    return geometry.float_product(x, rows.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast asks for: as the inference layer rounds it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class ClippedActivation(nn.Module):
    """PACT (Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018): x clipped to
    [0, alpha] and rounded to `2**bits` levels.

    As in the paper, the gradient of alpha is that of the result where `x >= alpha` and 0 elsewhere; x gets its gradient
    where `0 < x < alpha`. alpha starts at the largest value of the first batch, or of all ranks' where they train
    together.
    """

    initialized: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.alpha = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        check_first_batch()
        finite = x.detach().float()
        low, largest = pooled_range(finite[torch.isfinite(finite)])
        if low > largest:
            return
        self.alpha.fill_(largest if largest > 0 else 1.0)
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self.initialized:
            self.initialize(x)
        alpha = learned_scale(self.alpha)
        clipped = torch.where(x >= alpha, alpha.to(x.dtype), F.relu(x))
        rounded: Tensor = _Rounded.apply(clipped, _unsigned(x, self.scale(), self.bits))
        return rounded

    def scale(self) -> Tensor:
        """0-d float32: alpha over the number of steps."""
        return (learned_scale(self.alpha) / (2**self.bits - 1)).clamp_min(SMALLEST_SCALE * 256)

    def grid(self) -> AffineGrid:
        """What inference uses.

        Raises:
            RuntimeError: no batch has come through yet.
        """
        if not self.initialized:
            raise RuntimeError(
                "the activation scale is not initialized: run at least one batch through the prepared model "
                "before convert_"
            )
        return AffineGrid(self.scale().detach(), _zero_point())


class PACTTwin(QATProduct):
    """Activations by PACT, weights by LSQ (Esser et al. 2020) with a learned scale per output channel; 1-bit weights
    are `sign(w)` times the mean magnitude of their channel."""

    inference: ClassVar[type[LowBitProduct]]

    def __init__(self, layer: Any, config: LowBit) -> None:
        super().__init__(layer)
        self.config = config
        self.activation = ClippedActivation(config.act_bits)
        scale = low_bit_weight_scale(self.rows().detach().float(), config.weight_bits)
        self.weight_scale = None if config.weight_bits == 1 else nn.Parameter(scale)

    def effective_weight_scale(self) -> Tensor:
        """float32 `[N]`, as inference uses it."""
        if self.weight_scale is None:
            return kk.binarize_rows(self.rows())[1].clamp_min(SMALLEST_SCALE)
        return learned_scale(self.weight_scale)

    def rounded_weight(self) -> Tensor:
        """The weight `[N, K]` on its grid, differentiable in the weight and its scale."""
        if self.weight_scale is None:
            signs, mean = kk.binarize_rows(self.rows())
            return signs * mean[:, None].to(signs.dtype)
        quant_min, quant_max = weight_range(self.config.weight_bits)
        factor = gradient_factor(self.geometry.row_length, quant_max)
        scale: Tensor = _ScaledGradient.apply(learned_scale(self.weight_scale), factor)
        return kk.fake_quantize(self.rows(), scale, quant_min=quant_min, quant_max=quant_max, axis=0)

    def forward(self, x: Tensor) -> Tensor:
        return _product(self.geometry, self.activation(_autocast(x)), self.rounded_weight(), self.bias)

    def to_inference(self) -> LowBitProduct:
        scale = self.effective_weight_scale().detach()
        return self.inference.from_float(
            self.to_float(), self.config, input_grid=self.activation.grid(), weight_scale=scale
        )


class PACTQATLinear(PACTTwin, QATLinear):
    """The twin of `LowBitLinear` for method "pact"."""

    inference = LowBitLinear


class PACTQATConv2d(PACTTwin, QATConv2d):
    """The twin of `LowBitConv2d` for method "pact"."""

    inference = LowBitConv2d


class DoReFaTwin(QATProduct):
    """DoReFa-Net (Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
    Gradients", 2016): `quantize_k(clip(x, 0, 1))` times `2 quantize_k(tanh(w) / (2 max|tanh w|) + 1/2) - 1`.

    Gradients go straight through the rounding only: those of clip, tanh and the maximum are exact. Gradients themselves
    are not quantized.
    """

    inference: ClassVar[type[LowBitProduct]]

    def __init__(self, layer: Any, config: LowBit) -> None:
        super().__init__(layer)
        self.config = config

    def rounded_weight(self) -> Tensor:
        """The weight `[N, K]` on its grid, float32, differentiable in the weight."""
        bounded = dorefa_weight(self.rows())
        integers, scale = dorefa_weight_integers(bounded.detach(), self.config.weight_bits)
        rounded: Tensor = _Rounded.apply(bounded, kk.dequantize(integers, scale, axis=0))
        return rounded

    def input_scale(self) -> Tensor:
        return torch.tensor(1 / (2**self.config.act_bits - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = _autocast(x)
        rounded: Tensor = _Rounded.apply(x.clamp(0, 1), _unsigned(x, self.input_scale(), self.config.act_bits))
        return _product(self.geometry, rounded, self.rounded_weight(), self.bias)

    def to_inference(self) -> LowBitProduct:
        grid = AffineGrid(self.input_scale(), _zero_point())
        return self.inference.from_float(self.to_float(), self.config, input_grid=grid)


class DoReFaQATLinear(DoReFaTwin, QATLinear):
    """The twin of `LowBitLinear` for method "dorefa"."""

    inference = LowBitLinear


class DoReFaQATConv2d(DoReFaTwin, QATConv2d):
    """The twin of `LowBitConv2d` for method "dorefa"."""

    inference = LowBitConv2d


def pact_penalty(model: nn.Module) -> Tensor:
    """The sum of alpha**2 over a model's PACT layers, 0-d: times a weight of the user's choice (the paper takes that of
    the weight decay) it is added to the loss, so that the clipping levels shrink where the loss allows.

    Raises:
        ValueError: the model has no PACT layer.
    """
    alphas: list[Tensor] = [module.alpha for module in model.modules() if isinstance(module, ClippedActivation)]
    if not alphas:
        raise ValueError("model: has no PACT layer; prepare it with LowBit(..., method='pact')")
    return torch.stack(alphas).square().sum()
