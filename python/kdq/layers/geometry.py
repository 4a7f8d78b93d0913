"""How the rows of a weight meet an input: as a linear layer, or as a 2d convolution.

A weight is quantized as rows `[N, K]`, one an output channel, whatever it multiplies: those of a convolution are its
weight `[N, C, KH, KW]` flattened in torch's order. All that differs between the two kinds of layer is in their
geometries: shapes, the order in which kernels read a weight, the products, and the products of the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import Codebook, Int8WeightOnly

LONGEST_ROW = 65535  # of the convolution kernels: C * KH * KW


@dataclass(frozen=True)
class LinearGeometry:
    """`x @ weight.T`: x `[..., in_features]` -> `[..., out_features]`."""

    in_features: int
    out_features: int

    int8 = staticmethod(kk.int8_linear)  # as they are: a function around them costs a tenth of a microsecond
    binary = staticmethod(kk.binary_linear)

    @classmethod
    def of(cls, layer: Any) -> LinearGeometry:
        """That of an nn.Linear, or of what has its attributes."""
        return cls(layer.in_features, layer.out_features)

    def fits(self, layer: Any) -> bool:
        """Whether a layer, in float or quantized, has this geometry."""
        return (getattr(layer, "in_features", None), getattr(layer, "out_features", None)) == self.weight_shape[::-1]

    def described(self) -> str:
        """For messages."""
        return f"linear {self.in_features} -> {self.out_features}"

    @property
    def inputs(self) -> int:
        """Channels of x."""
        return self.in_features

    @property
    def outputs(self) -> int:
        return self.out_features

    @property
    def row_length(self) -> int:
        """K."""
        return self.in_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    @property
    def expected(self) -> str:
        """What x is to be, for messages."""
        return f"{self.in_features} features in the last axis"

    def __str__(self) -> str:
        return f"{self.in_features}, {self.out_features}"

    def arguments(self) -> dict[str, Any]:
        """Of the constructors of float and quantized layers, ready for JSON."""
        return asdict(self)

    def float_layer(self, bias: bool, device: str | None = None) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, bias=bias, device=device)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def batched(self, x: Tensor) -> Tensor:
        """x as the kernels take it."""
        return x

    def kernel_order(self, rows: Tensor) -> Tensor:
        """`[N, K]` in the order in which the int8 kernels read it."""
        return rows

    def sign_bits(self, rows: Tensor) -> Tensor:
        """The signs of `[N, K]`, as the binary kernels read them: int64."""
        return kk.pack_signs(rows)

    def float_product(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, rows, bias)

    # ---- backward ----------------------------------------------------------------------------------------------------

    def as_rows(self, tensor: Tensor, like: Tensor) -> Tensor:
        """An input, or its gradient, with all that shares a dynamic scale in a row; in the order in memory of `like`,
        the input. A view where tensor has that order too."""
        return tensor

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `as_rows`."""
        return rows

    def dense(self, grad: Tensor) -> Tensor:
        """The gradient of the result, as the functions below take it."""
        return grad.reshape(math.prod(grad.shape[:-1]), self.out_features)

    def input_gradient(self, grad: Tensor, rows: Tensor, like: Tensor) -> Tensor:
        """Of an input like `like`, whose values do not matter."""
        return (grad @ rows).view(like.shape)

    def weight_gradient(self, grad: Tensor, inputs: Tensor, memory: Tensor | None) -> Tensor:
        """`[N, K]`; memory: a tensor of that shape, which is not needed any more."""
        gradient: Tensor = torch.mm(grad.t(), inputs.reshape(len(grad), self.in_features), out=memory)
        return gradient

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.sum(0)


@dataclass(frozen=True)
class Conv2dGeometry:
    """`conv2d(x, weight)` in one group, padded with zeros: x `[images, in_channels, H, W]` or `[in_channels, H, W]`."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            object.__setattr__(self, name, _pair(name, getattr(self, name), least))

    @classmethod
    def of(cls, layer: Any) -> Conv2dGeometry:
        """That of an nn.Conv2d, a quantized one or a twin.

        Raises:
            ValueError: it is one that the kernels do not compute.
        """
        own = getattr(layer, "geometry", None)
        if isinstance(own, cls):
            return own
        reason = why_not_geometry(layer)
        if reason is not None:
            raise ValueError(f"layer: {reason}")
        padding = layer.padding
        if isinstance(padding, str):
            padding = [(lost // 2 if padding == "same" else 0) for lost in _lost(layer)]
        return cls(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding, layer.dilation)

    def fits(self, layer: Any) -> bool:
        if isinstance(layer, nn.Conv2d):
            return why_not_geometry(layer) is None and Conv2dGeometry.of(layer) == self
        return getattr(layer, "geometry", None) == self

    def described(self) -> str:
        return f"a convolution {self}"

    @property
    def inputs(self) -> int:
        return self.in_channels

    @property
    def outputs(self) -> int:
        return self.out_channels

    @property
    def row_length(self) -> int:
        return self.in_channels * math.prod(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def expected(self) -> str:
        return f"[images, {self.in_channels}, height, width] or [{self.in_channels}, height, width]"

    def __str__(self) -> str:
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        others = "".join(f", {n}={getattr(self, n)}" for n, value in defaults.items() if getattr(self, n) != value)
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{others}"

    def arguments(self) -> dict[str, Any]:
        return asdict(self)

    def float_layer(self, bias: bool, device: str | None = None) -> nn.Module:
        return nn.Conv2d(**self.arguments(), bias=bias, device=device)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def batched(self, x: Tensor) -> Tensor:
        """x `[images, C, H, W]`; one image gets the axis.

        Raises:
            ValueError: x has other axes or another number of channels.
        """
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"x: expected {self.expected}, got {list(x.shape)}")
        return x.unsqueeze(0) if x.dim() == 3 else x

    def int8(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, **grid: Any) -> Tensor:
        return kk.int8_conv2d(
            x,
            packed,
            scale,
            bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            **grid,
        )

    def binary(self, x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return kk.binary_conv2d(x, bits, scale, bias, stride=self.stride, padding=self.padding, dilation=self.dilation)

    def kernel_order(self, rows: Tensor) -> Tensor:
        """The channels of a position side by side, as they lie in a channels_last image."""
        return self._channels_last(rows).reshape(len(rows), -1)

    def sign_bits(self, rows: Tensor) -> Tensor:
        """int64 `[N, KH, KW, ceil(C / 64)]`."""
        return kk.pack_signs(self._channels_last(rows))

    def _channels_last(self, rows: Tensor) -> Tensor:
        return rows.view(self.weight_shape).permute(0, 2, 3, 1)

    def float_product(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        weight = rows.view(self.weight_shape)
        y = F.conv2d(self.batched(x), weight, bias, self.stride, self.padding, self.dilation)
        return y.squeeze(0) if x.dim() == 3 else y

    # ---- backward ----------------------------------------------------------------------------------------------------

    def as_rows(self, tensor: Tensor, like: Tensor) -> Tensor:
        """`[images, C * H * W]`: an image shares its dynamic scale."""
        return tensor.permute(0, 2, 3, 1).flatten(1) if _is_channels_last(like) else tensor.flatten(1)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        if not _is_channels_last(like):
            return rows.view(like.shape)
        images, channels, height, width = like.shape
        return rows.view(images, height, width, channels).permute(0, 3, 1, 2)

    def dense(self, grad: Tensor) -> Tensor:
        return grad

    def input_gradient(self, grad: Tensor, rows: Tensor, like: Tensor) -> Tensor:
        return self._backward(grad, like, rows.view(self.weight_shape), [True, False, False])[0]

    def weight_gradient(self, grad: Tensor, inputs: Tensor, memory: Tensor | None) -> Tensor:
        weight = grad.new_empty(1).expand(self.weight_shape)  # its shape is all that is read
        return self._backward(grad, inputs, weight, [False, True, False])[1].flatten(1)

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.sum((0, 2, 3))

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0], 1, wanted
        )
        return gradients


Geometry: TypeAlias = LinearGeometry | Conv2dGeometry


def why_not_geometry(conv: Any) -> str | None:
    """The reason why the kernels do not compute an nn.Conv2d of this shape; None if they do."""
    if conv.groups > 1:
        depthwise = " (depthwise)" if conv.groups == conv.in_channels else ""
        return f"it has {conv.groups} groups{depthwise}; the kernels compute one"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}; the kernels pad with zeros"
    if conv.padding == "same" and any(lost % 2 for lost in _lost(conv)):
        return 'its padding "same" is not the same on both sides, as with an even kernel_size; the kernels pad evenly'
    length = conv.in_channels * math.prod(conv.kernel_size)
    if length > LONGEST_ROW:
        return f"its output channels have {length} weights each; the kernels take up to {LONGEST_ROW}"
    return None


def why_not_conv_config(config: Any) -> str | None:
    """The reason why convolutions have no form of a config; None if they have."""
    if isinstance(config, Int8WeightOnly | Codebook):
        return f"{type(config).__name__} has no convolution kernels; use Int8Dynamic, Int8Static, LowBit or Binary"
    return None


def check_conv_config(config: Any) -> None:
    """Raises ValueError if convolutions have no form of a config."""
    reason = why_not_conv_config(config)
    if reason is not None:
        raise ValueError(f"config: {reason}")


def _lost(conv: Any) -> list[int]:
    """By how much the result would be smaller than the input, along both axes, without padding and stride."""
    return [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """A number for both axes, or two.

    Raises:
        ValueError: it is something else, or below the least.
    """
    both = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(both, tuple | list)
        or len(both) != 2
        or any(not isinstance(v, int) or isinstance(v, bool) or v < least for v in both)
    ):
        raise ValueError(f"{name}: expected an integer of at least {least}, or two, got {value!r}")
    return both[0], both[1]


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
