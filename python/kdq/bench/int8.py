"""Contenders for the int8 kernels: exact matmul, and the float-in, float-out linear layer whose activations are
quantized dynamically or statically.

Some peers quantize activations per tensor (torch's quantized linear, ONNX Runtime), OpenVINO per group of a row, ours
per row: the `error` column shows what that costs in accuracy against the float32 product.
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
from kdq.bench.limits import int8_products, reading
from kdq.bench.peers import INT_MM_GROUP, float_linears, int8_linears
from kdq.bench.target import Target
from kdq.grids import affine_grid


def random_int8(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator, device=generator.device)


def int8_matmul_cases(target: Target) -> Iterator[Case]:
    """s8 x s8 -> s32, weights packed ahead."""
    generator = target.generator(0)
    for m, n, k in shapes.products(target, shapes.INT8):
        a, b = random_int8(generator, m, k), random_int8(generator, n, k)
        packed = kk.pack_int8_weight(b)
        float_a, float_b = a.float(), b.float()
        bf16_a, bf16_b = a.bfloat16(), b.bfloat16()
        contenders = [
            Contender("kdq int8_matmul", partial(kk.int8_matmul, a, packed), "ours"),
            Contender("torch float32", partial(F.linear, float_a, float_b), "context", 1e-5),
            Contender("torch bfloat16", partial(F.linear, bf16_a, bf16_b), "context", 1e-2),
            Contender("torch _int_mm", int_mm(a, b, target)),
        ]
        limits = [int8_products(2.0 * m * n * k), reading(n * k + m * k)]
        reference = (a.double() @ b.double().t()).to(torch.int32)
        yield Case("int8_matmul", shapes.name((m, n, k)), limits, reference, contenders)


def int_mm(a: Tensor, b: Tensor, target: Target) -> Callable[[], Tensor]:
    """torch's operator wants more than 16 rows, and on a GPU whole groups of columns: they are filled up beforehand."""
    m, n = len(a), len(b)
    group = INT_MM_GROUP if target.gpu else 1
    columns = -a.shape[1] % group
    filled_a = F.pad(a, (0, columns, 0, max(0, 17 - m)))
    filled_b = F.pad(b, (0, columns, 0, -n % group))
    asked_for = (slice(m), slice(n)) if target.gpu else slice(m)
    return lambda: torch._int_mm(filled_a, filled_b.t())[asked_for]


def random_layer(
    m: int, n: int, k: int, generator: torch.Generator, target: Target
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, the float weight, the bias; and the weight's scale and integers."""
    x, w, bias = (torch.randn(size, generator=generator, device=generator.device) for size in [(m, k), (n, k), (n,)])
    scale = w.abs().amax(1) / 127
    return x.to(target.activations), w, bias, scale, torch.round(w / scale[:, None]).to(torch.int8)


def int8_linear_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out, activations quantized inside."""
    generator = target.generator(1)
    for m, n, k in shapes.products(target, shapes.INT8):
        x, w, bias, weight_scale, q = random_layer(m, n, k, generator, target)
        packed = kk.pack_int8_weight(q)
        grid = affine_grid(float(x.min()), float(x.max()), 8)
        scale, zero_point = grid.scale.to(target.device), grid.zero_point.to(target.device)
        static = partial(kk.int8_linear, input_scale=scale, input_zero_point=zero_point)
        ours = (x, packed, weight_scale, bias)
        contenders = [
            Contender("kdq int8_linear", partial(kk.int8_linear, *ours), "ours", 0.02),
            Contender("kdq int8_linear, static", partial(static, *ours), "ours", 0.03),
            *float_linears(x, w, bias, target),
            *int8_linears(x, w, bias, target),
        ]
        limits = [int8_products(2.0 * m * n * k), reading(n * k + x.nbytes)]
        reference = x.double() @ w.double().t() + bias
        yield Case("int8_linear", shapes.name((m, n, k)), limits, reference, contenders)
