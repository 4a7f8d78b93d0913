"""Who else computes a linear layer: `y = x @ w.T + bias` in floating point and int8, from x in the dtype of the
target's activations, float32 w and bias.

torch's own float32 is far from the machine's limit on some CPUs, so ONNX Runtime and OpenVINO stand beside it there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.bench import onnxruntime_linear, openvino_linear
from kdq.bench.case import Contender, Role
from kdq.bench.compiled import compiled
from kdq.bench.target import Target
from kdq.bench.torch_quantized import torch_quantized_linears

INT_MM_GROUP = 8  # N and K of torch._int_mm are multiples of this on a GPU


def float_linears(x: Tensor, w: Tensor, bias: Tensor, target: Target, rounded: Role = "peer") -> list[Contender]:
    """rounded: the role of those that round float32 x to bfloat16. They are peers of what rounds it more coarsely."""

    def linear(dtype: torch.dtype) -> Callable[[], Tensor]:
        return partial(F.linear, x.to(dtype), w.to(dtype), bias.to(dtype))

    role: Role = "peer" if x.dtype == torch.bfloat16 else rounded
    bf16 = Contender("torch bfloat16", linear(torch.bfloat16), role, 1e-2)
    if target.gpu:
        return [bf16, Contender("torch float16", linear(torch.float16), "peer", 1e-2)]
    if x.dtype == torch.bfloat16:
        return [bf16]
    return [
        Contender("torch float32", linear(torch.float32), "peer", 1e-5),
        bf16,
        *onnxruntime_linear.float32_linear(x, w, bias),
        *openvino_linear.float32_linear(x, w, bias),
    ]


def int8_linears(x: Tensor, w: Tensor, bias: Tensor, target: Target) -> list[Contender]:
    """int8 weights and activations, the latter quantized inside the call."""
    if target.gpu:
        return int8_linears_on_gpu(x, w, bias, target)
    contenders = torch_quantized_linears(x, w, bias)
    if len(x) > 16:  # torch._int_mm wants more than 16 rows
        contenders.append(Contender("torch _int_mm + scaling", int_mm_linear(x, w, bias, int_mm_layer), "peer", 0.02))
    return contenders + onnxruntime_linear.dynamic_linear(x, w, bias) + openvino_linear.dynamic_linear(x, w, bias)


def int8_linears_on_gpu(x: Tensor, w: Tensor, bias: Tensor, target: Target) -> list[Contender]:
    """Only where torch._int_mm takes x and w as they are: filling them up would be part of the call."""
    if len(x) <= 16 or len(w) % INT_MM_GROUP or w.shape[1] % INT_MM_GROUP:
        return []
    contenders = [Contender("torch _int_mm + scaling", int_mm_linear(x, w, bias, int_mm_layer), "peer", 0.02)]
    if not target.quick:
        run = int_mm_linear(x, w, bias, compiled(int_mm_layer))
        contenders.append(Contender("torch _int_mm + scaling, compiled", run, "peer", 0.02))
        if importlib.util.find_spec("torchao"):
            run = torchao_linear("Int8DynamicActivationInt8WeightConfig", x, w, bias)
            contenders.append(Contender("torchao int8, compiled", run, "peer", 0.02))
    return contenders


def int_mm_linear(x: Tensor, w: Tensor, bias: Tensor, layer: Callable[..., Tensor]) -> Callable[[], Tensor]:
    weight_scale = w.abs().amax(1) / 127
    transposed = torch.round(w / weight_scale[:, None]).to(torch.int8).t()
    return partial(layer, x, transposed, weight_scale, bias)


def int_mm_layer(x: Tensor, transposed: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The layer from torch's own ops: a scale a row as here, `_int_mm`, scaling."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    q = torch.round(wide / scale).to(torch.int8)
    return (torch._int_mm(q, transposed).float() * scale * weight_scale + bias).to(x.dtype)


@torch.inference_mode(False)
def torchao_linear(config: str, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """As its documentation asks for: quantized, then compiled. config: the name of its class."""
    from torchao import quantization

    layer = nn.Linear(w.shape[1], len(w), device="meta")
    layer.weight, layer.bias = (nn.Parameter(t.to(x.dtype, copy=True), False) for t in (w, bias))
    model = nn.Sequential(layer)
    quantization.quantize_(model, getattr(quantization, config)())
    return partial(compiled(model), x.clone())
