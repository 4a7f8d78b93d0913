"""OpenVINO's layers, float32 and int8: peers where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdq.bench.case import Contender
from kdq.bench.torch_quantized import unsigned_grid


def installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


def float32_linear(x: Tensor, w: Tensor, bias: Tensor) -> list[Contender]:
    if not installed():
        return []
    from openvino import opset13 as ops

    return [Contender("OpenVINO float32", compiled(x, ops.constant(w.numpy()), bias, group=0), "peer", 1e-5)]


def dynamic_linear(x: Tensor, w: Tensor, bias: Tensor) -> list[Contender]:
    """int8 weights with a scale a channel; activations quantized inside, with a scale for each group of a row.

    Without whole groups in a row it computes in float32, so the group is the largest that is fast and divides K, or a
    small one.
    """
    if not installed():
        return []
    import numpy
    from openvino import opset13 as ops

    scale = w.abs().amax(1, keepdim=True) / 127
    q = torch.round(w / scale).to(torch.int8)
    weights = ops.multiply(ops.convert(ops.constant(q.numpy()), numpy.float32), ops.constant(scale.numpy()))
    group = 256 if w.shape[1] % 256 == 0 else 64
    return [Contender("OpenVINO int8", compiled(x, weights, bias, group), "peer", 0.02)]


def four_bit_linear(x: Tensor, q: Tensor, scale: Tensor) -> list[Contender]:
    """Weights decompressed inside, with a scale a channel; activations quantized inside, in groups, if whole."""
    if not installed():
        return []
    import numpy
    import openvino
    from openvino import opset13 as ops

    n, k = q.shape
    if k % 2:
        return []
    values = q.to(torch.uint8) + 8 & 15
    pairs = openvino.Tensor((values[:, ::2] | values[:, 1::2] << 4).numpy(), [n, k], openvino.Type.u4)
    half = numpy.float16
    zero = ops.convert(ops.constant(numpy.full((n, 1), 8, numpy.uint8)), half)
    shifted = ops.subtract(ops.convert(ops.constant(pairs), half), zero)
    weights = ops.convert(ops.multiply(shifted, ops.constant(scale.view(n, 1).half().numpy())), numpy.float32)
    run = compiled(x, weights, torch.zeros(n), group=128 if k % 128 == 0 else 32)
    return [Contender("OpenVINO 4 bits", run, "peer", 0.03)]


def conv2d(x: Tensor, w: Tensor, bias: Tensor, stride: int, padding: int) -> list[Contender]:
    """float32, and int8 on fixed grids, as its quantizer writes models: FakeQuantize before a convolution. Results stay
    float."""
    if not installed():
        return []
    import numpy
    from openvino import opset13 as ops

    def layer(int8: bool) -> Callable[[], Tensor]:
        parameter = ops.parameter(list(x.shape), numpy.float32)
        inputs, weights = parameter, ops.constant(w.numpy())
        if int8:
            scale, zero = unsigned_grid(x, 255)
            ends = [numpy.float32(v) for v in (-zero * scale, (255 - zero) * scale)]
            inputs = ops.fake_quantize(parameter, *ends, *ends, 256)
            bound = w.abs().flatten(1).amax(1).view(-1, 1, 1, 1).numpy()
            weights = ops.fake_quantize(weights, -bound, bound, -bound, bound, 255)
        y = ops.convolution(inputs, weights, [stride] * 2, [padding] * 2, [padding] * 2, [1, 1])
        return inference(ops.add(y, ops.constant(bias.view(1, -1, 1, 1).numpy())), parameter, x, group=0)

    return [
        Contender("OpenVINO float32", layer(False), "peer", 1e-5),
        Contender("OpenVINO int8, static", layer(True), "peer", 0.03),
    ]


def attention(x: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[Contender]:
    """Keys and values are constants, which it may keep in any order: here head by head."""
    if not installed():
        return []
    import numpy
    from openvino import opset13 as ops

    parameter = ops.parameter(list(x.shape), numpy.float32)
    heads = ops.reshape(parameter, [len(x), -1, k.shape[1], k.shape[3]], False)
    operands = [ops.constant(t.contiguous().numpy()) for t in (k, v)]
    y = ops.scaled_dot_product_attention(ops.transpose(heads, [0, 2, 1, 3]), *operands, causal=causal)
    joined = ops.reshape(ops.transpose(y, [0, 2, 1, 3]), list(x.shape), False)
    return [Contender("OpenVINO float32", inference(joined, parameter, x, group=0), "peer", 1e-5)]


def compiled(x: Tensor, weights: Any, bias: Tensor, group: int) -> Callable[[], Tensor]:
    """`x @ weights.T + bias`; group 0: activations stay float32."""
    import numpy
    from openvino import opset13 as ops

    parameter = ops.parameter(list(x.shape), numpy.float32)
    y = ops.add(ops.matmul(parameter, weights, False, True), ops.constant(bias.numpy()))
    return inference(y, parameter, x, group)


def inference(y: Any, parameter: Any, x: Tensor, group: int) -> Callable[[], Tensor]:
    """A graph from the parameter x to y on torch's number of threads."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # not bfloat16 in secret
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }
    model = openvino.Core().compile_model(openvino.Model([y], [parameter], "layer"), "CPU", settings)
    request = model.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    output = torch.from_numpy(request.get_output_tensor().data)  # the memory that infer() writes

    def run(read: Tensor = x) -> Tensor:  # the memory that infer() reads has to stay
        request.infer()
        return output

    return run
