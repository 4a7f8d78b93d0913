"""Contenders for the linear layer with int8 weights and float activations.

Its activations stay float, so its peers are those whose activations do too, and its limits are the float32 product and
reading the weights: it saves memory and, with few rows, time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.bench import shapes
from kdq.bench.case import Case, Contender
from kdq.bench.compiled import compiled
from kdq.bench.int8 import random_layer
from kdq.bench.limits import float32_products, reading
from kdq.bench.peers import float_linears


def weight_only_cases(quick: bool) -> Iterator[Case]:
    """float32 -> float32."""
    generator = torch.Generator().manual_seed(9)
    for m, n, k in shapes.QUICK if quick else shapes.WEIGHT_ONLY:
        x, w, bias, scale, q = random_layer(m, n, k, generator)
        ours = partial(kk.int8_weight_only_linear, x, kk.pack_int8_weight(q), scale, bias)
        contenders = [
            Contender("kdq int8_weight_only_linear", ours, "ours", 0.02),
            *float_linears(x, w, bias),
            *int8pack_linear(x, q, scale, bias),
        ]
        if importlib.util.find_spec("torchao") and not quick:
            contenders.append(Contender("torchao int8 weight only, compiled", torchao(x, w, bias), "peer", 0.02))
        limits = [float32_products(2.0 * m * n * k), reading(n * k + 4 * m * k)]
        reference = x.double() @ w.double().t() + bias
        yield Case("int8_weight_only_linear", shapes.name((m, n, k)), limits, reference, contenders)


def int8pack_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor) -> list[Contender]:
    """torch's operator for this layer, in bfloat16, for which it is made. It has no bias: that is added.

    Only for whole blocks: with others it reads beyond its arguments and may crash.
    """
    n, k = q.shape
    if n % 4 or k % 16:
        return []
    x, scale, bias = x.bfloat16(), scale.bfloat16(), bias.bfloat16()
    return [
        Contender("torch _weight_int8pack_mm", lambda: torch._weight_int8pack_mm(x, q, scale).add_(bias), "peer", 0.03)
    ]


@torch.inference_mode(False)
def torchao(x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """As its documentation asks for: quantized, then compiled."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(w.shape[1], len(w))
    layer.weight, layer.bias = nn.Parameter(w.clone(), False), nn.Parameter(bias.clone(), False)
    model = nn.Sequential(layer)
    quantize_(model, Int8WeightOnlyConfig())
    return partial(compiled(model), x.clone())
