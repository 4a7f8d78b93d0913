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
from kdq.bench.target import Target


def random_signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """+1 and -1, float32; `randn().sign()` would hold a zero now and then."""
    return torch.randint(2, (rows, columns), generator=generator, device=generator.device) * 2.0 - 1.0


def binary_matmul_cases(target: Target) -> Iterator[Case]:
    """Bits in, int32 out."""
    generator = target.generator(2)
    for m, n, k in shapes.products(target, shapes.BINARY):
        a = random_signs(m, k, generator)
        b = random_signs(n, k, generator)
        a_bits, b_bits = kk.pack_signs(a), kk.pack_signs(b)
        int8_a, int8_b = a.to(torch.int8), b.to(torch.int8)
        zero = torch.zeros(n, device=target.device)
        contenders = [
            Contender("kdq binary_matmul", partial(kk.binary_matmul, a_bits, b_bits, k), "ours"),
            Contender("kdq int8_matmul", partial(kk.int8_matmul, int8_a, kk.pack_int8_weight(int8_b)), "context"),
            *float_linears(a, b, zero, target),
            Contender("torch _int_mm", int_mm(int8_a, int8_b, target)),
        ]
        limits = [binary_products(2.0 * m * n * k), reading((n + m) * k / 8)]
        reference = a.double() @ b.double().t()
        yield Case("binary_matmul", shapes.name((m, n, k)), limits, reference, contenders)


def binary_linear_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out, signs packed inside."""
    generator = target.generator(3)
    for m, n, k in shapes.products(target, shapes.BINARY):
        x = random_signs(m, k, generator).to(target.activations)
        w = random_signs(n, k, generator)
        scale = torch.rand(n, generator=generator, device=target.device) + 0.5
        bias = torch.randn(n, generator=generator, device=target.device)
        scaled = w * scale[:, None]
        packed = kk.pack_int8_weight(w.to(torch.int8))
        binary = partial(kk.binary_linear, x, kk.pack_signs(w), scale, bias)
        contenders = [
            Contender("kdq binary_linear", binary, "ours", target.rounding),
            Contender("kdq int8_linear", partial(kk.int8_linear, x, packed, scale, bias), "context", target.rounding),
            *float_linears(x, scaled, bias, target),
            *int8_linears(x, scaled, bias, target),
        ]
        limits = [binary_products(2.0 * m * n * k), reading(n * k / 8 + x.nbytes)]
        reference = x.double() @ scaled.double().t() + bias
        yield Case("binary_linear", shapes.name((m, n, k)), limits, reference, contenders)


def binary_threshold_cases(target: Target) -> Iterator[Case]:
    """Bits in, bits out: a hidden layer with its norm and its sign. The others compare their products and pack."""
    generator = target.generator(4)
    for m, n, k in shapes.products(target, shapes.BINARY):
        a = random_signs(m, k, generator)
        w = random_signs(n, k, generator)
        a_bits, w_bits = kk.pack_signs(a), kk.pack_signs(w)
        threshold = torch.randint(-16, 17, (n,), generator=generator, dtype=torch.int32, device=target.device)
        products: dict[str, Callable[[], Tensor]] = {
            "kdq binary_matmul": partial(kk.binary_matmul, a_bits, w_bits, k),
            "torch float32": partial(F.linear, a, w),
            "torch _int_mm": int_mm(a.to(torch.int8), w.to(torch.int8), target),
        }
        contenders = [
            Contender("kdq binary_threshold", partial(kk.binary_threshold, a_bits, w_bits, threshold, k=k), "ours"),
            *(
                Contender(name, partial(compare_and_pack, product, threshold), "context" if "kdq" in name else "peer")
                for name, product in products.items()
            ),
        ]
        limits = [binary_products(2.0 * m * n * k), reading((n + m) * k / 8)]
        reference = kk.pack_signs((a.double() @ w.double().t() - threshold).float().cpu()).to(target.device)
        yield Case("binary_threshold", shapes.name((m, n, k)), limits, reference, contenders)


def compare_and_pack(product: Callable[[], Tensor], threshold: Tensor) -> Tensor:
    """The same bits from the products in memory."""
    return kk.pack_signs((product() - threshold).float())
