"""A call of every operator, and how it looks on another device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

import kdq_kernels as kk

ops = torch.ops.kdq


def randn(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))


INDICES = torch.randint(0, 8, (13, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def op_cases() -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    x, w = randn(5, 70), int8(13, 70)
    packed, scale = kk.pack_int8_weight(w), torch.rand(13) + 0.1
    narrow = kk.pack_int8_weight(int8(6, 13))
    bits, planes = kk.pack_signs(randn(13, 70)), kk.pack_bitplanes(w.clamp(-2, 1), 2)
    one, zero = torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
    per_channel, learned = torch.rand(70) + 0.1, torch.rand(70) * 5
    images = randn(2, 5, 6, 7)
    last = images.to(memory_format=torch.channels_last)
    of_windows, conv_bits = kk.pack_int8_weight(int8(13, 45)), kk.pack_signs(randn(13, 3, 3, 5))
    window: tuple[list[int], ...] = ([2, 1], [1, 1], [1, 2])
    return [
        ("fake_quantize", ops.fake_quantize.default, (x, one, zero, 0, 15), {}),
        ("fake_quantize channel", ops.fake_quantize.default, (x, per_channel, learned, 0, 15, -1), {}),
        (
            "fake_quantize group",
            ops.fake_quantize.default,
            (x, torch.rand(5, 7) + 0.1, None, -8, 7, None, 10),
            {},
        ),
        ("fake_quantize.out", ops.fake_quantize.out, (x, one, zero, 0, 15), {"out": torch.empty(5, 70)}),
        ("fake_quantize_backward", ops.fake_quantize_backward.default, (x, x, one, zero, 0, 15), {}),
        (
            "fake_quantize_backward_",
            ops.fake_quantize_backward_.default,
            (x.clone(), x, per_channel, learned, 0, 15, 1),
            {},
        ),
        ("binarize_rows_backward_", ops.binarize_rows_backward_.default, (x.clone(), x, True), {}),
        ("quantize", ops.quantize.default, (x, one, zero, 0, 255), {}),
        ("quantize int32", ops.quantize.default, (x.t(), one, None, -1000, 1000), {}),
        ("dequantize", ops.dequantize.default, (w, scale, None, 0), {}),
        ("quantize_rows", ops.quantize_rows.default, (x,), {}),
        ("fake_quantize_rows", ops.fake_quantize_rows.default, (x,), {}),
        ("binarize_rows", ops.binarize_rows.default, (x,), {}),
        ("binarize_rows_backward", ops.binarize_rows_backward.default, (x, torch.rand(5), x), {}),
        ("pack_int8_weight", ops.pack_int8_weight.default, (w,), {}),
        ("pack_int8_weight 4 bits", ops.pack_int8_weight.default, (w.clamp(-8, 7), 4), {}),
        ("unpack_int8_weight", ops.unpack_int8_weight.default, (packed,), {}),
        ("int8_matmul", ops.int8_matmul.default, (int8(4, 70), packed), {}),
        ("int8_matmul plain", ops.int8_matmul.default, (int8(4, 70), w), {}),
        ("int8_linear", ops.int8_linear.default, (x, packed, scale, scale), {"activation": "gelu"}),
        ("int8_linear static", ops.int8_linear.default, (x, packed, scale, None, one, zero, 15), {}),
        (
            "scaled_dot_product_attention",
            ops.scaled_dot_product_attention.default,
            (randn(2, 4, 5, 6), randn(2, 2, 7, 6), randn(2, 2, 7, 9), None, True, 0.5),
            {},
        ),
        (
            "scaled_dot_product_attention of parts",
            ops.scaled_dot_product_attention.default,
            (*randn(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4), torch.ones(1, 1, 1, 5, dtype=torch.bool), False, 0.5),
            {},
        ),
        (
            "int8_linear_chain",
            ops.int8_linear_chain.default,
            (
                x,
                [packed, narrow],
                [scale, scale[:6]],
                [scale, None],
                [None, one],
                [None, zero],
                [255, 15],
                ["relu", ""],
            ),
            {},
        ),
        ("int8_weight_only_linear", ops.int8_weight_only_linear.default, (x, packed, scale), {}),
        (
            "int8_conv2d",
            ops.int8_conv2d.default,
            (images, of_windows, scale, scale, [3, 3], *window),
            {"activation": "relu"},
        ),
        (
            "int8_conv2d static",
            ops.int8_conv2d.default,
            (last, of_windows, scale, None, [3, 3], *window, one, zero, 15),
            {},
        ),
        ("pack_signs", ops.pack_signs.default, (x,), {}),
        ("unpack_signs", ops.unpack_signs.default, (bits, 70), {}),
        ("binary_matmul", ops.binary_matmul.default, (bits, bits, 70), {}),
        ("binary_linear", ops.binary_linear.default, (x, bits, scale, scale), {}),
        ("binary_conv2d", ops.binary_conv2d.default, (images, conv_bits, scale, scale, *window), {}),
        ("binary_conv2d channels_last", ops.binary_conv2d.default, (last, conv_bits, scale, None, *window), {}),
        ("pack_bitplanes", ops.pack_bitplanes.default, (w.clamp(-2, 1), 2, "signed"), {}),
        ("unpack_bitplanes", ops.unpack_bitplanes.default, (planes, 70, "signed"), {}),
        ("bitplane_matmul", ops.bitplane_matmul.default, (planes, planes, 70, "unsigned", "signed"), {}),
        (
            "bitplane_linear",
            ops.bitplane_linear.default,
            (x, planes, w.clamp(-2, 1).sum(1, dtype=torch.int32), scale, scale, one, zero, 3, "signed"),
            {"activation": "relu"},
        ),
        ("pack_indices", ops.pack_indices.default, (INDICES, 3), {}),
        ("unpack_indices", ops.unpack_indices.default, (kk.pack_indices(INDICES, 3), 3, 13, 70), {}),
        (
            "codebook_linear",
            ops.codebook_linear.default,
            (x, kk.pack_indices(INDICES, 3), torch.rand(8), 13, scale),
            {"activation": "silu"},
        ),
        ("binary_linear of bits", ops.binary_linear.default, (bits, bits, scale, None, 70), {}),
        ("binary_threshold", ops.binary_threshold.default, (x, bits, torch.arange(13, dtype=torch.int32)), {}),
        ("binary_threshold of bits", ops.binary_threshold.default, (bits, bits, torch.arange(13).int(), 70), {}),
        ("distillation_loss", ops.distillation_loss.default, (x, w.float()[:5], None, 4.0, 1.0), {}),
        (
            "distillation_loss_backward",
            ops.distillation_loss_backward.default,
            (torch.tensor(1.0), x, w.float()[:5], torch.arange(5), torch.rand(5, 5) + 1, 4.0, 0.5),
            {},
        ),
    ]


def map_tensors(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """In any nesting; other values stay."""
    return _pytree.tree_map(lambda value: function(value) if isinstance(value, Tensor) else value, values)


def packed_for_cuda(values: Any) -> Any:
    """Packed int8 weights (uint8 on the CPU) as the CUDA kernels take them, still on the CPU."""
    return map_tensors(lambda t: kk.unpack_int8_weight(t) if t.dtype == torch.uint8 and t is not INDICES else t, values)


def moved(values: Any, device: str) -> Any:
    """Tensors on another device, packed int8 weights packed anew."""
    return map_tensors(lambda t: t.to(device), packed_for_cuda(values) if device == "cuda" else values)
