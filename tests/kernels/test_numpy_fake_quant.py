"""fake_quant through the NumPy face, on every instruction set, against formulas in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kdq_kernels.numpy as kn

every_isa = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Array = NDArray[Any]


def broadcast_scale(x: Array, values: Array, axis: int | None, group_size: int | None) -> Array:
    """One value per element of x."""
    if group_size is not None:
        return np.repeat(values, group_size, axis=-1)
    if axis is None:
        return np.broadcast_to(values, x.shape)
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.broadcast_to(values.reshape(shape), x.shape)


def expected_integers(x: Array, scale: Array, zero_point: Array, quant_min: int, quant_max: int) -> Array:
    """The specification, in float32 up to the rounding and in int64 after it; finite x only."""
    inverse = np.float32(1) / scale.astype(np.float32)
    rounded = np.rint(x.astype(np.float32) * inverse).astype(np.float64)
    return np.clip(rounded + zero_point, quant_min, quant_max)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 17, 33, 64, 67]), min_size=0, max_size=3)))
    bits = draw(st.integers(1, 8))
    signed = draw(st.booleans())
    quant_min, quant_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    axis: int | None = None
    group_size: int | None = None
    kind = draw(st.sampled_from(["tensor", "channel", "group"])) if shape else "tensor"
    scale_shape: tuple[int, ...] = ()
    if kind == "channel":
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        scale_shape = (shape[axis],)
    elif kind == "group":
        group_size = draw(st.sampled_from([g for g in (1, 2, 4, 8, 11, 16, 32) if shape[-1] % g == 0]))
        scale_shape = (*shape[:-1], shape[-1] // group_size)
    seed = draw(st.integers(0, 2**32 - 1))
    return {
        "x": np.random.default_rng(seed).normal(size=shape).astype(draw(st.sampled_from(["f4", "f2"]))),
        "scale": np.random.default_rng(seed + 1).uniform(0.01, 0.5, scale_shape).astype("f4"),
        "zero_point": np.random.default_rng(seed + 2).integers(quant_min, quant_max + 1, scale_shape).astype("i4"),
        "quant_min": quant_min,
        "quant_max": quant_max,
        "axis": axis,
        "group_size": group_size,
    }


@every_isa
@given(case=cases())
def test_forward_is_the_formula(isa: str, case: dict[str, Any]) -> None:
    x, scale, zero_point = case.pop("x"), case.pop("scale"), case.pop("zero_point")
    axis, group_size = case["axis"], case["group_size"]
    s = broadcast_scale(x, scale, axis, group_size)
    z = broadcast_scale(x, zero_point, axis, group_size)
    q = expected_integers(x, s, z, case["quant_min"], case["quant_max"])
    fake = ((q - z).astype(np.float32) * s).astype(x.dtype)

    got = kn.quantize(x, scale, zero_point, **case)
    np.testing.assert_array_equal(got, q)
    np.testing.assert_array_equal(kn.fake_quantize(x, scale, zero_point, **case), fake)
    np.testing.assert_array_equal(
        kn.dequantize(got, scale, zero_point, axis=axis, group_size=group_size),
        (q - z).astype(np.float32) * s,
    )


@every_isa
@given(case=cases())
def test_gradients_match_float64(isa: str, case: dict[str, Any]) -> None:
    x, scale, zero_point = case.pop("x"), case.pop("scale"), case.pop("zero_point")
    if x.size == 0:
        return
    grad = np.random.default_rng(0).normal(size=x.shape).astype(x.dtype)
    axis, group_size = case["axis"], case["group_size"]
    s = broadcast_scale(x, scale, axis, group_size).astype(np.float64)
    z = broadcast_scale(x, zero_point, axis, group_size)
    inverse = np.float32(1) / s.astype(np.float32)
    unclamped = np.rint(x.astype(np.float32) * inverse).astype(np.float64) + z
    q = np.clip(unclamped, case["quant_min"], case["quant_max"])
    inside = unclamped == q
    g = grad.astype(np.float64)
    d_scale = g * np.where(inside, (q - z) - x.astype(np.float64) / s, q - z)
    d_zero_point = g * np.where(inside, 0.0, -s)

    def per_scale(values: Array) -> Array:
        if group_size is not None:
            return values.reshape(*scale.shape, group_size).sum(-1)
        if axis is None:
            return values.sum()
        return np.moveaxis(values, axis, 0).reshape(scale.shape[0], -1).sum(1)

    grad_x, grad_scale, grad_zero_point = kn.fake_quantize_backward(grad, x, scale, zero_point, **case)
    np.testing.assert_array_equal(grad_x, np.where(inside, grad, 0))
    bound = 1e-5 * per_scale(np.abs(d_scale)) + 1e-4
    assert np.all(np.abs(grad_scale - per_scale(d_scale)) <= bound)
    np.testing.assert_allclose(grad_zero_point, per_scale(d_zero_point), rtol=1e-4, atol=1e-4)


def test_nonfinite_values(isa: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, -0.0] * 5, np.float32)
    got = kn.fake_quantize(x, 1e-3, 3, quant_min=0, quant_max=15)
    one = np.array([np.nan, 12e-3, -3e-3, 12e-3, -3e-3, 0.0], np.float32)
    np.testing.assert_allclose(got, np.tile(one, 5), rtol=1e-6)
    assert not np.signbit(got[5::6]).any(), "-0.0 becomes +0.0, as through an integer"
    q = kn.quantize(x, 1e-3, 3, quant_min=0, quant_max=15)
    np.testing.assert_array_equal(q[:6], [3, 15, 0, 15, 0, 3])


def test_gradients_do_not_depend_on_threads(isa: str) -> None:
    rng = np.random.default_rng(0)
    x, grad = (
        rng.normal(size=(2, 3, 50021)).astype("f4")[:, :2].copy(),
        rng.normal(size=(2, 2, 50021)).astype("f4"),
    )
    before = kn.num_threads()
    try:
        for axis, scale in [
            (None, np.float32(0.05)),
            (1, np.full(2, 0.05, "f4")),
            (2, np.full(50021, 0.05, "f4")),
        ]:
            results = []
            for threads in (1, 2, 3, 5):
                kn.set_num_threads(threads)
                results.append(
                    kn.fake_quantize_backward(grad, x, np.asarray(scale), None, quant_min=-8, quant_max=7, axis=axis)
                )
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    np.testing.assert_array_equal(a, b)
    finally:
        kn.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (2, 3, 129), (5, 1000), (4, 0), (0, 4)])
def test_quantize_rows(isa: str, dtype: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(size=shape).astype(dtype)
    q, scale = kn.quantize_rows(x)
    wide = x.astype(np.float32)
    expected_scale = np.maximum(np.abs(wide).max(-1, initial=0) / np.float32(127), np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(scale, expected_scale)
    inverse = np.float32(1) / expected_scale
    np.testing.assert_array_equal(q, np.clip(np.rint(wide * inverse[..., None]), -127, 127))


def test_quantize_rows_special_rows(isa: str) -> None:
    x = np.ones((6, 40), np.float32)
    x[0] = 0
    x[1, 7] = np.nan
    x[2, 3] = np.inf
    x[3] = 1e-42
    x[4] = 3.4e38
    q, scale = kn.quantize_rows(x)
    assert (q[:3] == 0).all()
    assert scale[0] > 0
    assert np.isnan(scale[1])
    assert np.isinf(scale[2])
    assert np.isfinite(scale[3:]).all()
    assert (scale[3:] > 0).all()
    assert (q[4:] == 127).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"scale": 1e-45}, "scale"),
        ({"scale": np.ones(3, "f4")}, "scale"),
        ({"scale": np.ones(3, "f4"), "axis": 1}, "scale"),
        ({"scale": np.ones(4, "f8"), "axis": 1}, "scale.*float32.*float64"),
        ({"axis": 2}, "axis"),
        ({"group_size": 3}, "group_size"),
        ({"axis": 0, "group_size": 2}, "axis, group_size"),
        ({"zero_point": 99}, "zero_point"),
        ({"zero_point": float("nan")}, "zero_point"),
        ({"quant_min": 5, "quant_max": 5}, "quant_min"),
        ({"quant_max": 2**40}, "quant_max"),
        ({"x": np.ones((2, 4), "f8")}, "x.*float64"),
        ({"x": np.ones((2, 4), "i4")}, "x.*int32"),
        ({"out": np.ones((2, 5), "f4")}, "out"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": np.ones((2, 4), "f4"), "scale": 0.1, "quant_min": -8, "quant_max": 7}
    with pytest.raises(ValueError, match=message):
        kn.fake_quantize(**{**arguments, **kwargs})


def test_out_receives_the_result_and_may_be_x() -> None:
    x = np.linspace(-1, 1, 100, dtype=np.float32)
    expected = kn.fake_quantize(x, 0.1, quant_min=-4, quant_max=3)
    assert kn.fake_quantize(x, 0.1, quant_min=-4, quant_max=3, out=x) is x
    np.testing.assert_array_equal(x, expected)


ROW_SHAPES = [(1, 1), (3, 17), (2, 3, 64), (5, 9001), (4, 0), (0, 5)]


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_fake_quantize_rows_is_quantize_rows_and_back(isa: str, dtype: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    x[..., : shape[-1] // 3] *= np.float32(1e-3).astype(dtype)  # many values that round to +0 and -0
    q, scale = kn.quantize_rows(x)
    want = (q.astype("f4") * scale[..., None]).astype(dtype)
    got = kn.fake_quantize_rows(x)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got.view(f"u{x.itemsize}"), want.view(f"u{x.itemsize}"))


def test_fake_quantize_rows_special_rows(isa: str) -> None:
    x = np.ones((5, 40), "f4")
    x[1, 7], x[2, 39], x[3] = np.nan, -np.inf, 0
    y = kn.fake_quantize_rows(x)
    assert np.isnan(y[[1, 2]]).all()
    np.testing.assert_array_equal(y[[0, 3, 4]], x[[0, 3, 4]])


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_binarize_rows(isa: str, dtype: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    if x.size:
        x.flat[0] = -0.0
    signs, mean = kn.binarize_rows(x)
    np.testing.assert_array_equal(signs, np.where(x < 0, -1, 1).astype(dtype))
    want = np.abs(x.astype("f8")).sum(-1) / max(shape[-1], 1)
    np.testing.assert_allclose(mean, want, rtol=1e-6)


def test_out_must_not_share_a_part_of_x() -> None:
    memory = np.ones((4, 8), np.float32)
    with pytest.raises(ValueError, match="out: expected x itself, or memory of its own"):
        kn.fake_quantize(memory[:3], 0.1, quant_min=-8, quant_max=7, out=memory[1:])
