"""torch.ops.kdq on CUDA tensors: what can be seen without a GPU (registration, shapes, refusals), and, with one
(`make test-cuda`), results against the CPU's, streams and graphs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

import kdq
import kdq_kernels as kk
from kdq.layers import Int8Linear, LowBitLinear
from kdq_kernels import _torch_library
from kdq_kernels.ops.arguments import as_scale, as_zero_point
from op_cases import int8, map_tensors, moved, op_cases, packed_for_cuda, randn

ops = torch.ops.kdq
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CASES = op_cases()
IDS = [case[0] for case in CASES]

with_operators = pytest.mark.skipif(
    not _torch_library.has_cuda_operators(),
    reason="no operators for CUDA tensors in this build: they need nvcc and a torch with CUDA",
)
with_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# ---- without a GPU ---------------------------------------------------------------------------------------------------


def op_name(op: Any) -> str:
    name: str = op._schema.name
    return name + (f".{op._schema.overload_name}" if op._schema.overload_name else "")


@with_operators
def test_every_operator_is_registered() -> None:
    for _, op, _, _ in CASES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op_name(op), "CUDA"), op_name(op)


def described(results: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.stride(), t.dtype) for t in _pytree.tree_leaves(results) if isinstance(t, Tensor)]


@with_cuda
@pytest.mark.parametrize(("name", "op", "args", "kwargs"), CASES, ids=IDS)
def test_shapes_are_those_of_the_cpu(name: str, op: Any, args: Any, kwargs: Any) -> None:
    """Of every result, but for the packed weight, which is row-major int8 on a GPU."""
    expected = described(op(*args, **kwargs))
    args, kwargs = packed_for_cuda((args, kwargs))
    with FakeTensorMode(allow_non_fake_inputs=True):
        args, kwargs = map_tensors(lambda t: t.to("cuda"), (args, kwargs))
        got = op(*args, **kwargs)
    assert all(t.device.type == "cuda" for t in _pytree.tree_leaves(got) if isinstance(t, Tensor))
    if name.startswith("pack_int8_weight"):
        expected = described(args)
    assert described(got) == expected


OWN_KERNELS = [case for case in CASES if not case[0].startswith("scaled_dot_product_attention")]  # that is torch's own


@with_operators
@pytest.mark.parametrize(("name", "op", "args", "kwargs"), OWN_KERNELS, ids=[case[0] for case in OWN_KERNELS])
def test_cpu_tensors_are_refused(name: str, op: Any, args: Any, kwargs: Any) -> None:
    """What the dispatcher brings here when one tensor is on a GPU and another is not. The error names the latter."""
    first = {"binarize_rows_backward": "x", "distillation_loss_backward": "student"}
    named = first.get(op_name(op).removeprefix("kdq::"), op._schema.arguments[0].name)
    with pytest.raises(ValueError, match=f"^{named}: expected all tensors on one GPU"):
        op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)


@with_cuda
def test_numbers_become_tensors_beside_x() -> None:
    with FakeTensorMode():
        x = torch.empty(5, 70, device="cuda")
        for number in (as_scale(0.1, x), as_zero_point(3, x), as_zero_point(3.5, x)):
            assert number is not None
            assert (number.device.type, number.dim()) == ("cuda", 0)
        y = kk.fake_quantize(x, 0.1, 3, quant_min=0, quant_max=15)
        assert kk.dequantize(kk.quantize(y, 0.1, quant_min=-8, quant_max=7), 0.1).device.type == "cuda"


@with_operators
@pytest.mark.parametrize(
    "config", [kdq.Int8Dynamic(), kdq.Int8Static(), kdq.Int8WeightOnly(), kdq.LowBit(weight_bits=3, act_bits=4)]
)
def test_layers_pack_again_when_they_move(config: Any) -> None:
    kind = LowBitLinear if isinstance(config, kdq.LowBit) else Int8Linear
    with FakeTensorMode():
        layer = kind(70, 40, config=config)
        assert (layer.packed.dtype, layer.packed.device.type) == (torch.uint8, "cpu")
        layer.to("cuda")
        assert (layer.packed.dtype, layer.packed.device.type) == (torch.int8, "cuda")
        assert layer.packed.shape == (40, 70)
        y = layer(torch.empty(5, 70, dtype=torch.bfloat16, device="cuda"))
        assert (y.shape, y.dtype, y.device.type) == ((5, 40), torch.bfloat16, "cuda")
        layer.to("cpu")
        assert (layer.packed.dtype, layer.packed.device.type) == (torch.uint8, "cpu")


def test_a_layer_cannot_go_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(_torch_library, "CUDA_LIBRARY", tmp_path / "libkdq_torch_cuda.so")
    _torch_library.check_device(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"no operators for CUDA tensors.*libkdq_torch_cuda.so.*KDQ_CUDA=ON"):
        _torch_library.check_device(torch.device("cuda"))


@pytest.mark.skipif(_torch_library.has_cuda_operators(), reason="this build has operators for CUDA tensors")
def test_asking_for_cuda_without_the_operators_is_an_error() -> None:
    command = [sys.executable, "-m", "pytest", "--device", "cuda", "--collect-only", __file__]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: device: this build of kdq_kernels has no operators for CUDA tensors" in result.stderr


# ---- with a GPU ------------------------------------------------------------------------------------------------------


def in_dtype(values: Any, dtype: torch.dtype) -> Any:
    """The activations of a case (its float32 tensors of two axes and as many elements as x) in another dtype."""
    x = values[0]

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.shape == x.shape else value

    return _pytree.tree_map(cast, values) if isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() else values


@with_operators
@with_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "op", "args", "kwargs"), CASES, ids=IDS)
def test_results_are_those_of_the_cpu(name: str, op: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> None:
    args, kwargs = in_dtype(args, dtype), {k: in_dtype((v,), dtype)[0] for k, v in kwargs.items()}
    there = moved(args, "cuda"), moved(kwargs, "cuda")
    on_cpu = op(*args, **kwargs)
    on_gpu = op(*there[0], **there[1])
    pairs = [((args, kwargs), there), (on_cpu, on_gpu)]  # what is changed in place, and what is returned
    for expected, got in pairs:
        for a, b in zip(_pytree.tree_leaves(got), _pytree.tree_leaves(expected), strict=True):
            if not isinstance(a, Tensor) or (b.dtype == torch.uint8 and a.dtype == torch.int8):  # a packed weight
                continue
            tolerance = 2 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0
            torch.testing.assert_close(a.cpu(), b, rtol=max(tolerance, 1e-5) if tolerance else 0, atol=tolerance * 10)


@with_operators
@with_gpu
@pytest.mark.parametrize("m", [1, 7, 16, 17, 128, 300])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 128), (130, 515), (512, 4096)])
def test_products_of_many_shapes(m: int, n: int, k: int) -> None:
    a, b = int8(m, k), int8(n, k)
    assert torch.equal(kk.int8_matmul(a.cuda(), b.cuda()).cpu(), kk.int8_matmul(a, b))
    x, w = randn(m, k), randn(n, k, seed=1)
    bits = [kk.pack_signs(t) for t in (x, w)]
    got = kk.binary_matmul(bits[0].cuda(), bits[1].cuda(), k)
    assert torch.equal(got.cpu(), kk.binary_matmul(bits[0], bits[1], k))
    scale = torch.rand(n) + 0.1
    few, grid = b.clamp(-2, 1), {"input_scale": 0.4, "input_quant_max": 3}
    planes, sums = kk.pack_bitplanes(few.cuda(), 2), few.sum(1, dtype=torch.int32)
    assert torch.equal(planes.cpu(), kk.pack_bitplanes(few, 2))
    want = kk.bitplane_linear(x, planes.cpu(), sums, scale, **grid)
    got = kk.bitplane_linear(x.cuda(), planes, sums.cuda(), scale.cuda(), **grid)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    for input_scale in (None, 0.03):
        want = kk.int8_linear(x, kk.pack_int8_weight(b), scale, input_scale=input_scale)
        got = kk.int8_linear(x.cuda(), kk.pack_int8_weight(b.cuda()), scale.cuda(), input_scale=input_scale)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


@with_operators
@with_gpu
def test_int64_zero_points_are_those_of_int32() -> None:
    """On the GPU as on the CPU: torch's own quantizers have int64."""
    x, w, scale = randn(5, 70).cuda(), int8(13, 70).cuda(), torch.full((13,), 0.01).cuda()
    packed, step = kk.pack_int8_weight(w), torch.tensor(0.03).cuda()
    zero_point = torch.tensor([101], device="cuda")
    got = kk.int8_linear(x, packed, scale, input_scale=step, input_zero_point=zero_point)
    expected = kk.int8_linear(x, packed, scale, input_scale=step, input_zero_point=zero_point.int())
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="input_zero_point: expected one element"):
        kk.int8_linear(x, packed, scale, input_scale=step, input_zero_point=zero_point.expand(2))


@with_operators
@with_gpu
def test_streams_and_graphs() -> None:
    """Work goes on the current stream, and can be captured: nothing waits for the GPU, nothing is allocated outside."""
    x, w = randn(64, 512, device="cuda"), int8(256, 512).cuda()
    packed, scale = kk.pack_int8_weight(w), torch.full((256,), 0.01, device="cuda")

    def run() -> Tensor:
        y = kk.int8_linear(kk.fake_quantize(x, 0.1, quant_min=-8, quant_max=7), packed, scale, activation="gelu")
        return kk.binary_linear(y, kk.pack_signs(y), torch.ones(64, device="cuda"))

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = run()
    stream.synchronize()
    assert torch.equal(on_stream, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(randn(64, 512, seed=1))
    graph.replay()
    assert torch.equal(captured, run())


@with_operators
@with_gpu
def test_what_was_packed_elsewhere_is_refused() -> None:
    w, x, scale = int8(13, 70), randn(5, 70), torch.ones(13)
    with pytest.raises(ValueError, match="packed for the CPU; move the int8 weight"):
        kk.int8_linear(x.cuda(), kk.pack_int8_weight(w).cuda(), scale.cuda())
    with pytest.raises(ValueError, match="packed: expected dtype uint8, got int8"):
        kk.int8_linear(x, kk.pack_int8_weight(w.cuda()).cpu(), scale)
    with pytest.raises(ValueError, match="weight_scale: expected a tensor on cuda:0"):
        kk.int8_linear(x.cuda(), kk.pack_int8_weight(w.cuda()), scale)


@with_operators
@with_gpu
def test_layers_move() -> None:
    model = nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 9))
    kdq.quantize_(model, kdq.Int8Dynamic())
    x = randn(5, 70)
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.cpu()(x), expected, rtol=0, atol=0)


@with_operators
@with_gpu
@pytest.mark.parametrize("config", [kdq.Int8Dynamic(), kdq.Int8Static(), kdq.Binary()])
def test_convolutions_move(config: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 9, 3, stride=2, padding=1))
    x = randn(2, 3, 9, 8)
    kdq.quantize_(model, {"0": config}, calibration=[x])
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.cpu()(x), expected, rtol=0, atol=0)
