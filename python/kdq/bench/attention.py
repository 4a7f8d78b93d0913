"""Contenders for attention in float32: torch's, ONNX Runtime's and OpenVINO's.

Each gets queries as a projection leaves them, [batch, queries, heads x size], and gives its result so. Keys and values
are the same from call to call, of all heads side by side as well; of a single query head by head, as caches keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from kdq.bench import onnxruntime_linear, openvino_linear
from kdq.bench.case import Case, Contender
from kdq.bench.limits import float_products, reading
from kdq.bench.target import Target


class Heads(NamedTuple):
    batch: int
    heads: int
    queries: int
    keys: int
    size: int
    causal: bool

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads}x{self.queries}x{self.size}, {self.keys} keys"
        return f"{sizes}, causal" if self.causal else sizes


# An encoder at two batches, a vision transformer, two causal prompts, a token that is generated, and odd sizes.
SHAPES = [
    Heads(1, 6, 128, 128, 64, False),
    Heads(16, 6, 128, 128, 64, False),
    Heads(1, 12, 197, 197, 64, False),
    Heads(1, 12, 512, 512, 64, True),
    Heads(1, 8, 2048, 2048, 128, True),
    Heads(1, 32, 1, 1024, 128, False),
    Heads(1, 5, 37, 61, 40, False),
]
QUICK_SHAPES = [Heads(1, 2, 9, 9, 16, True)]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_cases(target: Target) -> Iterator[Case]:
    """float32, on a GPU bfloat16, where kdq calls torch's. Operations: of both products, of causal ones the half that
    counts."""
    generator = target.generator(9)
    for shape in QUICK_SHAPES if target.quick else SHAPES:
        width = shape.heads * shape.size
        lengths = (shape.queries, shape.keys, shape.keys)
        x, k, v = (
            torch.randn(shape.batch, n, width, generator=generator, device=target.device).to(target.activations)
            for n in lengths
        )
        k, v = split(k, shape), split(v, shape)
        if shape.queries == 1:
            k, v = k.contiguous(), v.contiguous()
        ours = partial(run, partial(kk.scaled_dot_product_attention, is_causal=shape.causal), shape)
        torchs = partial(run, partial(F.scaled_dot_product_attention, is_causal=shape.causal), shape)
        contenders = [
            Contender("kdq scaled_dot_product_attention", partial(ours, x, k, v), "ours", target.rounding),
            Contender(
                f"torch {str(x.dtype).removeprefix('torch.')}", partial(torchs, x, k, v), "peer", target.rounding
            ),
        ]
        if not target.quick and not target.gpu:
            contenders += onnxruntime_linear.attention(x, k, v, shape.causal)
            contenders += openvino_linear.attention(x, k, v, shape.causal)
        scores = shape.batch * shape.heads * shape.queries * shape.keys
        if shape.causal:
            scores = shape.batch * shape.heads * sum(min(i + 1, shape.keys) for i in range(shape.queries))
        limits = [float_products(4.0 * scores * shape.size, x.dtype), reading(k.nbytes + v.nbytes)]
        yield Case("attention", str(shape), limits, torchs(x.double(), k.double(), v.double()), contenders)


def split(x: Tensor, shape: Heads) -> Tensor:
    """A projection's heads: [batch, heads, rows, size]."""
    return x.view(shape.batch, -1, shape.heads, shape.size).transpose(1, 2)


def run(attend: Attend, shape: Heads, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """From a projection to what the next one reads."""
    return attend(split(x, shape), k, v).transpose(1, 2).flatten(2)
