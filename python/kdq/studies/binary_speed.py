"""How fast the paper's binary MLP runs when its hidden layers pass bits, against the same net in other precisions."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.bench.binary import random_signs
from kdq.bench.case import relative_error
from kdq.bench.table import format_time, markdown_table
from kdq.configs import Binary, Int8Dynamic, LowBit
from kdq.fold_binary import fold_binary_chain_
from kdq.ptq import fold_batch_norm_
from kdq.quantize import quantize_
from kdq.reporting import Latency, interleaved_latency

WIDTHS = [784, 4096, 4096, 4096, 10]
BATCHES = (1, 16, 128)
PRODUCT = 1024
TOLERANCE = {"bfloat16": 0.05, "int8": 0.05}  # of a net's results, relative to float32's


def mlp(widths: list[int]) -> nn.Sequential:
    """The paper's: linear layers, batch norm behind each, Hardtanh between. Random weights, statistics as measured."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.Hardtanh()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        model.train()(torch.randn(64, widths[0]))
    return model.eval()


def binary(model: nn.Sequential, x: Tensor, first: LowBit | None = None) -> nn.Sequential:
    """first: of the first layer; None: Binary as well."""
    made = copy.deepcopy(model)
    quantize_(made, {"0": first or Binary(), "*": Binary()}, calibration=[x])
    return made


def nets(model: nn.Sequential, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The net in each precision on x, each result checked."""
    in_float = copy.deepcopy(model)
    fold_batch_norm_(in_float)  # as one would deploy it
    int8 = copy.deepcopy(in_float)
    quantize_(int8, Int8Dynamic())
    unfolded, folded = binary(model, x), binary(model, x)
    fold_binary_chain_(folded)
    first8 = LowBit(weight_bits=1, act_bits=8)
    unfolded8, folded8 = binary(model, x, first8), binary(model, x, first8)
    fold_binary_chain_(folded8)
    expected = in_float(x)
    found: dict[str, Callable[[], Tensor]] = {
        "float32": partial(in_float, x),
        "bfloat16": partial(copy.deepcopy(in_float).bfloat16(), x.bfloat16()),
        "int8": partial(int8, x),
        "1 bit": partial(unfolded, x),
        "1 bit, folded to bits": partial(folded, x),
        "1 bit, folded, first layer on 8 bits": partial(folded8, x),
    }
    for name, tolerance in TOLERANCE.items():
        if (error := relative_error(found[name]().float(), expected)) > tolerance:
            raise RuntimeError(f"{name}: relative error {error:.3g}, accepted {tolerance:g}; it is not timed")
    for ours, theirs in ((folded, unfolded), (folded8, unfolded8)):
        if not torch.equal(ours(x), theirs(x)):
            raise RuntimeError("the folded net puts out something else than the net did; it is not timed")
    return found


def products(size: int) -> dict[str, Callable[[], Tensor]]:
    """One square product of signs, checked."""
    generator = torch.Generator().manual_seed(0)
    a, b = random_signs(size, size, generator), random_signs(size, size, generator)
    found: dict[str, Callable[[], Tensor]] = {
        "float32": partial(F.linear, a, b),
        "bfloat16": partial(F.linear, a.bfloat16(), b.bfloat16()),
        "int8": partial(kk.int8_matmul, a.to(torch.int8), kk.pack_int8_weight(b.to(torch.int8))),
        "1 bit": partial(kk.binary_matmul, kk.pack_signs(a), kk.pack_signs(b), size),
    }
    for name, call in found.items():
        if relative_error(call().float(), found["float32"]()) > (0.01 if name == "bfloat16" else 0):
            raise RuntimeError(f"{name}: its product is wrong; it is not timed")
    return found


def rows(case: str, times: dict[str, Latency]) -> list[tuple[str, ...]]:
    base = times["float32"].median
    return [
        (
            case,
            name,
            format_time(t.median),
            f"{format_time(t.fastest)} - {format_time(t.slowest)}",
            f"{base / t.median:.2f}x",
        )
        for name, t in times.items()
    ]


@torch.inference_mode()
def speed_section(quick: bool) -> str:
    """Markdown: the whole net at several batches, and the product alone."""
    torch.manual_seed(0)
    widths = [64, 128, 128, 10] if quick else WIDTHS
    model = mlp(widths)
    table: list[tuple[str, ...]] = []
    for batch in BATCHES[:2] if quick else BATCHES:
        calls = nets(model, torch.randn(batch, widths[0]))
        times = interleaved_latency(list(calls.values()))
        table += rows(f"whole net, batch {batch}", dict(zip(calls, times, strict=True)))
    size = 64 if quick else PRODUCT
    calls = products(size)
    table += rows(
        f"product {size}x{size}x{size}",
        dict(zip(calls, interleaved_latency(list(calls.values())), strict=True)),
    )
    lines = [
        "## Speed of the binary MLP",
        "",
        f"{'-'.join(map(str, widths))} with random weights on one thread, medians of interleaved rounds. *float32* and "
        "*bfloat16* are torch's, their batch norms folded into the layers, as those of *int8* (`Int8Dynamic`); "
        "*1 bit* has binary layers with batch norm and Hardtanh in float32 between; *folded to bits* passes bits from "
        "layer to layer (`fold_binary_chain_`) and puts out the same, bit for bit. *first layer on 8 bits* is the "
        "paper's net, whose inputs are not binarized.",
        "",
        "The paper measures on a GPU (GTX 750): its MLP for MNIST is 7 times as fast with its xnor kernel as with its "
        "own unoptimized float32 kernel; the kernel alone is 23 times as fast as that one in a product 8192x8192x8192, "
        "and 3.4 times as fast as cuBLAS. The rivals here are optimized libraries on a CPU.",
        "",
        *markdown_table(("case", "precision", "time", "fastest - slowest", "against float32"), table, text_columns=2),
    ]
    return "\n".join(lines) + "\n"
