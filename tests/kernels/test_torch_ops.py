"""torch.ops.kdq: registration (opcheck, compile, export), strides, bit-equality with torch's own fake-quant,
gradients."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdq_kernels as kk
from kdq_kernels import _torch_library
from op_cases import INDICES, int8, moved, op_cases, randn

ops = torch.ops.kdq


@pytest.mark.parametrize(("name", "op", "args", "kwargs"), op_cases(), ids=[c[0] for c in op_cases()])
def test_opcheck(name: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> None:
    torch.library.opcheck(op, moved(args, device), moved(kwargs, device))


def test_every_op_is_checked() -> None:
    """A new operator without an opcheck case fails here."""
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdq::")
    }
    assert names == {c[1]._schema.name.split("::")[1] for c in op_cases()}


class Mallinfo2(ctypes.Structure):
    """What glibc says of the main thread's heap (2.33 and newer)."""

    _fields_ = [(f"other{i}", ctypes.c_size_t) for i in range(7)]
    _fields_ += [(name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")]


@pytest.mark.parametrize(("name", "op", "args", "kwargs"), op_cases(), ids=[c[0] for c in op_cases()])
def test_calls_keep_no_memory(name: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Neither of arguments of any type, nor of results, nor where arguments are refused."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("the C library cannot tell how much memory is in use")
    mallinfo2.restype = Mallinfo2
    wrong = (torch.zeros(2, 3, dtype=torch.bool), *args[1:])
    with pytest.raises(ValueError, match="expected"):
        op(*wrong, **kwargs)

    def bytes_kept(calls: int) -> int:
        before = mallinfo2().uordblks
        for _ in range(calls):
            op(*args, **kwargs)
            with contextlib.suppress(ValueError):
                op(*wrong, **kwargs)
        return int(mallinfo2().uordblks) - before

    bytes_kept(100)
    assert bytes_kept(2000) < 2000 * 8


def test_out_may_share_memory_with_x(device: str) -> None:
    def quantized(x: Tensor, **out: Tensor) -> Tensor:
        return kk.fake_quantize(x, 0.1, quant_min=-8, quant_max=7, **out)

    for rows, into in ((slice(0, 3), slice(1, 4)), (slice(1, 4), slice(0, 3)), (slice(0, 4), slice(0, 4))):
        memory = randn(4, 70, device=device)
        expected = quantized(memory[rows].clone())
        quantized(memory[rows], out=memory[into])
        assert torch.equal(memory[into], expected)
    with pytest.raises(ValueError, match="out: expected a place in memory for each element"):
        quantized(randn(4, 8, device=device), out=torch.empty(1, 8, device=device).expand(4, 8))


def test_none_is_no_tensor(device: str) -> None:
    x, packed, scale = randn(2, 16, device=device), kk.pack_int8_weight(int8(8, 16).to(device)), torch.ones(8)
    for args in ((None, packed, scale.to(device)), (x, packed, None)):
        with pytest.raises(ValueError, match="expected a tensor, got None"):
            kk.int8_linear(*args)
    with pytest.raises(ValueError, match="input_zero_point: expected an integer, got 1.5"):
        kk.int8_linear(x, packed, scale.to(device), input_scale=0.1, input_zero_point=1.5)  # type: ignore[arg-type]


def test_opcheck_with_gradients(device: str) -> None:
    x, scale = randn(4, 6, device=device).requires_grad_(), torch.full((6,), 0.3, requires_grad=True, device=device)
    zero_point = torch.full((6,), 2.2, requires_grad=True, device=device)
    torch.library.opcheck(ops.fake_quantize.default, (x, scale, zero_point, 0, 15, 1))
    torch.library.opcheck(ops.fake_quantize_rows.default, (x,))
    torch.library.opcheck(ops.binarize_rows.default, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_binarize_gradient(isa: str, dtype: torch.dtype) -> None:
    """Straight through where |x| <= 1, exact through the mean; each also without the other."""
    x = (randn(4, 37) * 2).to(dtype)
    x[0, :6] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.01, -1.01]).to(dtype)
    x.requires_grad_()
    upstream, mean_upstream = randn(4, 37, seed=1).to(dtype), randn(4, seed=2)
    straight = upstream.float() * (x.detach().abs() <= 1)
    through_mean = mean_upstream[:, None] / 37 * x.detach().float().sign()
    for signs_used, mean_used in ((True, True), (True, False), (False, True)):
        signs, mean = kk.binarize_rows(x)
        terms = [(signs * upstream).float().sum()] * signs_used + [(mean * mean_upstream).sum()] * mean_used
        (grad,) = torch.autograd.grad(terms, x)
        want = (straight * signs_used + through_mean * mean_used).to(dtype)
        torch.testing.assert_close(grad, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def layer(x: Tensor) -> Tensor:
    q = kk.fake_quantize(x, 0.1, quant_min=-128, quant_max=127)
    y = kk.int8_linear(q, PACKED, torch.full((8,), 0.01), activation="relu")
    y = kk.codebook_linear(y, CODEBOOK_WEIGHT, torch.tensor([-0.5, 0.0, 0.25, 1.0]), 8)
    hidden = kk.binary_threshold(y, HIDDEN_BITS, torch.zeros(70, dtype=torch.int32))
    return kk.binary_linear(hidden, BITS, torch.ones(3), k=70)


CODEBOOK_WEIGHT = kk.pack_indices(INDICES[:8, :8] % 4, 2)
PACKED = kk.pack_int8_weight(int8(8, 20))
HIDDEN_BITS = kk.pack_signs(randn(70, 8, seed=1))
BITS = kk.pack_signs(randn(3, 70))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows in (4, 9):
        torch.testing.assert_close(compiled(randn(rows, 20)), layer(randn(rows, 20)))


def test_compiled_training_step_matches_eager(device: str) -> None:
    def loss(x: Tensor, scale: Tensor) -> Tensor:
        return kk.fake_quantize(x, scale, quant_min=-8, quant_max=7).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x, scale = randn(5, 7, device=device).requires_grad_(), torch.tensor(0.2, requires_grad=True, device=device)
        function(x, scale).backward()
        results.append((x.grad, scale.grad))
    torch.testing.assert_close(results[0], results[1])


def test_export_keeps_the_operators() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x)

    exported = torch.export.export(Model(), (randn(4, 20),))
    targets = {str(node.target) for node in exported.graph.nodes}
    names = ("fake_quantize", "int8_linear", "codebook_linear", "binary_threshold", "binary_linear")
    assert {f"kdq.{name}.default" for name in names} <= targets
    torch.testing.assert_close(exported.module()(randn(4, 20)), layer(randn(4, 20)))


# ---- fake_quantize ---------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(0, 300),
    scale=st.floats(2.0**-20, 2.0**13, width=32),
    bits=st.integers(1, 8),
    spread=st.sampled_from([1e-3, 1.0, 1e6]),
)
def test_same_bits_as_torch_per_tensor(seed: int, size: int, scale: float, bits: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * spread * scale
    ties = torch.randint(-40, 40, (size,), generator=generator) * 0.5 * scale
    x = torch.where(torch.rand(size, generator=generator) < 0.3, ties, x)
    quant_max = 2**bits - 1
    zero_point = int(torch.randint(0, quant_max + 1, (), generator=generator))
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, quant_max)
    got = kk.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=quant_max)
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_torch_per_channel(axis: int, layout: str, dtype: torch.dtype, device: str) -> None:
    x = randn(4, 6, 5, 7, device=device).to(dtype)
    views: dict[str, Callable[[], Tensor]] = {
        "contiguous": lambda: x,
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.permute(2, 0, 3, 1),
        "sliced": lambda: x[:, ::2, 1:, ::3],
        "expanded": lambda: x[:1].expand(3, -1, -1, -1),
    }
    view = views[layout]()
    channels = view.shape[axis]
    scale = torch.linspace(0.05, 0.4, channels).to(device)
    zero_point = torch.arange(channels, dtype=torch.int32, device=device) % 16
    got = kk.fake_quantize(view, scale, zero_point, quant_min=0, quant_max=15, axis=axis)
    expected = torch.fake_quantize_per_channel_affine(
        view.float().cpu(), scale.cpu(), zero_point.cpu(), axis % 4, 0, 15
    )
    assert got.dtype == dtype
    assert torch.equal(got.cpu(), expected.to(dtype))
    if layout in ("channels_last", "transposed"):
        assert got.stride() == view.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_gradients_match_torch_learnable(axis: int | None, layout: str, device: str) -> None:
    """Against torch's learnable operator in float32, and closely against a formula in float64."""
    x, grad = randn(3, 5, 4, 6), randn(3, 5, 4, 6, seed=2)
    if layout != "contiguous":
        x = x.to(memory_format=torch.channels_last)
    if layout == "channels_last":
        grad = grad.to(memory_format=torch.channels_last)
    n = 1 if axis is None else x.shape[axis]
    scale = torch.linspace(0.1, 0.3, n).to(device).requires_grad_()
    zero_point = torch.full((n,), 3.0, requires_grad=True, device=device)
    leaf = x.to(device, copy=True).requires_grad_()
    kk.fake_quantize(leaf, scale, zero_point, quant_min=0, quant_max=15, axis=axis).backward(grad.to(device))
    backward = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward
    expected = backward(
        grad if axis is not None else grad.reshape(1, -1),
        x if axis is not None else x.contiguous().reshape(1, -1),
        scale.detach().cpu(),
        zero_point.detach().cpu(),
        0 if axis is None else axis % 4,
        0,
        15,
    )
    assert leaf.grad is not None
    assert scale.grad is not None
    assert zero_point.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), expected[0].reshape(x.shape), rtol=0, atol=0)
    torch.testing.assert_close(scale.grad.cpu(), expected[1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(zero_point.grad.cpu(), expected[2], rtol=1e-4, atol=1e-3)


def test_thread_count_changes_nothing() -> None:
    x, grad = randn(300, 1000), randn(300, 1000, seed=3)
    packed, scale = kk.pack_int8_weight(int8(500, 1000)), torch.rand(500) + 0.1
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            backward = ops.fake_quantize_backward(grad, x, torch.tensor(0.1), None, -8, 7, None, None)
            results.append((*backward, kk.int8_linear(x, packed, scale, activation="silu")))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 1, 1)])
def test_small_shapes(shape: tuple[int, ...], device: str) -> None:
    x = torch.full(shape, 0.26, requires_grad=True, device=device)
    y = kk.fake_quantize(x, 0.1, quant_min=-8, quant_max=7)
    assert y.shape == x.shape
    torch.testing.assert_close(y, torch.full(shape, 0.3, device=device))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(shape, device=device))


def test_out(device: str) -> None:
    x = randn(4, 6, device=device)
    expected = kk.fake_quantize(x, 0.1, quant_min=-8, quant_max=7)
    for out in (torch.empty(4, 6, device=device), torch.empty(6, 4, device=device).t()):
        assert kk.fake_quantize(x, 0.1, quant_min=-8, quant_max=7, out=out) is out
        assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="out="):
        kk.fake_quantize(x.requires_grad_(), 0.1, quant_min=-8, quant_max=7, out=torch.empty(4, 6))


# ---- linear layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_layers_in_every_dtype(isa: str, dtype: torch.dtype) -> None:
    x, w = randn(3, 7, 65).to(dtype), int8(33, 65)
    packed, scale, bias = kk.pack_int8_weight(w), torch.rand(33) * 0.01 + 0.001, randn(33)
    q, row_scale = kk.quantize_rows(x)
    assert torch.equal(row_scale, (x.float().abs().amax(-1) / 127))
    exact = (q.double() @ w.double().t()) * row_scale[..., None].double() * scale.double() + bias.double()
    got = kk.int8_linear(x, packed, scale, bias)
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
    binary = kk.binary_linear(x, kk.pack_signs(randn(33, 65, seed=5)), scale, bias)
    signs = torch.where(x < 0, -1.0, 1.0)
    weights = torch.where(randn(33, 65, seed=5) < 0, -1.0, 1.0)
    torch.testing.assert_close(
        binary.double(),
        (F.linear(signs.double(), weights.double()) * scale + bias),
        rtol=tolerance,
        atol=tolerance,
    )
    weight_only = kk.int8_weight_only_linear(x, packed, scale, bias)
    torch.testing.assert_close(
        weight_only.double(), x.double() @ w.double().t() * scale + bias, rtol=tolerance, atol=tolerance
    )
    indices, codebook = (w % 32).to(torch.uint8), randn(32, seed=7)
    got = kk.codebook_linear(x, kk.pack_indices(indices, 5), codebook, 33, bias)
    expected = x.double() @ codebook[indices.long()].double().t() + bias
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_numbers_and_tensors_mean_the_same(device: str) -> None:
    x, packed = randn(4, 70, device=device), kk.pack_int8_weight(int8(13, 70).to(device))
    scale = torch.full((13,), 0.01, device=device)
    numbers = kk.int8_linear(x, packed, scale, input_scale=0.05, input_zero_point=120)
    tensors = kk.int8_linear(x, packed, scale, input_scale=torch.tensor(0.05), input_zero_point=torch.tensor([120]))
    assert torch.equal(numbers, tensors)
    here = kk.int8_linear(
        x,
        packed,
        scale,
        input_scale=torch.tensor(0.05, device=device),
        input_zero_point=torch.tensor([120], dtype=torch.int32, device=device),
    )
    assert torch.equal(numbers, here)
    symmetric = kk.int8_linear(x, packed, scale, input_scale=0.05)
    assert torch.equal(symmetric, kk.int8_linear(x, packed, scale, input_scale=0.05, input_zero_point=128))


def test_inference_outside_inference_mode_is_not_silent() -> None:
    """The bare operator has no gradient: backward through it must not pretend to have one."""
    x = randn(2, 70).requires_grad_()
    y = kk.int8_linear(x, kk.pack_int8_weight(int8(3, 70)), torch.ones(3))
    with pytest.warns(UserWarning, match="kdq::int8_linear"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kk.fake_quantize(randn(3).double(), 0.1, quant_min=0, quant_max=1),
            "x: expected dtype float32",
        ),
        (lambda: kk.fake_quantize(randn(3), -0.1, quant_min=0, quant_max=1), "scale.*-0.1"),
        (lambda: kk.fake_quantize(randn(3), 0.1, 5, quant_min=0, quant_max=1), "zero_point.*5"),
        (lambda: kk.fake_quantize(randn(3, 4), torch.ones(3), quant_min=0, quant_max=1), "scale"),
        (lambda: kk.fake_quantize(randn(3, 4), torch.ones(3), quant_min=0, quant_max=1, axis=2), "axis"),
        (lambda: kk.int8_matmul(randn(2, 3), int8(4, 3)), "a: expected dtype int8, got float32"),
        (lambda: kk.int8_matmul(int8(2, 5), int8(4, 3)), "a.*K = 5.*K = 3"),
        (lambda: kk.int8_linear(randn(2, 5), PACKED, torch.ones(8)), "x.*K = 5.*K = 20"),
        (lambda: kk.int8_linear(randn(2, 20), PACKED, torch.ones(7)), "weight_scale.*8.*7"),
        (lambda: kk.int8_linear(randn(2, 20), PACKED, torch.ones(8), activation="elu"), "activation.*elu"),
        (lambda: kk.int8_linear(randn(2, 20), PACKED.clone().zero_(), torch.ones(8)), "packed"),
        (lambda: kk.binary_matmul(BITS, BITS, 65), "a_bits"),
        (lambda: kk.pack_signs(torch.tensor(1.0)), "x"),
    ],
)
def test_bad_arguments_raise_value_error(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_torch_or_missing_library_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match="needs torch 2.10 or newer, found 2.9.1"):
        _torch_library.load()
    monkeypatch.undo()
    monkeypatch.setattr(_torch_library, "LIBRARY", tmp_path / "libkdq_torch.so")
    with pytest.raises(ImportError, match="libkdq_torch.so is missing.*rebuild"):
        _torch_library.load()
    (tmp_path / "libkdq_torch.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="cannot be loaded.*rebuild"):
        _torch_library.load()


def test_large_binary_results_are_whole(isa: str) -> None:
    """Results of 8 MiB and more are written past the caches."""
    m, n, k = 1030, 2112, 70
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    bits = kk.pack_signs(w)
    expected = torch.where(x < 0, -1.0, 1.0) @ torch.where(w < 0, -1.0, 1.0).T
    assert expected.numel() * 4 >= 8 << 20
    torch.testing.assert_close(kk.binary_matmul(kk.pack_signs(x), bits, k), expected.int(), rtol=0, atol=0)
    torch.testing.assert_close(kk.binary_linear(x, bits, torch.ones(n)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_results_that_go_past_the_caches(dtype: torch.dtype, axis: int | None) -> None:
    """From 32 MiB on; the same bits as in pieces of cache size, in place or into a misaligned result."""
    rows, columns = (32 << 20) // dtype.itemsize // 4096 + 3, 4096
    x = (randn(rows, columns) * 3).to(dtype)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    scale = torch.tensor(0.1) if axis is None else torch.rand(x.shape[axis], generator=torch.Generator()) + 0.1
    grid: dict[str, Any] = {"quant_min": -8, "quant_max": 7}

    def part(a: int) -> Tensor:
        return kk.fake_quantize(x[a : a + 500], scale[a : a + 500] if axis == 0 else scale, axis=axis, **grid)

    want = torch.cat([part(a) for a in range(0, rows, 500)])
    results = [kk.fake_quantize(x, scale, axis=axis, **grid), x.clone(), torch.empty(x.numel() + 1, dtype=dtype)]
    kk.fake_quantize(results[1], scale, axis=axis, out=results[1], **grid)
    results[2] = results[2][1:].view(x.shape)
    kk.fake_quantize(x, scale, axis=axis, out=results[2], **grid)
    for got in results:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    grad = randn(rows, columns, seed=1).to(dtype)
    grad_x, grad_scale, _ = ops.fake_quantize_backward(grad, x.nan_to_num(0.0), scale, None, -8, 7, axis, None)
    in_place = grad.clone()
    again, _ = ops.fake_quantize_backward_(in_place, x.nan_to_num(0.0), scale, None, -8, 7, axis)
    assert torch.equal(grad_x, in_place)
    assert torch.equal(grad_scale, again)


def test_freed_results_are_not_shared() -> None:
    """A kept block serves one tensor at a time, and what is written to it is that tensor's."""
    x, grid = randn(1024, 1024), {"quant_min": -8, "quant_max": 7}
    first = kk.fake_quantize(x, 0.1, **grid)
    second = kk.fake_quantize(x, 0.2, **grid)
    address = second.data_ptr()
    assert address != first.data_ptr()
    del second
    third = kk.fake_quantize(x, 0.3, **grid)
    assert torch.equal(first, kk.fake_quantize(x.clone(), 0.1, **grid))
    assert third.data_ptr() != first.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_signs_gradient_in_place(isa: str, dtype: torch.dtype) -> None:
    """Of sign(x) times the row's mean magnitude, as autograd has it for the two by themselves."""
    x = (randn(5, 5000) * 2).to(dtype).requires_grad_()
    upstream = randn(5, 5000, seed=1).to(dtype)
    signs, mean = kk.binarize_rows(x)
    (want,) = torch.autograd.grad((signs.float() * mean[:, None] * upstream.float()).sum(), x)
    grad = upstream.clone()
    ops.binarize_rows_backward_(grad, x.detach(), True)
    torch.testing.assert_close(grad, want, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)
    with pytest.raises(ValueError, match="contiguous"):
        ops.binarize_rows_backward_(grad.t(), x.detach().t().contiguous(), True)
