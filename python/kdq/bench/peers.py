"""Who else computes a linear layer: `y = x @ w.T + bias` in float32, bfloat16 and int8, from float32 x, w and bias.

torch's own float32 is far from the machine's limit on some CPUs, so ONNX Runtime and OpenVINO stand beside it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq.bench import onnxruntime_linear, openvino_linear
from kdq.bench.case import Contender
from kdq.bench.torch_quantized import torch_quantized_linears


def float_linears(x: Tensor, w: Tensor, bias: Tensor) -> list[Contender]:
    bf16 = x.bfloat16(), w.bfloat16(), bias.bfloat16()
    return [
        Contender("torch float32", partial(F.linear, x, w, bias), "peer", 1e-5),
        Contender("torch bfloat16", partial(F.linear, *bf16), "peer", 1e-2),
        *onnxruntime_linear.float32_linear(x, w, bias),
        *openvino_linear.float32_linear(x, w, bias),
    ]


def int8_linears(x: Tensor, w: Tensor, bias: Tensor) -> list[Contender]:
    """int8 weights and activations, the latter quantized inside the call."""
    contenders = torch_quantized_linears(x, w, bias)
    if len(x) > 16:  # torch._int_mm wants more than 16 rows
        contenders.append(int_mm_linear(x, w, bias))
    return contenders + onnxruntime_linear.dynamic_linear(x, w, bias) + openvino_linear.dynamic_linear(x, w, bias)


def int_mm_linear(x: Tensor, w: Tensor, bias: Tensor) -> Contender:
    """The layer from torch's own ops: a scale a row as here, `_int_mm`, scaling."""
    weight_scale = w.abs().amax(1) / 127
    transposed = torch.round(w / weight_scale[:, None]).to(torch.int8).t()

    def run() -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        q = torch.round(x / scale).to(torch.int8)
        return torch._int_mm(q, transposed).float() * scale * weight_scale + bias

    return Contender("torch _int_mm + scaling", run, "peer", 0.02)
