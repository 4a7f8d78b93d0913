"""Whole models, quantized by one call, against what other tools make of them: speed beside the error of the output.

Peers that quantize activations per tensor (torch's dynamic quantization, ONNX Runtime) do less work than a scale a row
asks for, and are less accurate: read the ratio together with the `error` column. Weights are random, so the error says
what the arithmetic loses, not what a trained model's accuracy loses.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.bench.case import Case, Contender
from kdq.bench.compiled import compiled
from kdq.bench.limits import int8_products, reading
from kdq.bench.target import Target
from kdq.configs import Int8Dynamic
from kdq.quantize import quantize_

TOLERANCE = 0.2  # of the output of a whole model; what each contender really has is in the table


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer whose four projections are plain nn.Linear, as in most people's models.

    Two of them are in an nn.Sequential with their GELU, so `quantize_` lets the first one's kernel compute it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        y: Tensor = x + self.feed_forward(self.norm2(x))
        return y


def encoder(layers: int, width: int, heads: int) -> nn.Module:
    return nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def linear_operations(model: nn.Module, rows: int) -> float:
    """Multiplications and additions in the linear layers: the least that any contender does."""
    return 2.0 * rows * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def model_cases(target: Target) -> Iterator[Case]:
    """float32 in, float32 out."""
    torch.manual_seed(7)
    if target.quick:
        yield model_case("mlp 32-64-8, batch 4", mlp(32, 64, 8), torch.randn(4, 32), target)
        return
    wide = mlp(512, 2048, 2048, 512)
    for batch in (1, 64):
        yield model_case(f"mlp 512-2048-2048-512, batch {batch}", wide, torch.randn(batch, 512), target)
    deep = encoder(6, 384, 6)
    for batch in (1, 16):
        name = f"encoder of 6 layers, 384 wide, batch {batch} x 128"
        yield model_case(name, deep, torch.randn(batch, 128, 384), target)


@torch.inference_mode(False)
def model_case(shape: str, model: nn.Module, x: Tensor, target: Target) -> Case:
    """Quantized on the CPU, then moved."""
    model = model.eval().requires_grad_(False)
    ours = copy.deepcopy(model)
    quantize_(ours, Int8Dynamic())
    ours, model, x = ours.to(target.device), copy.deepcopy(model).to(target.device), x.to(target.device)
    reference = copy.deepcopy(model).double()(x.double())
    contenders = [
        Contender("kdq Int8Dynamic", partial(ours, x), "ours", TOLERANCE),
        Contender("torch float32", partial(model, x), "peer", 1e-4),
    ]
    if not target.quick:
        contenders += list(peer_models(model, x, target))
    weights = linear_operations(model, 1) / 2
    limits = [int8_products(linear_operations(model, x.numel() // x.shape[-1])), reading(weights)]
    return Case("model", shape, limits, reference, contenders)


def peer_models(model: nn.Module, x: Tensor, target: Target) -> Iterator[Contender]:
    half, half_x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    yield Contender("torch bfloat16", partial(half, half_x), "peer", TOLERANCE)
    if target.gpu:
        yield Contender("torch bfloat16, compiled", partial(compiled(copy.deepcopy(half)), half_x), "peer", TOLERANCE)
    else:
        yield Contender("torch quantize_dynamic", partial(torch_dynamic(model), x), "peer", TOLERANCE)
    if importlib.util.find_spec("torchao"):
        yield Contender("torchao int8, compiled", partial(torchao_dynamic(model), x), "peer", TOLERANCE)
    if not target.gpu and all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        yield Contender("ONNX Runtime dynamic", onnxruntime_dynamic(model, x), "peer", TOLERANCE)


def torch_dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces its deprecation
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    return quantized


def torchao_dynamic(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """As its documentation asks for: quantized, then compiled. It quantizes activations per row, as kdq does."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    quantized = copy.deepcopy(model)
    torchao_quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return compiled(quantized)


def onnxruntime_dynamic(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Exported, then `quantize_dynamic` with scales a channel; 7-bit weights on CPUs without VNNI, as its
    documentation advises."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
        proto = onnx.load_model(path)
        proto.graph.ClearField("value_info")
        logging.getLogger().setLevel(logging.ERROR)  # it advises preprocessing, which the exporter has done
        reduce_range = not torch.cpu._is_vnni_supported()
        quantize_dynamic(proto, path, per_channel=True, reduce_range=reduce_range, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
