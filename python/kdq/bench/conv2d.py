"""Cases of the 2d convolutions: layers of ResNets (He et al. 2016), images in channels_last memory format.

Their peers are those of the linear layers as convolutions: torch, ONNX Runtime and OpenVINO in floating point and int8.
The int8 ones quantize activations by a fixed grid a tensor, and torch and ONNX Runtime round results to 8 bits too, for
which their error tells; a layer with a scale an image, as ours, no library at hand has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from kdq.bench import onnxruntime_linear, openvino_linear, torch_quantized
from kdq.bench.case import Case, Contender
from kdq.bench.limits import Limit, binary_products, int8_products, reading
from kdq.bench.target import Target
from kdq.grids import AffineGrid, affine_grid


@dataclass(frozen=True)
class Layer:
    """A convolution with square kernel, padded to keep its images' size but for the stride."""

    images: int
    channels: int
    size: int  # height and width
    outputs: int  # channels
    kernel: int
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def window(self) -> dict[str, Any]:
        return {"stride": (self.stride, self.stride), "padding": (self.padding, self.padding)}

    def __str__(self) -> str:
        """The images and the kernels: `1x64x56x56, 64 of 3x3`; of a stride of 2 `/ 2`."""
        images = f"{self.images}x{self.channels}x{self.size}x{self.size}"
        stride = f" / {self.stride}" if self.stride > 1 else ""
        return f"{images}, {self.outputs} of {self.kernel}x{self.kernel}{stride}"


QUICK = [Layer(2, 16, 8, 24, 3)]
RESNET = [
    Layer(1, 3, 224, 64, 7, 2),
    Layer(1, 64, 56, 64, 3),
    Layer(1, 64, 56, 256, 1),
    Layer(1, 128, 28, 128, 3),
    Layer(1, 128, 56, 128, 3, 2),
    Layer(1, 256, 14, 256, 3),
    Layer(1, 512, 7, 512, 3),
    Layer(16, 256, 14, 256, 3),
]


def layers(target: Target) -> list[Layer]:
    return QUICK if target.quick else RESNET


@dataclass(frozen=True)
class Operands:
    """x channels_last, in the dtype of the target's activations; float32 w and bias."""

    layer: Layer
    x: Tensor
    w: Tensor
    bias: Tensor

    def reference(self) -> Tensor:
        return F.conv2d(self.x.double(), self.w.double(), self.bias.double(), **self.layer.window)

    def scale(self) -> Tensor:
        return self.w.abs().amax((1, 2, 3)) / 127

    def packed(self) -> Tensor:
        q = torch.round(self.w / self.scale()[:, None, None, None]).to(torch.int8)
        return kk.pack_int8_weight(q.permute(0, 2, 3, 1).flatten(1))

    def limits(self, products: Callable[[float], Limit], weight_bytes: float) -> list[Limit]:
        operations = 2.0 * self.reference().numel() * self.w[0].numel()
        return [products(operations), reading(weight_bytes + self.x.nbytes)]

    def int8(self, grid: AffineGrid | None = None) -> Callable[[], Tensor]:
        size = (self.layer.kernel, self.layer.kernel)
        static: dict[str, Any] = {}
        if grid is not None:
            static = {"input_scale": grid.scale, "input_zero_point": grid.zero_point}
        return partial(
            kk.int8_conv2d,
            self.x,
            self.packed(),
            self.scale(),
            self.bias,
            kernel_size=size,
            **self.layer.window,
            **static,
        )


def operands(layer: Layer, values: Callable[..., Tensor], generator: torch.Generator, target: Target) -> Operands:
    shape = (layer.images, layer.channels, layer.size, layer.size)
    x = values(*shape, generator=generator, device=target.device).to(target.activations)
    w = values(layer.outputs, layer.channels, layer.kernel, layer.kernel, generator=generator, device=target.device)
    bias = torch.randn(layer.outputs, generator=generator, device=target.device)
    return Operands(layer, x.to(memory_format=torch.channels_last), w, bias)


def signs(*shape: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=device) * 2.0 - 1.0


def int8_conv2d_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out, activations quantized inside."""
    generator = target.generator(11)
    for layer in layers(target):
        of = operands(layer, torch.randn, generator, target)
        found = affine_grid(float(of.x.min()), float(of.x.max()), 8)
        grid = AffineGrid(found.scale.to(target.device), found.zero_point.to(target.device))
        contenders = [
            Contender("kdq int8_conv2d", of.int8(), "ours", 0.03),
            Contender("kdq int8_conv2d, static", of.int8(grid), "ours", 0.03),
            *peers(of, target),
        ]
        yield Case("int8_conv2d", str(layer), of.limits(int8_products, of.w.numel()), of.reference(), contenders)


def binary_conv2d_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out, signs packed inside. Without a first layer: nobody binarizes it."""
    generator = target.generator(12)
    for layer in layers(target):
        if layer.channels < 16:
            continue
        of = operands(layer, signs, generator, target)
        bits = kk.pack_signs(of.w.permute(0, 2, 3, 1))
        ones = torch.ones(layer.outputs, device=target.device)
        ours = partial(kk.binary_conv2d, of.x, bits, ones, of.bias, **layer.window)
        contenders = [
            Contender("kdq binary_conv2d", ours, "ours", target.rounding),
            Contender("kdq int8_conv2d", of.int8(), "context", target.rounding),
            *peers(of, target),
        ]
        limits = of.limits(binary_products, of.w.numel() / 8)
        yield Case("binary_conv2d", str(layer), limits, of.reference(), contenders)


def peers(of: Operands, target: Target) -> list[Contender]:
    def float_conv(dtype: torch.dtype) -> Callable[[], Tensor]:
        w = of.w.to(dtype, memory_format=torch.channels_last)
        return partial(F.conv2d, of.x.to(dtype), w, of.bias.to(dtype), **of.layer.window)

    bf16 = Contender("torch bfloat16", float_conv(torch.bfloat16), "peer", 1e-2)
    if target.gpu:
        return [bf16, Contender("torch float16", float_conv(torch.float16), "peer", 1e-2)]
    return [
        Contender("torch float32", float_conv(torch.float32), "peer", 1e-5),
        bf16,
        *torch_quantized.static_conv2d(of.x, of.w, of.bias, of.layer.stride, of.layer.padding),
        *onnxruntime_linear.conv2d(of.x.contiguous(), of.w, of.bias, of.layer.stride, of.layer.padding),
        *openvino_linear.conv2d(of.x.contiguous(), of.w, of.bias, of.layer.stride, of.layer.padding),
    ]
