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
from kdq.chain import chain_layers_
from kdq.configs import Int8Dynamic, Int8Static
from kdq.quantize import quantize_
from kdq_kernels import scaled_dot_product_attention

TOLERANCE = 0.2  # of the output of a whole model; what each contender really has is in the table


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer whose four projections are plain nn.Linear, as in most people's models.

    Two of them are in an nn.Sequential with their GELU, so `quantize_` lets the first one's kernel compute it. Which
    function computes attention is, as in most libraries, an attribute.
    """

    attention: Callable[..., Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = self.attention(qkv[0], qkv[1], qkv[2])
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


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016), their batch norms folded into them."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, outputs, 3, stride, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1)
        )
        changes = stride > 1 or channels != outputs
        self.shortcut = nn.Conv2d(channels, outputs, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    blocks: list[nn.Module] = []
    for channels, outputs, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        blocks += [BasicBlock(channels, outputs, stride), BasicBlock(outputs, outputs, 1)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    model: Any = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    last: nn.Module = model.to(memory_format=torch.channels_last)
    return last


def operations(model: nn.Module, x: Tensor) -> float:
    """Multiplications and additions in the linear layers and convolutions: the least that any contender does."""
    total = 0.0

    def add(module: Any, _: Any, y: Tensor) -> None:
        nonlocal total
        results = y.numel() // module.weight.shape[0]  # of each output channel
        total += 2.0 * module.weight.numel() * results

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return total


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
    images = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)
    yield model_case("resnet-18, batch 1 x 224 x 224", resnet18(), images, target)


@torch.inference_mode(False)
def model_case(shape: str, model: nn.Module, x: Tensor, target: Target) -> Case:
    """Quantized on the CPU, then moved."""
    model = model.eval().requires_grad_(False)
    dynamic, static = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(dynamic, Int8Dynamic())
    quantize_(static, Int8Static(), calibration=[x])
    elsewhere = copy.deepcopy(dynamic)
    has_attention = use_own_attention(dynamic) and use_own_attention(static)
    models = dynamic, static, elsewhere, copy.deepcopy(dynamic), copy.deepcopy(model)
    dynamic, static, elsewhere, chained, model = (m.to(target.device) for m in models)
    x = x.to(target.device)
    reference = copy.deepcopy(model).double()(x.double())
    contenders = [
        Contender("kdq Int8Dynamic", partial(dynamic, x), "ours", TOLERANCE),
        Contender("kdq Int8Static", partial(static, x), "ours", TOLERANCE),
        Contender("torch float32", partial(model, x), "peer", 1e-4),
    ]
    if chain_layers_(chained).changed:
        contenders.append(Contender("kdq Int8Dynamic, chained", partial(chained, x), "ours", TOLERANCE))
    if has_attention:
        contenders.append(Contender("kdq Int8Dynamic, torch's attention", partial(elsewhere, x), "context", TOLERANCE))
    if not target.quick:
        contenders += list(peer_models(model, x, target))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    limits = [int8_products(operations(model, x)), reading(weights)]
    return Case("model", shape, limits, reference, contenders)


def use_own_attention(model: nn.Module) -> bool:
    """Whether there is any attention that can be computed by kdq's kernel; it then is."""
    layers = [module for module in model.modules() if isinstance(module, EncoderLayer)]
    for layer in layers:
        layer.attention = scaled_dot_product_attention
    return bool(layers)


def peer_models(model: nn.Module, x: Tensor, target: Target) -> Iterator[Contender]:
    half, half_x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    yield Contender("torch bfloat16", partial(half, half_x), "peer", TOLERANCE)
    linear = not any(isinstance(module, nn.Conv2d) for module in model.modules())  # others leave convolutions
    if target.gpu:
        yield Contender("torch bfloat16, compiled", partial(compiled(copy.deepcopy(half)), half_x), "peer", TOLERANCE)
    elif linear:
        yield Contender("torch quantize_dynamic", partial(torch_dynamic(model), x), "peer", TOLERANCE)
    if linear and importlib.util.find_spec("torchao"):
        yield Contender("torchao int8, compiled", partial(torchao_dynamic(model), x), "peer", TOLERANCE)
    if not target.gpu and all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        yield from onnxruntime_models(model, x.contiguous(), linear)


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


def onnxruntime_models(model: nn.Module, x: Tensor, linear: bool) -> Iterator[Contender]:
    """Exported, then quantized with scales a channel; 7-bit weights on CPUs without VNNI, as its documentation
    advises. Dynamically where all layers are linear, else statically, as its dynamic convolutions are slow."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
        proto = onnx.load_model(path)
        proto.graph.ClearField("value_info")
        logging.getLogger().setLevel(logging.ERROR)  # it advises preprocessing, which the exporter has done
        how: dict[str, Any] = {"per_channel": True, "reduce_range": not torch.cpu._is_vnni_supported()}
        if linear:
            quantize_dynamic(proto, path, weight_type=QuantType.QInt8, **how)
            yield Contender("ONNX Runtime dynamic", session(path, x), "peer", TOLERANCE)
            return
        yield Contender("ONNX Runtime float32", session(path, x), "peer", 1e-4)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(proto, path, Batches(proto, x), quant_format=QuantFormat.QDQ, **types, **how)
        yield Contender("ONNX Runtime static", session(path, x), "peer", TOLERANCE)


class Batches:
    """What ONNX Runtime calibrates with: x, once."""

    def __init__(self, proto: Any, x: Tensor) -> None:
        self.left = [{proto.graph.input[0].name: x.numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def session(path: Path, x: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    made: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = made.get_inputs()[0].name
    return lambda: torch.from_numpy(made.run(None, {name: x.numpy()})[0])
