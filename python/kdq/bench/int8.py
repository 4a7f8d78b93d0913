"""Contenders for the int8 kernels: exact matmul, and the float-in, float-out linear layer, its activations quantized
dynamically, statically, or not at all.

Peers quantize activations per tensor (torch's quantized linear, ONNX Runtime), ours per row: the `error` column shows
what that costs in accuracy against the float32 product.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from kdq.bench.case import Case, Contender
from kdq.bench.torch_quantized import torch_quantized_linears
from kdq.grids import affine_grid

Shape = tuple[int, int, int]
SHAPES: list[Shape] = [  # M, N, K
    (1, 64, 64),
    (1, 1000, 2048),
    (1, 4096, 4096),
    (8, 4096, 4096),
    (16, 768, 768),
    (37, 129, 257),
    (100, 300, 500),
    (128, 768, 768),
    (128, 3072, 768),
    (128, 768, 3072),
    (512, 512, 512),
    (1024, 1024, 1024),
]
QUICK_SHAPES: list[Shape] = [(16, 64, 64)]


def random_int8(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def int8_matmul_cases(quick: bool) -> Iterator[Case]:
    """s8 x s8 -> s32, weights packed ahead."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in QUICK_SHAPES if quick else SHAPES:
        a, b = random_int8(generator, m, k), random_int8(generator, n, k)
        packed = kk.pack_int8_weight(b)
        transposed = b.t()
        float_a, float_b = a.float(), b.float()
        bf16_a, bf16_b = a.bfloat16(), b.bfloat16()
        contenders = [
            Contender("kdq int8_matmul", partial(kk.int8_matmul, a, packed), "ours"),
            Contender("torch float32", partial(F.linear, float_a, float_b), "context", 1e-5),
            Contender("torch bfloat16", partial(F.linear, bf16_a, bf16_b), "context", 1e-2),
        ]
        if m > 16:  # torch._int_mm wants more than 16 rows
            contenders.append(Contender("torch _int_mm", partial(torch._int_mm, a, transposed)))
        reference = (a.double() @ b.double().t()).to(torch.int32)
        yield Case("int8_matmul", f"{m}x{n}x{k}", 2.0 * m * n * k, "int8_gops", reference, contenders)


def int_mm_linear(x: Tensor, transposed: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The same layer from torch's own ops: per-row quantization, `_int_mm`, scaling."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    q = torch.round(x / scale).to(torch.int8)
    return torch._int_mm(q, transposed).float() * scale * weight_scale + bias


def int8_linear_cases(quick: bool) -> Iterator[Case]:
    """float32 -> float32 with dynamic activation quantization inside."""
    generator = torch.Generator().manual_seed(1)
    for m, n, k in QUICK_SHAPES if quick else SHAPES:
        x = torch.randn(m, k, generator=generator)
        w = torch.randn(n, k, generator=generator)
        bias = torch.randn(n, generator=generator)
        weight_scale = w.abs().amax(1) / 127
        q = torch.round(w / weight_scale[:, None]).to(torch.int8)
        packed = kk.pack_int8_weight(q)
        grid = affine_grid(float(x.min()), float(x.max()), 8)
        static = partial(kk.int8_linear, input_scale=grid.scale, input_zero_point=grid.zero_point)
        bf16 = x.bfloat16(), w.bfloat16(), bias.bfloat16()
        contenders = [
            Contender(
                "kdq int8_linear",
                partial(kk.int8_linear, x, packed, weight_scale, bias),
                "ours",
                0.02,
            ),
            Contender(
                "kdq int8_linear, static",
                partial(static, x, packed, weight_scale, bias),
                "ours",
                0.03,
            ),
            Contender(
                "kdq int8_weight_only_linear",
                partial(kk.int8_weight_only_linear, x, packed, weight_scale, bias),
                "ours",
                0.02,
            ),
            Contender("torch float32", partial(F.linear, x, w, bias), "peer", 1e-5),
            Contender("torch bfloat16", partial(F.linear, *bf16), "peer", 1e-2),
            *torch_quantized_linears(x, w, bias),
        ]
        if m > 16:
            contenders.append(
                Contender(
                    "torch _int_mm + scaling",
                    partial(int_mm_linear, x, q.t(), weight_scale, bias),
                    "peer",
                    0.02,
                )
            )
        if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
            run = onnxruntime_linear(w, bias)
            contenders.append(Contender("ONNX Runtime int8", partial(run, x), "peer", 0.05))
        reference = x.double() @ w.double().t() + bias
        yield Case("int8_linear", f"{m}x{n}x{k}", 2.0 * m * n * k, "int8_gops", reference, contenders)


def onnxruntime_linear(w: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime's dynamic int8 linear layer: DynamicQuantizeLinear, MatMulInteger, scaling (which it fuses).

    On CPUs without VNNI its 8-bit products saturate, so the weights get 7 bits there, as its documentation advises.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n, k = w.shape
    weight_scale = w.abs().amax(1) / (127 if torch.cpu._is_vnni_supported() else 63)
    q = torch.round(w / weight_scale[:, None]).to(torch.int8)
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"]),
            node("MatMulInteger", ["xq", "w", "x_zero", "w_zero"], ["acc"]),
            node("Cast", ["acc"], ["acc_float"], to=TensorProto.FLOAT),
            node("Mul", ["x_scale", "w_scale"], ["scale"]),
            node("Mul", ["acc_float", "scale"], ["scaled"]),
            node("Add", ["scaled", "bias"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [
            numpy_helper.from_array(q.t().contiguous().numpy(), "w"),
            numpy_helper.from_array(torch.zeros(n, dtype=torch.int8).numpy(), "w_zero"),
            numpy_helper.from_array(weight_scale.numpy(), "w_scale"),
            numpy_helper.from_array(bias.numpy(), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
