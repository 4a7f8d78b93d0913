"""Contenders for the linear layer with int8 weights and float activations.

Its activations stay float, so its peers are those whose activations do too, and its limits are the float product and
reading the weights: it saves memory and, with few rows, time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.bench import shapes
from kdq.bench.case import Case, Contender
from kdq.bench.int8 import random_layer
from kdq.bench.limits import activation_products, reading
from kdq.bench.peers import float_linears, torchao_linear
from kdq.bench.target import Target


def weight_only_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out."""
    generator = target.generator(9)
    for m, n, k in shapes.products(target, shapes.WEIGHT_ONLY):
        x, w, bias, scale, q = random_layer(m, n, k, generator, target)
        ours = partial(kk.int8_weight_only_linear, x, kk.pack_int8_weight(q), scale, bias)
        contenders = [
            Contender("kdq int8_weight_only_linear", ours, "ours", 0.02),
            *float_linears(x, w, bias, target),
            *int8pack_linear(x, q, scale, bias, target),
        ]
        if importlib.util.find_spec("torchao") and not target.quick:
            run = torchao_linear("Int8WeightOnlyConfig", x, w, bias)
            contenders.append(Contender("torchao int8 weight only, compiled", run, "peer", 0.02))
        limits = [activation_products(2.0 * m * n * k, target), reading(n * k + x.nbytes)]
        reference = x.double() @ w.double().t() + bias
        yield Case("int8_weight_only_linear", shapes.name((m, n, k)), limits, reference, contenders)


def int8pack_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor, target: Target) -> list[Contender]:
    """torch's operator for this layer, in bfloat16, for which it is made. It has no bias: that is added.

    Only for whole blocks: on a CPU it reads beyond its arguments with others, and may crash.
    """
    n, k = q.shape
    if n % 4 or k % 16 or not target.has_operator("_weight_int8pack_mm"):
        return []
    x, scale, bias = x.bfloat16(), scale.bfloat16(), bias.bfloat16()
    return [
        Contender("torch _weight_int8pack_mm", lambda: torch._weight_int8pack_mm(x, q, scale).add_(bias), "peer", 0.03)
    ]
