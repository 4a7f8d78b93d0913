"""The training twins: layers with float weights, whose forward pass computes on the integers that inference will use.

The arithmetic and its gradients are in `kdq.layers.qat_product`. `to_inference` makes the layer that is deployed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.binary_inputs import warn_of_first_batch
from kdq.configs import Binary, Int8Static, Int8WeightOnly, LowBit
from kdq.grids import (
    SMALLEST_SCALE,
    AffineGrid,
    low_bit_weight_scale,
    search_affine_grid,
)
from kdq.layers.base import keeping_dtype
from kdq.layers.binary_linear import BinaryLinear, BinaryProduct
from kdq.layers.conv2d import BinaryConv2d, Int8Conv2d, LowBitConv2d
from kdq.layers.geometry import Conv2dGeometry, Geometry, LinearGeometry, check_conv_config
from kdq.layers.int8_linear import Int8Config, Int8Linear, Int8Product
from kdq.layers.low_bit_linear import LowBitLinear, LowBitProduct
from kdq.layers.qat_product import integer_zero_point, learned_scale, quantized_product
from kdq.ranks import check_first_batch, pooled_range, sum_over_ranks


class LearnedActivationGrid(nn.Module):
    """Unsigned activations with a learned scale and zero point (LSQ+, Bhalgat et al. 2020).

    Both are initialised from the first batch that comes through, by least squared error; from those of all ranks where
    they train together (`kdq.distributed`).
    """

    initialized: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.zero_point = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        check_first_batch()
        sample = x.detach().float().flatten()
        low, high = pooled_range(sample)
        if not low <= high:  # no element, or NaN, which the loss will show
            return
        grid = search_affine_grid(sample, low, high, self.bits, pooled=lambda errors: sum_over_ranks(errors, x.device))
        self.scale.copy_(grid.scale)
        self.zero_point.copy_(grid.zero_point)
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters, by their names in `quantized_product`; the first x initialises them."""
        if not torch.compiler.is_compiling() and not self.initialized:
            self.initialize(x)
        return {"input_scale": self.scale, "zero_point": self.zero_point}

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
        return AffineGrid(learned_scale(self.scale.detach()), integer_zero_point(self.zero_point.detach(), self.bits))


class TrainingTwin(nn.Module):
    """Base of the training twins: float parameters `weight` and, if any, `bias`, and what their grids learn."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingTwin:
        """`model.bfloat16()` turns weight and bias; learned scales and grids stay float32, as in inference layers."""
        parameters = [self._parameters.get(name) for name in ("weight", "bias")]
        turned = [t for p in parameters if p is not None for t in (p, p.grad)]
        super()._apply(lambda t: fn(t) if any(t is own for own in turned) else keeping_dtype(fn, t), recurse)
        return self

    def to_inference(self) -> nn.Module:
        """The layer on the real kernels; the twin is left as it is."""
        raise NotImplementedError


class QATProduct(TrainingTwin):
    """Base of the twins of linear layers and convolutions: the float weight and bias of an nn.Linear or nn.Conv2d,
    taken over as they are. The geometry's sizes are attributes, as in the float layer."""

    geometry_type: ClassVar[type[Geometry]]
    geometry: Geometry

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.geometry = self.geometry_type.of(layer)
        for name, value in self.geometry.arguments().items():
            setattr(self, name, value)
        self.weight = layer.weight
        self.bias = layer.bias

    def to_float(self) -> Any:
        """A plain nn.Linear or nn.Conv2d that shares the float weight and bias."""
        layer: Any = self.geometry.float_layer(bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def rows(self) -> Tensor:
        """The weight as it is quantized, `[N, K]`."""
        return self.weight.flatten(1)

    def extra_repr(self) -> str:
        return f"{self.geometry}, bias={getattr(self, 'bias', None) is not None}"


class QATLinear(QATProduct):
    """Base of the linear layers' twins."""

    geometry_type = LinearGeometry
    in_features: int
    out_features: int


class QATConv2d(QATProduct):
    """Base of the twins of 2d convolutions: of an nn.Conv2d of one group that pads with zeros.

    Raises:
        ValueError: (from the constructor) the convolution is one that the kernels do not compute; (from a call) x has
            other axes than `[images, C, H, W]` or `[C, H, W]`, or another number of channels.
    """

    geometry_type = Conv2dGeometry
    in_channels: int
    out_channels: int


class Int8Twin(QATProduct):
    """int8 weights with scales from the current `max|w|`, and activations as the config says."""

    inference: ClassVar[type[Int8Product]]

    def __init__(self, layer: Any, config: Int8Config) -> None:
        super().__init__(layer)
        self.config = config
        self.input_grid = LearnedActivationGrid(8) if isinstance(config, Int8Static) else None

    def forward(self, x: Tensor) -> Tensor:
        grid = {} if self.input_grid is None else self.input_grid(x)
        return quantized_product(x, self.weight, self.bias, self.geometry, input_bits=8, weight_bits=8, **grid)

    def to_inference(self) -> Int8Product:
        grid = None if self.input_grid is None else self.input_grid.grid()
        return self.inference.from_float(self.to_float(), self.config, input_grid=grid)


class Int8QATLinear(Int8Twin, QATLinear):
    """The twin of `Int8Linear`."""

    inference = Int8Linear

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.config, Int8WeightOnly):
            return F.linear(x, kk.fake_quantize_rows(self.weight), self.bias)
        return super().forward(x)


class Int8QATConv2d(Int8Twin, QATConv2d):
    """The twin of `Int8Conv2d`; dynamic activations have one scale an image."""

    inference = Int8Conv2d

    def __init__(self, layer: Any, config: Int8Config) -> None:
        check_conv_config(config)
        super().__init__(layer, config)


class LowBitTwin(QATProduct):
    """Few-bit weights and activations with learned scales (LSQ, Esser et al. 2020; LSQ+ for the activations).

    1-bit weights are `sign(w)` times the mean magnitude of their channel, as in `BinaryTwin`.
    """

    inference: ClassVar[type[LowBitProduct]]

    def __init__(self, layer: Any, config: LowBit) -> None:
        super().__init__(layer)
        self.config = config
        self.input_grid = LearnedActivationGrid(config.act_bits)
        scale = low_bit_weight_scale(self.rows().detach().float(), config.weight_bits)
        self.weight_scale = None if config.weight_bits == 1 else nn.Parameter(scale)

    def effective_weight_scale(self) -> Tensor:
        """float32 `[N]`, as inference uses it."""
        if self.weight_scale is None:
            return kk.binarize_rows(self.rows())[1].clamp_min(SMALLEST_SCALE)
        return learned_scale(self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_product(
            x,
            self.weight,
            self.bias,
            self.geometry,
            input_bits=self.config.act_bits,
            weight_bits=self.config.weight_bits,
            weight_scale=self.weight_scale,
            **self.input_grid(x),
        )

    def to_inference(self) -> LowBitProduct:
        scale = self.effective_weight_scale().detach()
        return self.inference.from_float(
            self.to_float(), self.config, input_grid=self.input_grid.grid(), weight_scale=scale
        )


class LowBitQATLinear(LowBitTwin, QATLinear):
    """The twin of `LowBitLinear` for method "lsq"."""

    inference = LowBitLinear


class LowBitQATConv2d(LowBitTwin, QATConv2d):
    """The twin of `LowBitConv2d` for method "lsq". In LSQ's gradient, the activations' scale counts the features of one
    image."""

    inference = LowBitConv2d


class BinaryTwin(QATProduct):
    """`sign(x)` times `sign(w)` times `mean|w|`, plus bias, with straight-through gradients (XNOR-Net, Rastegari et al.
    2016).

    The mean is part of the graph, so that the latent weights get both terms of the paper's gradient.

    Args:
        name: of the layer, for a warning if its first batch has no negative value: all signs are then equal.
    """

    inference: ClassVar[type[BinaryProduct]]

    def __init__(self, layer: Any, config: Binary, name: str = "") -> None:
        super().__init__(layer)
        self.config = config
        self.name = name
        self._saw_batch = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self._saw_batch:
            self._saw_batch = True
            warn_of_first_batch(self.name, x)
        return quantized_product(x, self.weight, self.bias, self.geometry, input_bits=1, weight_bits=1)

    def to_inference(self) -> BinaryProduct:
        return self.inference.from_float(self.to_float(), self.config)


class BinaryQATLinear(BinaryTwin, QATLinear):
    """The twin of `BinaryLinear`."""

    inference = BinaryLinear


class BinaryQATConv2d(BinaryTwin, QATConv2d):
    """The twin of `BinaryConv2d`: padded positions contribute nothing."""

    inference = BinaryConv2d
