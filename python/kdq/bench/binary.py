"""Contenders for the binary kernels.

PyTorch has no xnor-popcount, so the peers compute the same product of +-1 values the way a user would without us: in
int8, bfloat16 or float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from kdq.bench.case import Case, Contender
from kdq.bench.int8 import QUICK_SHAPES, Shape
from kdq.bench.torch_quantized import torch_quantized_linears

SHAPES: list[Shape] = [
    (1, 4096, 4096),
    (16, 768, 768),
    (128, 768, 768),
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
]


def random_signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """+1 and -1, float32; `randn().sign()` would hold a zero now and then."""
    return torch.randint(2, (rows, columns), generator=generator) * 2.0 - 1.0


def binary_matmul_cases(quick: bool) -> Iterator[Case]:
    """Bits in, int32 out."""
    generator = torch.Generator().manual_seed(2)
    for m, n, k in QUICK_SHAPES if quick else SHAPES:
        a = random_signs(m, k, generator)
        b = random_signs(n, k, generator)
        a_bits, b_bits = kk.pack_signs(a), kk.pack_signs(b)
        int8_a, int8_b = a.to(torch.int8), kk.pack_int8_weight(b.to(torch.int8))
        bf16_a, bf16_b = a.bfloat16(), b.bfloat16()
        contenders = [
            Contender("kdq binary_matmul", partial(kk.binary_matmul, a_bits, b_bits, k), "ours"),
            Contender("kdq int8_matmul", partial(kk.int8_matmul, int8_a, int8_b), "context"),
            Contender("torch float32", partial(F.linear, a, b), "peer"),
            Contender("torch bfloat16", partial(F.linear, bf16_a, bf16_b), "peer", 1e-2),
        ]
        if m > 16:
            transposed = b.to(torch.int8).t()
            contenders.append(Contender("torch _int_mm", partial(torch._int_mm, int8_a, transposed), "peer"))
        reference = a.double() @ b.double().t()
        yield Case("binary_matmul", f"{m}x{n}x{k}", 2.0 * m * n * k, "binary_gops", reference, contenders)


def binary_linear_cases(quick: bool) -> Iterator[Case]:
    """float32 in, float32 out, signs packed inside."""
    generator = torch.Generator().manual_seed(3)
    for m, n, k in QUICK_SHAPES if quick else SHAPES:
        x = random_signs(m, k, generator)
        w = random_signs(n, k, generator)
        scale = torch.rand(n, generator=generator) + 0.5
        bias = torch.randn(n, generator=generator)
        bits = kk.pack_signs(w)
        scaled = w * scale[:, None]
        int8_packed = kk.pack_int8_weight(w.to(torch.int8))
        bf16 = x.bfloat16(), scaled.bfloat16(), bias.bfloat16()
        contenders = [
            Contender(
                "kdq binary_linear",
                partial(kk.binary_linear, x, bits, scale, bias),
                "ours",
                1e-5,
            ),
            Contender(
                "kdq int8_linear",
                partial(kk.int8_linear, x, int8_packed, scale, bias),
                "context",
                1e-5,
            ),
            Contender("torch float32", partial(F.linear, x, scaled, bias), "peer", 1e-5),
            Contender("torch bfloat16", partial(F.linear, *bf16), "peer", 1e-2),
            *torch_quantized_linears(x, scaled, bias),
        ]
        reference = x.double() @ scaled.double().t() + bias
        yield Case("binary_linear", f"{m}x{n}x{k}", 2.0 * m * n * k, "binary_gops", reference, contenders)
