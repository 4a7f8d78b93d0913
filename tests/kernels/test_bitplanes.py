"""Bit planes: integers of few bits by xor and popcount, exact on every instruction set, and the linear layer made of
them to the last bit that of the int8 kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import kdq_kernels as kk
import kdq_kernels.numpy as kn
from op_cases import randn

every_isa = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rows = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 65])
depths = st.sampled_from([0, 1, 2, 63, 64, 65, 127, 129, 256, 257, 640, 1000, 2049])
sides = st.tuples(rows, rows, depths)  # m, n, k
forms = st.sampled_from(["unsigned", "signed", "odd"])
seeds = st.integers(0, 2**32 - 1)
Array = NDArray[Any]


def integers(form: str, bits: int) -> Array:
    """All of a form, the smallest first."""
    top = 2**bits - 1
    if form == "odd":
        return np.arange(-top, top + 1, 2, dtype=np.int8)
    if form == "signed":
        return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8)
    return np.arange(top + 1).astype(np.uint8)


def sample(rng: np.random.Generator, form: str, bits: int, *shape: int) -> Array:
    return rng.choice(integers(form, bits), shape)


def codes(q: Array, form: str, bits: int) -> NDArray[np.int64]:
    wide = q.astype(np.int64)
    if form == "odd":
        return (2**bits - 1 - wide) // 2
    return wide + 2 ** (bits - 1) if form == "signed" else wide


@pytest.mark.parametrize("form", ["unsigned", "signed", "odd"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (2, 3, 65), (4, 200), (0, 7), (3, 0), (5,)])
def test_pack(form: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for bits in range(1, 8 if form == "odd" else 9):
        q = sample(rng, form, bits, *shape)
        planes = kn.pack_bitplanes(q, bits, form)
        assert planes.shape == (bits, *shape[:-1], (shape[-1] + 63) // 64)
        expected = codes(q, form, bits)
        for p in range(bits):
            signs = np.where(expected >> p & 1, -1, 1).astype("f4")
            np.testing.assert_array_equal(planes[p], kn.pack_signs(signs))  # and with it that tail bits are zero
        back = kn.unpack_bitplanes(planes, shape[-1], form)
        assert back.dtype == q.dtype
        np.testing.assert_array_equal(back, q)


def test_odd_integers_of_one_bit_are_signs() -> None:
    x = np.random.default_rng(1).normal(size=(5, 130)).astype("f4")
    w = np.where(x < 0, -1, 1).astype(np.int8)
    np.testing.assert_array_equal(kn.pack_bitplanes(w, 1, "odd")[0], kn.pack_signs(x))


@every_isa
@given(sides=sides, a_bits=st.integers(1, 4), b_bits=st.integers(1, 4), a_form=forms, b_form=forms, seed=seeds)
def test_matmul_is_exact(
    isa: str, sides: tuple[int, int, int], a_bits: int, b_bits: int, a_form: str, b_form: str, seed: int
) -> None:
    rng, (m, n, k) = np.random.default_rng(seed), sides
    a, b = sample(rng, a_form, a_bits, m, k), sample(rng, b_form, b_bits, n, k)
    planes = kn.pack_bitplanes(a, a_bits, a_form), kn.pack_bitplanes(b, b_bits, b_form)
    got = kn.bitplane_matmul(*planes, k, a_form=a_form, b_form=b_form)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, a.astype(np.int64) @ b.astype(np.int64).T)


@pytest.mark.parametrize("rows", range(1, 10))
def test_every_height_and_width_of_tile(isa: str, rows: int) -> None:
    """Each number of rows and of vectors of channels is an instance of its own."""
    rng = np.random.default_rng(rows)
    for n in (1, 8, 9, 16, 17, 32, 33, 48, 63, 64, 65, 130):
        for k in (1, 64, 65, 700):
            a, b = sample(rng, "unsigned", 3, rows, k), sample(rng, "signed", 2, n, k)
            got = kn.bitplane_matmul(kn.pack_bitplanes(a, 3, "unsigned"), kn.pack_bitplanes(b, 2), k)
            np.testing.assert_array_equal(got, a.astype(int) @ b.astype(int).T)


@pytest.mark.parametrize(
    ("a_form", "a_bits", "b_form", "b_bits"),
    [("unsigned", 8, "signed", 8), ("odd", 7, "odd", 7), ("signed", 8, "signed", 8), ("unsigned", 1, "unsigned", 1)],
)
def test_ends_of_the_range(isa: str, a_form: str, a_bits: int, b_form: str, b_bits: int) -> None:
    """Every element the smallest or the largest, over the longest rows that are allowed: intermediate sums wrap, and
    counters of bytes and of 16 bits would overflow if they were not emptied in time."""
    ends = [integers(form, bits)[[0, -1]].astype(int) for form, bits in ((a_form, a_bits), (b_form, b_bits))]
    longest = (2**31 - 1) // (2 * int(np.abs(ends[0]).max() * np.abs(ends[1]).max()))
    k = min(longest, 70_001)
    a = np.repeat(integers(a_form, a_bits)[[0, -1]], 3)[:, None].repeat(k, 1)
    b = np.repeat(integers(b_form, b_bits)[[0, -1]], 5)[:, None].repeat(k, 1)
    planes = kn.pack_bitplanes(a, a_bits, a_form), kn.pack_bitplanes(b, b_bits, b_form)
    got = kn.bitplane_matmul(*planes, k, a_form=a_form, b_form=b_form)
    np.testing.assert_array_equal(got, a.astype(np.int64) @ b.astype(np.int64).T)
    few = kn.bitplane_matmul(planes[0][:, 2:4], planes[1], k, a_form=a_form, b_form=b_form)
    np.testing.assert_array_equal(few, got[2:4])


def linears(x: Any, w: Array, bits: int, form: str, scale: Any, bias: Any, **grid: Any) -> tuple[Any, Any]:
    """(by bit planes, on the int8 kernels), of NumPy arrays or tensors; int8 holds all integers of w."""
    if isinstance(x, Tensor):
        q = torch.from_numpy(w)
        planes, sums = kk.pack_bitplanes(q, bits, form), q.sum(1, dtype=torch.int32)
        ours = kk.bitplane_linear(x, planes, sums, scale, bias, weight_form=form, **grid)
        return ours, kk.int8_linear(x, kk.pack_int8_weight(q.to(torch.int8)), scale, bias, **grid)
    ours = kn.bitplane_linear(
        x, kn.pack_bitplanes(w, bits, form), w.sum(1, dtype=np.int32), scale, bias, weight_form=form, **grid
    )
    return ours, kn.int8_linear(x, kn.pack_int8_weight(w.astype(np.int8)), scale, bias, **grid)


@every_isa
@given(
    sides=sides,
    act_bits=st.integers(1, 4),
    bits=st.integers(1, 3),
    form=forms,
    activation=st.sampled_from([None, "relu", "gelu", "silu"]),
    half=st.booleans(),
    seed=seeds,
)
def test_linear_has_the_bits_of_int8_linear(
    isa: str,
    sides: tuple[int, int, int],
    act_bits: int,
    bits: int,
    form: str,
    activation: str | None,
    half: bool,
    seed: int,
) -> None:
    rng, (m, n, k) = np.random.default_rng(seed), sides
    w = sample(rng, form, bits, n, k)
    x = rng.normal(size=(m, k)).astype("f2" if half else "f4")
    scale, bias = rng.uniform(0.01, 0.1, n).astype("f4"), rng.normal(size=n).astype("f4") if seed % 2 else None
    quant_max = 2**act_bits - 1 - (seed % 3 == 0 and act_bits > 1)
    grid = {
        "input_scale": 0.3,
        "input_zero_point": int(rng.integers(0, quant_max + 1)),
        "input_quant_max": quant_max,
        "activation": activation,
    }
    got, expected = linears(x, w, bits, form, scale, bias, **grid)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 300, 129), (3, 5, 70, 19), (70, 31, 512), (100, 129, 258)])
def test_torch_linear(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *batch, n, k = shape
    w = sample(np.random.default_rng(3), "odd", 1, n, k)
    x, scale, bias = randn(*batch, k).to(dtype), randn(n, seed=2).abs() + 0.01, randn(n, seed=3)
    for grid in (
        {"input_scale": 0.5, "input_quant_max": 3},
        {"input_scale": torch.tensor(0.2), "input_zero_point": torch.tensor(0), "input_quant_max": 7},
        {"input_scale": 1e-3, "input_zero_point": 200, "input_quant_max": 255, "activation": "gelu"},
    ):
        got, expected = linears(x, w, 1, "odd", scale, bias, **grid)
        assert got.dtype == dtype
        assert torch.equal(got, expected)


def test_a_row_with_nan_stays_alone(isa: str) -> None:
    w, scale = sample(np.random.default_rng(4), "signed", 2, 33, 70), np.ones(33, "f4")
    for m in (2, 9):
        x = np.random.default_rng(5).normal(size=(m, 70)).astype("f4")
        x[0, 3], x[0, 5] = np.inf, -np.inf
        x[1, 69] = np.nan
        got, expected = linears(x, w, 2, "signed", scale, None, input_scale=0.5, input_quant_max=3)
        assert np.isnan(got[1]).all()
        assert np.isfinite(np.delete(got, 1, 0)).all()
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rows", [2, 130])
def test_result_does_not_depend_on_threads(isa: str, rows: int) -> None:
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(rows, 1100)).astype("f4"), sample(rng, "signed", 2, 600, 1100)
    planes, scale = kn.pack_bitplanes(w, 2), np.full(600, 0.1, "f4")
    of_x = kn.pack_bitplanes(sample(rng, "unsigned", 2, rows, 1100), 2, "unsigned")
    before = kn.num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            kn.set_num_threads(threads)
            grid: dict[str, Any] = {"input_scale": 0.5, "input_quant_max": 3, "activation": "silu"}
            layer = kn.bitplane_linear(x, planes, w.sum(1, dtype=np.int32), scale, **grid)
            results.append((layer, kn.bitplane_matmul(of_x, planes, 1100)))
    finally:
        kn.set_num_threads(before)
    for layer, products in results[1:]:
        np.testing.assert_array_equal(layer, results[0][0])
        np.testing.assert_array_equal(products, results[0][1])


def test_bad_arguments_are_named() -> None:
    w = np.array([[1, -2, 0], [1, 1, -1]], np.int8)
    with pytest.raises(ValueError, match=r"q: expected integers from -1 to 0 for 1 bits, got 1 at row 0, element 0"):
        kn.pack_bitplanes(w, 1)
    with pytest.raises(ValueError, match=r"q: expected odd integers from -3 to 3 .* got -2 at row 0, element 1"):
        kn.pack_bitplanes(w, 2, "odd")
    with pytest.raises(ValueError, match="q: expected dtype uint8, got int8"):
        kn.pack_bitplanes(w, 2, "unsigned")
    with pytest.raises(ValueError, match=r"form: expected .* got 'symmetric'"):
        kn.pack_bitplanes(w, 2, "symmetric")
    for form, most in (("odd", 7), ("signed", 8)):
        for bits in (0, most + 1):
            with pytest.raises(ValueError, match=f"bits: expected 1 to {most} bits.*got {bits}"):
                kn.pack_bitplanes(w, bits, form)

    planes = kn.pack_bitplanes(w, 2)
    with pytest.raises(ValueError, match=r"planes: expected shape \[bits, ..., 2\] for k = 70"):
        kn.unpack_bitplanes(planes, 70)
    with pytest.raises(ValueError, match="a_planes: expected 3 axes"):
        kn.bitplane_matmul(planes[0], planes, 3)
    with pytest.raises(ValueError, match="b_planes: expected dtype int64, got int8"):
        kn.bitplane_matmul(planes, w, 3)
    dirty = planes.copy()
    dirty[1, 1] |= 1 << 40
    with pytest.raises(ValueError, match="b_planes: row 3 has bits set beyond k = 3"):
        kn.bitplane_matmul(planes, dirty, 3)
    wide = np.zeros((8, 1, 600), np.int64)
    with pytest.raises(ValueError, match="k: 38400 would overflow int32 sums of integers up to 255 and 128"):
        kn.bitplane_matmul(wide, wide, 38400)


def test_bad_arguments_of_the_layer_are_named() -> None:
    w = np.ones((2, 70), np.int8)
    x, planes, sums, scale = np.ones((3, 70), "f4"), kn.pack_bitplanes(w, 2), w.sum(1, dtype=np.int32), np.ones(2, "f4")
    good: dict[str, Any] = {"input_scale": 0.5, "input_quant_max": 3}
    assert kn.bitplane_linear(x, planes, sums, scale, **good).shape == (3, 2)
    for change, message in (
        ({"input_scale": 0.0}, "input_scale: expected positive and finite"),
        ({"input_quant_max": 256}, "input_quant_max: expected 1 to 255, got 256"),
        ({"input_zero_point": 4}, "input_zero_point: expected 0 to 3, got 4"),
        ({"weight_form": "signs"}, "weight_form: expected 'unsigned', 'signed' or 'odd', got 'signs'"),
        ({"activation": "tanh"}, "activation: expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            kn.bitplane_linear(x, planes, sums, scale, **{**good, **change})
    with pytest.raises(ValueError, match=r"weight_sum: expected shape \[2\], got \[3\]"):
        kn.bitplane_linear(x, planes, np.ones(3, np.int32), scale, **good)
    with pytest.raises(ValueError, match="weight_sum: expected dtype int32, got int64"):
        kn.bitplane_linear(x, planes, sums.astype(np.int64), scale, **good)
    with pytest.raises(ValueError, match="weight_scale: expected positive finite numbers, got -1 at index 1"):
        kn.bitplane_linear(x, planes, sums, np.array([1, -1], "f4"), **good)
    with pytest.raises(ValueError, match=r"weight_planes: expected shape \[bits, ..., 3\] for k = 140"):
        kn.bitplane_linear(np.ones((3, 140), "f4"), planes, sums, scale, **good)


def test_torch_errors() -> None:
    q = torch.ones(2, 70, dtype=torch.int8)
    planes, wide_sums = kk.pack_bitplanes(q, 2), q.sum(1)
    with pytest.raises(ValueError, match="q: expected dtype uint8, got int8"):
        kk.pack_bitplanes(q, 2, "unsigned")
    with pytest.raises(ValueError, match="planes: expected 3 words"):
        kk.unpack_bitplanes(planes, 140)
    with pytest.raises(ValueError, match=r"planes: expected shape \[bits, ..., words\], got \[2\]"):
        kk.unpack_bitplanes(planes[0, 0], 70)
    with pytest.raises(ValueError, match="b_form: expected 'unsigned'"):
        kk.bitplane_matmul(planes, planes, 70, b_form="int8")
    with pytest.raises(ValueError, match="weight_sum: expected dtype int32, got int64"):
        kk.bitplane_linear(torch.ones(3, 70), planes, wide_sums, torch.ones(2), input_scale=0.5, input_quant_max=3)
