"""Contenders for linear layers with int8 activations and weights of 4 and 2 bits, which take that many bits in memory.

Peers keep weights in 4 bits, with a scale for each group of a row; here all groups of a row get the same. torch
multiplies bfloat16 activations; ONNX Runtime and OpenVINO quantize them inside, with a scale a group too, which is more
exact. Nobody keeps 2 bits: the same peers compute from the same integers in 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.bench import onnxruntime_linear, openvino_linear, shapes
from kdq.bench.case import Case, Contender
from kdq.bench.limits import int8_products, reading
from kdq.bench.peers import float_linears
from kdq.bench.target import Target

TORCH_GROUP = 128  # torch's operator takes 32, 64, 128 or 256


def low_bit_linear_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out, activations quantized inside."""
    generator = target.generator(13)
    for m, n, k in shapes.products(target, shapes.LOW_BIT):
        x = torch.randn(m, k, generator=generator, device=target.device).to(target.activations)
        scale = torch.rand(n, generator=generator, device=target.device) * 0.01 + 0.001
        for bits in (4, 2):
            half = 1 << (bits - 1)
            q = torch.randint(-half, half, (n, k), generator=generator, device=target.device).to(torch.int8)
            ours = partial(kk.int8_linear, x, kk.pack_int8_weight(q, bits), scale)
            contenders = [
                Contender(f"kdq int8_linear, {bits} bits", ours, "ours", 0.03),
                Contender(
                    "kdq int8_linear, 8 bits",
                    partial(kk.int8_linear, x, kk.pack_int8_weight(q), scale),
                    "context",
                    0.03,
                ),
                *peers(x, q, scale, target),
            ]
            stored = n * k * (1 if target.gpu else bits / 8)
            limits = [int8_products(2.0 * m * n * k), reading(stored + x.nbytes)]
            reference = x.double() @ (q * scale[:, None]).double().t()
            yield Case("low_bit_linear", f"{shapes.name((m, n, k))}, {bits} bits", limits, reference, contenders)


def peers(x: Tensor, q: Tensor, scale: Tensor, target: Target) -> list[Contender]:
    if target.gpu:
        return float_linears(x, q * scale[:, None], torch.zeros_like(scale), target)
    return [
        *torch_int4(x, q, scale, target),
        *onnxruntime_linear.four_bit_linear(x, q, scale),
        *openvino_linear.four_bit_linear(x, q, scale),
    ]


def torch_int4(x: Tensor, q: Tensor, scale: Tensor, target: Target) -> list[Contender]:
    """torch's operator for this layer, in bfloat16, for which it is made; of whole groups and blocks alone."""
    n, k = q.shape
    if n % 64 or k % TORCH_GROUP or not target.has_operator("_weight_int4pack_mm_for_cpu"):
        return []
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32) + 8, 1)
    of_groups = scale.expand(k // TORCH_GROUP, n)
    scales_and_zeros = torch.stack([of_groups, torch.zeros_like(of_groups)], -1).to(torch.bfloat16).contiguous()
    half = x.bfloat16()
    run = partial(torch.ops.aten._weight_int4pack_mm_for_cpu, half, packed, TORCH_GROUP, scales_and_zeros)
    return [Contender("torch _weight_int4pack_mm", run, "peer", 0.02)]
