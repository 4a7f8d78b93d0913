"""torch's own quantized layers, on each backend that this torch has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kdq.bench.case import Contender

ENGINES = ("fbgemm", "x86", "onednn")


def torch_quantized_linears(x: Tensor, w: Tensor, bias: Tensor) -> list[Contender]:
    """One contender an engine: int8 weights per channel, activations quantized per tensor inside the call.

    `reduce_range` keeps activations to 7 bits on CPUs without VNNI, where these backends' 8-bit products would
    saturate; torch's documentation asks for it there.
    """
    vnni = torch.cpu._is_vnni_supported()
    contenders = []
    for engine in engines():
        packed = torch.ops.quantized.linear_prepack(quantized_weight(w), bias)
        run = partial(torch.ops.quantized.linear_dynamic, x, packed, not vnni)
        contenders.append(Contender(f"torch quantized {engine}", run, "peer", 0.05))
    return contenders


def static_conv2d(x: Tensor, w: Tensor, bias: Tensor, stride: int, padding: int) -> list[Contender]:
    """One contender an engine: activations and results on fixed 8-bit grids (7 bits without VNNI) of the range that
    they have, quantized and dequantized inside the call."""
    top = 255 if torch.cpu._is_vnni_supported() else 127
    y = torch.nn.functional.conv2d(x, w, bias, stride, padding)
    x_grid, y_grid = unsigned_grid(x, top), unsigned_grid(y, 255)

    def layer(packed: object) -> Tensor:
        q = torch.quantize_per_tensor(x, *x_grid, torch.quint8)
        result: Tensor = torch.ops.quantized.conv2d.new(q, packed, *y_grid).dequantize()
        return result

    contenders = []
    for engine in engines():
        pairs = [stride, stride], [padding, padding], [1, 1]
        packed = torch.ops.quantized.conv2d_prepack(quantized_weight(w), bias, *pairs, 1)
        contenders.append(Contender(f"torch quantized {engine}, static", partial(layer, packed), "peer", 0.05))
    return contenders


def unsigned_grid(x: Tensor, top: int) -> tuple[float, int]:
    """The scale and the zero point of `0 ... top` over the range of x, 0 included."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / top
    return scale, round(-low / scale)


def engines() -> Iterator[str]:
    """Each backend that there is, in force until the next is asked for."""
    before = torch.backends.quantized.engine
    try:
        for engine in ENGINES:
            if engine in torch.backends.quantized.supported_engines:
                torch.backends.quantized.engine = engine
                yield engine
    finally:
        torch.backends.quantized.engine = before


def quantized_weight(w: Tensor) -> Tensor:
    """Per output channel."""
    scales = (w.abs().flatten(1).amax(1) / 127).double()
    zeros = torch.zeros(len(w), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the deprecation of its quantized tensors
        return torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8)
