"""Contenders for linear layers with weights of one or two bits and activations of two to four on a static grid: by bit
planes and by int8 products.

x lies on its grid, so that all contenders compute from the same numbers. The peers are those of the few-bit layers,
which keep weights in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import kdq_kernels as kk
from kdq.bench import shapes
from kdq.bench.case import Case, Contender
from kdq.bench.limits import binary_products, reading
from kdq.bench.low_bit import peers
from kdq.bench.target import Target

BITS = [(1, 2), (1, 3), (1, 4), (2, 2)]  # of weights, of activations
STEP = 0.25


def bitplane_linear_cases(target: Target) -> Iterator[Case]:
    """Floats in, floats out, activations quantized inside. The limit counts a binary operation of each pair of
    planes."""
    generator = target.generator(17)
    for m, n, k in shapes.products(target, shapes.BIT_PLANES):
        scale = torch.rand(n, generator=generator, device=target.device) * 0.01 + 0.001
        for weight_bits, act_bits in BITS:
            integers = torch.randint(2**act_bits, (m, k), generator=generator, device=target.device)
            x = (integers * STEP).to(target.activations)
            form = "odd" if weight_bits == 1 else "signed"
            codes = torch.randint(2**weight_bits, (n, k), generator=generator, device=target.device)
            q = (2 * codes - 1 if form == "odd" else codes - 2 ** (weight_bits - 1)).to(torch.int8)
            grid: dict[str, Any] = {
                "input_scale": torch.tensor(STEP, device=target.device),
                "input_zero_point": torch.tensor(0, dtype=torch.int32, device=target.device),
                "input_quant_max": 2**act_bits - 1,
            }
            planes, sums = kk.pack_bitplanes(q, weight_bits, form), q.sum(1, dtype=torch.int32)
            ours = partial(kk.bitplane_linear, x, planes, sums, scale, weight_form=form, **grid)
            contenders = [
                Contender("kdq bitplane_linear", ours, "ours", 0.01),
                Contender(
                    "kdq int8_linear, 2 bits",
                    partial(kk.int8_linear, x, kk.pack_int8_weight(q, 2), scale, **grid),
                    "context",
                    0.01,
                ),
                *peers(x, q, scale, target),
            ]
            operations = 2.0 * m * n * k * weight_bits * act_bits
            limits = [binary_products(operations), reading(planes.nbytes + x.nbytes)]
            reference = x.double() @ (q * scale[:, None]).double().t()
            name = f"{shapes.name((m, n, k))}, {weight_bits} x {act_bits} bits"
            yield Case("bitplane_linear", name, limits, reference, contenders)
