"""int8_gemm through the NumPy face, on every instruction set: exact integers, float results against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kdq_kernels
import kdq_kernels.numpy as kn

every_isa = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 47, 64, 65, 101, 128, 131])
Array = NDArray[Any]


def erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "gelu": lambda y: 0.5 * y * (1 + erf(y / math.sqrt(2))),
    "silu": lambda y: y / (1 + np.exp(-y)),
}


def full_range(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Values that saturate careless kernels: mostly -128, -127 and 127."""
    extreme = rng.choice(np.array([-128, -127, 127], np.int8), shape)
    return np.where(rng.random(shape) < 0.7, extreme, rng.integers(-128, 128, shape, dtype=np.int8))


@every_isa
@given(m=sizes, n=sizes, k=sizes, seed=st.integers(0, 2**32 - 1))
def test_matmul_is_exact(isa: str, m: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = full_range(rng, (m, k)), full_range(rng, (n, k))
    expected = a.astype(np.int64) @ b.astype(np.int64).T
    np.testing.assert_array_equal(kn.int8_matmul(a, b), expected)
    np.testing.assert_array_equal(kn.int8_matmul(a, kn.pack_int8_weight(b)), expected)


@pytest.mark.parametrize("shape", [(1, 4096, 512), (37, 129, 257), (130, 70, 1031), (300, 17, 64)])
def test_matmul_is_exact_on_larger_shapes(isa: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    rng = np.random.default_rng(3)
    a, b = full_range(rng, (m, k)), full_range(rng, (n, k))
    expected = np.rint(a.astype(np.float64) @ b.astype(np.float64).T)
    np.testing.assert_array_equal(kn.int8_matmul(a, b), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_products_beyond_the_caches(isa: str, threads: int) -> None:
    """Input, weights and result of more than 1 MiB, several blocks of rows: the code that asks ahead runs."""
    rng = np.random.default_rng(13)
    x, w = rng.normal(size=(300, 1100)).astype("f4"), full_range(rng, (1100, 1100))
    q, row_scale = kn.quantize_rows(x)
    packed, scale = kn.pack_int8_weight(w), rng.uniform(0.001, 0.01, 1100).astype("f4")
    exact = np.rint(q.astype(np.float64) @ w.astype(np.float64).T)
    before = kn.num_threads()
    try:
        kn.set_num_threads(threads)
        np.testing.assert_array_equal(kn.int8_matmul(q, packed), exact)
        got = kn.int8_linear(x, packed, scale)
    finally:
        kn.set_num_threads(before)
    np.testing.assert_allclose(got, exact * row_scale.reshape(-1, 1) * scale, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("bits", "n", "k"), [(8, 1061, 2090), (4, 1061, 4101), (2, 2110, 4101)])
def test_weights_from_memory(isa: str, bits: int, n: int, k: int) -> None:
    """Large ones, which few rows read in pieces of k: sums go on from one piece to the next."""
    rng = np.random.default_rng(bits)
    half = 1 << (bits - 1)
    w = rng.integers(-half, half, (n, k), dtype=np.int8)
    packed = kn.pack_int8_weight(w, bits)
    assert packed.nbytes >= 2 << 20
    scale, bias = np.full(n, 1 / 32, "f4"), np.arange(n, dtype="f4")
    x = rng.integers(-3, 4, (49, k)).astype("f4")  # sums are exact in float32
    x[:, 0] = 127  # a scale of 1, so that the rows are their own integers
    exact = np.rint(x.astype(np.float64) @ w.astype(np.float64).T)
    for rows in (1, 2, 3, 5, 7, 12, 25, 48, 49):
        of_rows = x[:rows]
        np.testing.assert_array_equal(kn.int8_linear(of_rows, packed, scale, bias), exact[:rows] / 32 + bias)
        if bits == 8:
            np.testing.assert_array_equal(kn.int8_matmul(of_rows.astype(np.int8), packed), exact[:rows])
            got = kn.int8_weight_only_linear(of_rows, packed, scale, bias)
            np.testing.assert_array_equal(got, exact[:rows] / 32 + bias)
    if bits == 8:  # sums that round: in the same order, whatever the other rows
        x = rng.normal(size=x.shape).astype("f4")
        whole = kn.int8_weight_only_linear(x, packed, scale)
        for row in (0, 6, 48):
            np.testing.assert_array_equal(kn.int8_weight_only_linear(x[row : row + 1], packed, scale)[0], whole[row])
            few = slice(row // 2, row // 2 + 5)
            np.testing.assert_array_equal(kn.int8_weight_only_linear(x[few], packed, scale), whole[few])


@pytest.mark.parametrize("rows", range(1, 14))
def test_every_height_and_width_of_tile(isa: str, rows: int) -> None:
    """Each number of rows and of vectors of channels is an instance of its own, with several ways out of it."""
    rng = np.random.default_rng(rows)
    for n in (1, 8, 9, 16, 17, 32, 33, 48, 63, 64, 65, 130, 256, 300):
        for k in (1, 6, 67):
            a, w = full_range(rng, (rows, k)), full_range(rng, (n, k))
            exact = a.astype(np.int64) @ w.astype(np.int64).T
            packed = kn.pack_int8_weight(w)
            np.testing.assert_array_equal(kn.int8_matmul(a, packed), exact)
            x = np.clip(a, -127, 127).astype("f4")
            x[:, 0] = 127  # a scale of 1, so that the rows are their own integers
            exact = x.astype(np.int64) @ w.astype(np.int64).T
            scale, bias = np.full(n, 1 / 32, "f4"), np.arange(n, dtype="f4")
            expected = exact / 32 + bias
            np.testing.assert_array_equal(kn.int8_linear(x, packed, scale, bias), expected)
            np.testing.assert_array_equal(
                kn.int8_linear(x, packed, scale, bias, activation="relu"), np.maximum(expected, 0)
            )
            np.testing.assert_array_equal(kn.int8_linear(x.astype("f2"), packed, scale, bias), expected.astype("f2"))
            np.testing.assert_array_equal(kn.int8_weight_only_linear(x, packed, scale, bias), expected)


def test_longest_sum_that_fits(isa: str) -> None:
    k = 131071
    a = np.full((2, k), -128, np.int8)
    np.testing.assert_array_equal(kn.int8_matmul(a, a), np.full((2, 2), 128 * 128 * k))
    with pytest.raises(ValueError, match="131071"):
        kn.int8_matmul(np.zeros((1, k + 1), np.int8), np.zeros((1, k + 1), np.int8))


@every_isa
@given(n=sizes, k=sizes, seed=st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack(isa: str, n: int, k: int, seed: int) -> None:
    w = full_range(np.random.default_rng(seed), (n, k))
    np.testing.assert_array_equal(kn.unpack_int8_weight(kn.pack_int8_weight(w)), w)


def linear_reference(
    x: Array, w: Array, weight_scale: Array, bias: Array | None, static: tuple[float, int, int] | None
) -> Array:
    """The quantized linear layer in float64, on the same integers that the kernel must use."""
    wide = x.astype(np.float32)
    if static is None:
        scale = np.maximum(np.abs(wide).max(-1, initial=0) / np.float32(127), np.finfo("f4").tiny)[..., None]
        q = np.clip(np.rint(wide * (np.float32(1) / scale)), -127, 127)
    else:
        step, zero_point, quant_max = static
        scale = np.float64(np.float32(step))
        q = np.clip(np.rint(wide * (np.float32(1) / np.float32(step))) + zero_point, 0, quant_max) - zero_point
    y = (q.astype(np.float64) @ w.T.astype(np.float64)) * scale * weight_scale.astype(np.float64)
    return y if bias is None else y + bias


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("static", [None, (0.03, 128, 255), (0.2, 3, 15)])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 100, 37), (5, 16, 64), (3, 7, 65, 129), (67, 131, 300)])
def test_linear(
    isa: str,
    shape: tuple[int, ...],
    dtype: str,
    static: tuple[float, int, int] | None,
    activation: str | None,
) -> None:
    *batch, n, k = shape
    rng = np.random.default_rng(5)
    x = rng.normal(size=(*batch, k)).astype(dtype)
    w = full_range(rng, (n, k))
    weight_scale = rng.uniform(0.001, 0.01, n).astype("f4")
    bias = rng.normal(size=n).astype("f4") if n % 2 else None
    options: dict[str, Any] = {"activation": activation}
    if static is not None:
        options |= dict(zip(("input_scale", "input_zero_point", "input_quant_max"), static, strict=True))
    got = kn.int8_linear(x, kn.pack_int8_weight(w), weight_scale, bias, **options)
    assert got.dtype == x.dtype
    assert got.shape == (*batch, n)
    expected = ACTIVATIONS[activation](linear_reference(x, w, weight_scale, bias, static))
    tolerance = 2e-6 if dtype == "f4" else 1e-3
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 100, 37), (5, 16, 64), (67, 131, 301)])
def test_weight_only_linear(isa: str, shape: tuple[int, int, int], dtype: str) -> None:
    m, n, k = shape
    rng = np.random.default_rng(6)
    x = rng.normal(size=(m, k)).astype(dtype)
    w = full_range(rng, (n, k))
    weight_scale = rng.uniform(0.001, 0.01, n).astype("f4")
    bias = rng.normal(size=n).astype("f4")
    got = kn.int8_weight_only_linear(x, kn.pack_int8_weight(w), weight_scale, bias, activation="relu")
    expected = np.maximum(x.astype("f8") @ w.T.astype("f8") * weight_scale + bias, 0)
    tolerance = 1e-5 if dtype == "f4" else 1e-3
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_activations_at_the_extremes(isa: str) -> None:
    """The bias carries the value through the layer: x = 0."""
    values = np.array([0.0, -0.0, 1e-30, -1e-30, 5, -5, 20, -20, 90, -90, 1e30, -1e30], np.float32)
    n = len(values)
    x, packed = np.zeros((1, 8), np.float32), kn.pack_int8_weight(np.ones((n, 8), np.int8))
    for name, function in ACTIVATIONS.items():
        with np.errstate(over="ignore"):
            expected = function(values.astype(np.float64))
        got = kn.int8_linear(x, packed, np.ones(n, "f4"), values, activation=name)
        np.testing.assert_allclose(got[0], expected, rtol=3e-6, atol=1e-6, err_msg=str(name))


def test_gelu_over_its_whole_range(isa: str) -> None:
    """Phi to 2e-7, at every number of rows that a tile may have: it is computed for several vectors at once."""
    values = np.linspace(-9, 9, 20011, dtype=np.float32)
    packed = kn.pack_int8_weight(np.ones((len(values), 8), np.int8))
    expected = ACTIVATIONS["gelu"](values.astype(np.float64))
    for rows in range(1, 8):
        got = kn.int8_linear(np.zeros((rows, 8), "f4"), packed, np.ones(len(values), "f4"), values, activation="gelu")
        assert (np.abs(got - expected) <= 2e-7 * np.abs(values) + 1e-9).all()


def test_nonfinite_rows_stay_in_their_rows(isa: str) -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(20, 70)).astype("f4")
    w = rng.integers(-127, 128, (33, 70), dtype=np.int8)
    packed, scale = kn.pack_int8_weight(w), np.full(33, 0.01, "f4")
    clean = kn.int8_linear(x, packed, scale)
    x[3, 5], x[11, 69] = np.nan, np.inf
    got = kn.int8_linear(x, packed, scale)
    others = [i for i in range(20) if i not in (3, 11)]
    np.testing.assert_array_equal(got[others], clean[others])
    assert np.isnan(got[[3, 11]]).all()
    static = kn.int8_linear(x, packed, scale, input_scale=0.05, input_zero_point=100)
    assert np.isnan(static[3]).all()
    assert np.isfinite(static[[i for i in range(20) if i != 3]]).all()


def test_finite_input_gives_finite_output(isa: str) -> None:
    x = np.zeros((4, 16), np.float32)
    x[1] = 1e-42
    x[2] = 3e38
    x[3, 0] = np.finfo(np.float32).tiny
    got = kn.int8_linear(x, kn.pack_int8_weight(np.eye(16, dtype=np.int8) * 127), np.full(16, 1e-3, "f4"))
    assert np.isfinite(got).all()


def test_result_does_not_depend_on_threads(isa: str) -> None:
    rng = np.random.default_rng(8)
    before = kn.num_threads()
    try:
        for m, n, k in [(1, 1000, 300), (13, 1061, 1023), (65, 190, 257), (200, 33, 64)]:
            x = rng.normal(size=(m, k)).astype("f4")
            w = full_range(rng, (n, k))
            scale = rng.uniform(0.001, 0.01, n).astype("f4")
            results = []
            for threads in (1, 2, 3, 7):
                kn.set_num_threads(threads)
                packed = kn.pack_int8_weight(w)
                results.append(
                    (
                        kn.int8_linear(x, packed, scale, activation="gelu"),
                        kn.int8_weight_only_linear(x, packed, scale),
                        packed,
                    )
                )
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    np.testing.assert_array_equal(a, b)
    finally:
        kn.set_num_threads(before)


def test_foreign_and_corrupt_blobs_are_refused() -> None:
    w = np.arange(-60, 60, dtype=np.int8).reshape(6, 20)
    packed = kn.pack_int8_weight(w)
    with pytest.raises(ValueError, match="packed"):
        kn.unpack_int8_weight(packed[:3])
    for position in range(0, 64, 4):
        broken = packed.copy().reshape(-1)
        broken[position] ^= 0x55
        with pytest.raises((ValueError, RuntimeError)):
            kn.unpack_int8_weight(broken.reshape(packed.shape))
    with pytest.raises(ValueError, match="packed"):
        kn.unpack_int8_weight(np.zeros((6, 200), np.uint8))
    others = [name for name in kdq_kernels.available_isas() if name != kdq_kernels.cpu_isa()]
    before = kdq_kernels.cpu_isa()
    try:
        kdq_kernels.set_isa(others[0])
        with pytest.raises((ValueError, RuntimeError), match="pack"):
            kn.int8_matmul(np.zeros((1, 20), np.int8), packed)
    finally:
        kdq_kernels.set_isa(before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": np.ones((2, 9), "f4")}, "9"),
        ({"x": np.ones((2, 8), "f8")}, "x.*float64"),
        ({"x": np.float32(1)}, "x"),
        ({"weight_scale": np.ones(3, "f4")}, "weight_scale"),
        ({"weight_scale": np.full(4, np.nan, "f4")}, "weight_scale"),
        ({"bias": np.ones(5, "f4")}, "bias"),
        ({"input_scale": 0.0}, "input_scale"),
        ({"input_scale": float("nan")}, "input_scale"),
        ({"input_scale": 0.1, "input_zero_point": 256}, "input_zero_point"),
        ({"input_zero_point": 3}, "input_zero_point"),
        ({"input_scale": 0.1, "input_quant_max": 256}, "input_quant_max"),
        ({"activation": "tanh"}, "activation.*tanh"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": np.ones((2, 8), "f4"),
        "packed": kn.pack_int8_weight(np.ones((4, 8), np.int8)),
        "weight_scale": np.ones(4, "f4"),
    }
    merged = {**arguments, **kwargs}
    merged["x"] = np.asarray(merged["x"])
    with pytest.raises(ValueError, match=message):
        kn.int8_linear(**merged)
