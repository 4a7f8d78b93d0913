"""Contenders for the linear layer with int8 weights and float activations.

Its activations stay float, so its peers are those whose activations do too, of the same dtype: rounding float32 ones to
bfloat16 is another job, and contenders that do are only shown beside it. Its limits are the product in that dtype and
reading the weights: it saves memory and, with few rows, time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.bench import shapes
from kdq.bench.case import Case, Contender, Role
from kdq.bench.int8 import random_layer
from kdq.bench.limits import float_products, reading
from kdq.bench.peers import float_linears, torchao_linear
from kdq.bench.target import Target


def weight_only_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out: float32 on a CPU, and bfloat16."""
    generator = target.generator(9)
    for shape in shapes.products(target, shapes.WEIGHT_ONLY):
        layer = random_layer(*shape, generator, target)
        for dtype in dict.fromkeys([target.activations, torch.bfloat16]):
            name = shapes.name(shape) if dtype == target.activations else f"{shapes.name(shape)} bfloat16"
            yield weight_only_case(name, layer[0].to(dtype), *layer[1:], target)


def weight_only_case(name: str, x: Tensor, w: Tensor, bias: Tensor, scale: Tensor, q: Tensor, target: Target) -> Case:
    (n, k), m = w.shape, len(x)
    ours = partial(kk.int8_weight_only_linear, x, kk.pack_int8_weight(q), scale, bias)
    rounded: Role = "peer" if x.dtype == torch.bfloat16 else "context"
    contenders = [
        Contender("kdq int8_weight_only_linear", ours, "ours", 0.02),
        *float_linears(x, w, bias, target, rounded),
    ]
    packs = takes_int8pack(q, target)
    if packs:
        contenders.append(Contender("torch _weight_int8pack_mm", int8pack_linear(x, q, scale, bias), rounded, 0.03))
    if importlib.util.find_spec("torchao") and not target.quick and (packs or x.dtype == torch.float32):
        run = torchao_linear("Int8WeightOnlyConfig", x, w, bias)
        contenders.append(Contender("torchao int8 weight only, compiled", run, "peer", 0.02))
    limits = [float_products(2.0 * m * n * k, x.dtype), reading(n * k + x.nbytes)]
    reference = x.double() @ w.double().t() + bias
    return Case("int8_weight_only_linear", name, limits, reference, contenders)


def takes_int8pack(q: Tensor, target: Target) -> bool:
    """Whether torch's operator for this layer is there and takes this weight: on a CPU it reads beyond its arguments if
    they are not whole blocks, and may crash, also where torchao's layer is compiled to it, as it is in bfloat16."""
    n, k = q.shape
    return n % 4 == 0 and k % 16 == 0 and target.has_operator("_weight_int8pack_mm")


def int8pack_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """In bfloat16, for which it is made. It has no bias: that is added."""
    x, scale, bias = x.bfloat16(), scale.bfloat16(), bias.bfloat16()
    return lambda: torch._weight_int8pack_mm(x, q, scale).add_(bias)
