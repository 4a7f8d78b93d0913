"""Contenders for the binary kernels.

PyTorch has no xnor-popcount, so the peers compute the same product of +-1 values the way a user would without us: in
int8, bfloat16 or float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from kdq.bench import shapes
from kdq.bench.case import Case, Contender
from kdq.bench.int8 import int_mm
from kdq.bench.limits import binary_products, reading
from kdq.bench.peers import float_linears, int8_linears


def random_signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """+1 and -1, float32; `randn().sign()` would hold a zero now and then."""
    return torch.randint(2, (rows, columns), generator=generator) * 2.0 - 1.0


def binary_matmul_cases(quick: bool) -> Iterator[Case]:
    """Bits in, int32 out."""
    generator = torch.Generator().manual_seed(2)
    for m, n, k in shapes.QUICK if quick else shapes.BINARY:
        a = random_signs(m, k, generator)
        b = random_signs(n, k, generator)
        a_bits, b_bits = kk.pack_signs(a), kk.pack_signs(b)
        int8_a, int8_b = a.to(torch.int8), b.to(torch.int8)
        zero = torch.zeros(n)
        contenders = [
            Contender("kdq binary_matmul", partial(kk.binary_matmul, a_bits, b_bits, k), "ours"),
            Contender("kdq int8_matmul", partial(kk.int8_matmul, int8_a, kk.pack_int8_weight(int8_b)), "context"),
            *float_linears(a, b, zero),
            Contender("torch _int_mm", int_mm(int8_a, int8_b)),
        ]
        limits = [binary_products(2.0 * m * n * k), reading((n + m) * k / 8)]
        reference = a.double() @ b.double().t()
        yield Case("binary_matmul", shapes.name((m, n, k)), limits, reference, contenders)


def binary_linear_cases(quick: bool) -> Iterator[Case]:
    """float32 in, float32 out, signs packed inside."""
    generator = torch.Generator().manual_seed(3)
    for m, n, k in shapes.QUICK if quick else shapes.BINARY:
        x = random_signs(m, k, generator)
        w = random_signs(n, k, generator)
        scale = torch.rand(n, generator=generator) + 0.5
        bias = torch.randn(n, generator=generator)
        scaled = w * scale[:, None]
        packed = kk.pack_int8_weight(w.to(torch.int8))
        binary = partial(kk.binary_linear, x, kk.pack_signs(w), scale, bias)
        contenders = [
            Contender("kdq binary_linear", binary, "ours", 1e-5),
            Contender("kdq int8_linear", partial(kk.int8_linear, x, packed, scale, bias), "context", 1e-5),
            *float_linears(x, scaled, bias),
            *int8_linears(x, scaled, bias),
        ]
        limits = [binary_products(2.0 * m * n * k), reading(n * k / 8 + 4 * m * k)]
        reference = x.double() @ scaled.double().t() + bias
        yield Case("binary_linear", shapes.name((m, n, k)), limits, reference, contenders)


def binary_threshold_cases(quick: bool) -> Iterator[Case]:
    """Bits in, bits out: a hidden layer with its norm and its sign. The others compare their products and pack."""
    generator = torch.Generator().manual_seed(4)
    for m, n, k in shapes.QUICK if quick else shapes.BINARY:
        a = random_signs(m, k, generator)
        w = random_signs(n, k, generator)
        a_bits, w_bits = kk.pack_signs(a), kk.pack_signs(w)
        threshold = torch.randint(-16, 17, (n,), generator=generator, dtype=torch.int32)
        products: dict[str, Callable[[], Tensor]] = {
            "kdq binary_matmul": partial(kk.binary_matmul, a_bits, w_bits, k),
            "torch float32": partial(F.linear, a, w),
            "torch _int_mm": int_mm(a.to(torch.int8), w.to(torch.int8)),
        }
        contenders = [
            Contender("kdq binary_threshold", partial(kk.binary_threshold, a_bits, w_bits, threshold, k=k), "ours"),
            *(
                Contender(name, partial(compare_and_pack, product, threshold), "context" if "kdq" in name else "peer")
                for name, product in products.items()
            ),
        ]
        limits = [binary_products(2.0 * m * n * k), reading((n + m) * k / 8)]
        reference = kk.pack_signs((a.double() @ w.double().t() - threshold).float())
        yield Case("binary_threshold", shapes.name((m, n, k)), limits, reference, contenders)


def compare_and_pack(product: Callable[[], Tensor], threshold: Tensor) -> Tensor:
    """The same bits from the products in memory."""
    return kk.pack_signs((product() - threshold).float())
