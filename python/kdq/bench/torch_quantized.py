"""torch's own dynamically quantized linear layer, on each backend that this torch has."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor

from kdq.bench.case import Contender

ENGINES = ("fbgemm", "x86", "onednn")


def torch_quantized_linears(x: Tensor, w: Tensor, bias: Tensor) -> list[Contender]:
    """One contender an engine: int8 weights per channel, activations quantized per tensor inside the call.

    `reduce_range` keeps activations to 7 bits on CPUs without VNNI, where these backends' 8-bit products would
    saturate; torch's documentation asks for it there.
    """
    vnni = torch.cpu._is_vnni_supported()
    contenders = []
    before = torch.backends.quantized.engine
    try:
        for engine in ENGINES:
            if engine not in torch.backends.quantized.supported_engines:
                continue
            torch.backends.quantized.engine = engine
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch announces the deprecation of its quantized tensors
                scales = (w.abs().amax(1) / 127).double()
                zeros = torch.zeros(len(w), dtype=torch.int64)
                q = torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8)
                packed = torch.ops.quantized.linear_prepack(q, bias)
            run = partial(torch.ops.quantized.linear_dynamic, x, packed, not vnni)
            contenders.append(Contender(f"torch quantized {engine}", run, "peer", 0.05))
    finally:
        torch.backends.quantized.engine = before
    return contenders
