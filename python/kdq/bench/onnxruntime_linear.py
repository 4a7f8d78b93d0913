"""ONNX Runtime's layers, float32 and int8: peers where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdq.bench.case import Contender
from kdq.bench.torch_quantized import unsigned_grid


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def float32_linear(x: Tensor, w: Tensor, bias: Tensor) -> list[Contender]:
    """A plain Gemm."""
    if not installed():
        return []
    from onnx import helper

    run = session_run([helper.make_node("Gemm", ["x", "w", "bias"], ["y"], transB=1)], x, {"w": w, "bias": bias})
    return [Contender("ONNX Runtime float32", run, "peer", 1e-5)]


def dynamic_linear(x: Tensor, w: Tensor, bias: Tensor) -> list[Contender]:
    """Dynamic int8: DynamicQuantizeLinear, MatMulInteger, scaling (which it fuses).

    On CPUs without VNNI its 8-bit products saturate, so the weights get 7 bits there, as its documentation advises.
    """
    if not installed():
        return []
    from onnx import TensorProto, helper

    node = helper.make_node
    weight_scale = w.abs().amax(1) / (127 if torch.cpu._is_vnni_supported() else 63)
    q = torch.round(w / weight_scale[:, None]).to(torch.int8)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"]),
        node("MatMulInteger", ["xq", "w", "x_zero", "w_zero"], ["acc"]),
        node("Cast", ["acc"], ["acc_float"], to=TensorProto.FLOAT),
        node("Mul", ["x_scale", "w_scale"], ["scale"]),
        node("Mul", ["acc_float", "scale"], ["scaled"]),
        node("Add", ["scaled", "bias"], ["y"]),
    ]
    zero = torch.zeros(len(w), dtype=torch.int8)
    constants = {"w": q.t().contiguous(), "w_zero": zero, "w_scale": weight_scale, "bias": bias}
    return [Contender("ONNX Runtime int8", session_run(nodes, x, constants), "peer", 0.05)]


def four_bit_linear(x: Tensor, q: Tensor, scale: Tensor) -> list[Contender]:
    """MatMulNBits with int8 products (accuracy level 4) and its largest group, which is the fastest."""
    if not installed():
        return []
    from onnx import helper

    n, k = q.shape
    group = 256
    blocks = -(-k // group)
    values = torch.nn.functional.pad(q.to(torch.uint8) + 8, (0, blocks * group - k)) & 15
    pairs = values.view(n, blocks, group)
    constants = {"w": pairs[..., ::2] | pairs[..., 1::2] << 4, "scale": scale[:, None].expand(n, blocks).reshape(-1)}
    settings: dict[str, Any] = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "scale"], ["y"], domain="com.microsoft", **settings)
    return [Contender("ONNX Runtime 4 bits", session_run([node], x, constants), "peer", 0.05)]


def conv2d(x: Tensor, w: Tensor, bias: Tensor, stride: int, padding: int) -> list[Contender]:
    """float32, and int8 on fixed grids: QuantizeLinear, QLinearConv, DequantizeLinear."""
    if not installed():
        return []
    from onnx import helper

    node = helper.make_node
    window: dict[str, Any] = {"strides": [stride] * 2, "pads": [padding] * 4}
    run = session_run([node("Conv", ["x", "w", "bias"], ["y"], **window)], x, {"w": w, "bias": bias})
    vnni = torch.cpu._is_vnni_supported()
    x_scale, x_zero = unsigned_grid(x, 255 if vnni else 127)
    y_scale, y_zero = unsigned_grid(torch.nn.functional.conv2d(x, w, bias, stride, padding), 255)
    w_scale = w.abs().flatten(1).amax(1) / 127
    q = torch.round(w / w_scale[:, None, None, None]).to(torch.int8)
    constants = {
        "w": q,
        "w_scale": w_scale,
        "w_zero": torch.zeros(len(w), dtype=torch.int8),
        "bias": torch.round(bias / (w_scale * x_scale)).to(torch.int32),
        **{name: torch.tensor(value) for name, value in (("x_scale", x_scale), ("y_scale", y_scale))},
        **{name: torch.tensor(value, dtype=torch.uint8) for name, value in (("x_zero", x_zero), ("y_zero", y_zero))},
    }
    operands = ["xq", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero", "bias"]
    nodes = [
        node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        node("QLinearConv", operands, ["yq"], **window),
        node("DequantizeLinear", ["yq", "y_scale", "y_zero"], ["y"]),
    ]
    return [
        Contender("ONNX Runtime float32", run, "peer", 1e-5),
        Contender("ONNX Runtime int8, static", session_run(nodes, x, constants), "peer", 0.05),
    ]


def attention(x: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[Contender]:
    """MultiHeadAttention, to which its optimizer fuses the parts of exported models; k and v as they lie in memory."""
    if not installed():
        return []
    from onnx import helper

    settings: dict[str, Any] = {"num_heads": k.shape[1], "unidirectional": int(causal)}
    if not k.is_contiguous():
        k, v = (t.transpose(1, 2).flatten(2) for t in (k, v))
    node = helper.make_node("MultiHeadAttention", ["x", "k", "v"], ["y"], domain="com.microsoft", **settings)
    return [Contender("ONNX Runtime float32", session_run([node], x, {"k": k, "v": v}), "peer", 1e-5)]


def session_run(nodes: list[Any], x: Tensor, constants: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A graph from input x to output y on torch's number of threads."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), *"nhw"[: x.dim() - 1]])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
