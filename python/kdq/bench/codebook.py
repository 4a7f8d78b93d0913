"""Contenders for the linear layer whose weights are indices of a few centroids.

No library at hand computes from such weights, so its peers are the same layer with its weights decoded beforehand, in
floating point; our int8 weight-only layer, of another precision, stands beside it. As there, activations stay float: it
saves memory and, with few rows, time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kdq_kernels as kk
from kdq.bench import shapes
from kdq.bench.case import Case, Contender
from kdq.bench.limits import float_products, reading
from kdq.bench.peers import float_linears
from kdq.bench.target import Target

BITS = (2, 3, 4, 5)  # the look-ups differ


def codebook_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out."""
    generator = target.generator(10)
    for m, n, k in shapes.products(target, shapes.WEIGHT_ONLY):
        x = torch.randn(m, k, generator=generator, device=target.device).to(target.activations)
        bias = torch.randn(n, generator=generator, device=target.device)
        for bits in BITS if m == 1 else (4,):
            indices = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator, device=target.device)
            codebook = torch.randn(2**bits, generator=generator, device=target.device)
            w = codebook[indices.int()]
            ours = partial(kk.codebook_linear, x, kk.pack_indices(indices, bits), codebook, n, bias)
            scale = w.abs().amax(1) / 127
            packed = kk.pack_int8_weight(torch.round(w / scale[:, None]).to(torch.int8))
            int8 = partial(kk.int8_weight_only_linear, x, packed, scale, bias)
            contenders = [
                Contender("kdq codebook_linear", ours, "ours", target.rounding),
                Contender("kdq int8_weight_only_linear", int8, "context", 0.02),
                *float_linears(x, w, bias, target, rounded="context"),
            ]
            limits = [float_products(2.0 * m * n * k, x.dtype), reading(n * k * bits / 8 + x.nbytes)]
            reference = x.double() @ w.double().t() + bias
            yield Case("codebook_linear", f"{shapes.name((m, n, k))}, {bits} bits", limits, reference, contenders)
