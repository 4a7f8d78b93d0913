"""binary_gemm through the NumPy face, on every instruction set: exact against integer dot products of +-1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kdq_kernels.numpy as kn

every_isa = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rows = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 65])
depths = st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 640, 1000, 1984, 2049, 4097])
Array = NDArray[Any]


def signs(x: Array) -> NDArray[np.int64]:
    return np.where(x < 0, -1, 1)


def python_bits(x: Array) -> list[list[int]]:
    """The storage order, spelled out: element i is bit i % 64 of word i // 64, set for -1."""
    words = (x.shape[1] + 63) // 64
    table = [[0] * words for _ in range(x.shape[0])]
    for r, c in np.argwhere(x < 0):
        table[r][c // 64] |= 1 << (int(c) % 64)
    return table


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (5, 65), (4, 200), (0, 7), (3, 0)])
def test_pack_signs(isa: str, shape: tuple[int, int], dtype: str) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    flat = x.reshape(-1)
    flat[: min(5, flat.size)] = np.array([0.0, -0.0, np.nan, -np.inf, np.inf], dtype)[: min(5, flat.size)]
    bits = kn.pack_signs(x)
    assert bits.dtype == np.int64
    assert bits.view(np.uint64).tolist() == python_bits(x)
    np.testing.assert_array_equal(kn.unpack_signs(bits, shape[1]), signs(x))


def test_negative_nan_is_plus_one(isa: str) -> None:
    for dtype in ("f4", "f2"):
        x = np.full((1, 70), -np.nan, dtype)
        assert np.signbit(x).all()
        np.testing.assert_array_equal(kn.pack_signs(x), 0)


@every_isa
@given(m=rows, n=rows, k=depths, seed=st.integers(0, 2**32 - 1))
def test_matmul_is_exact(isa: str, m: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(m, k)).astype("f4"), rng.normal(size=(n, k)).astype("f4")
    got = kn.binary_matmul(kn.pack_signs(a), kn.pack_signs(b), k)
    np.testing.assert_array_equal(got, signs(a) @ signs(b).T)


@pytest.mark.parametrize("rows", range(1, 10))
def test_every_height_and_width_of_tile(isa: str, rows: int) -> None:
    """Each number of rows and of vectors of channels is an instance of its own, with several ways out of it."""
    rng = np.random.default_rng(rows)
    for n in (1, 8, 9, 16, 17, 32, 33, 48, 63, 64, 65, 130):
        for k in (1, 64, 65, 700):
            x, w = rng.normal(size=(rows, k)).astype("f4"), rng.normal(size=(n, k)).astype("f4")
            exact = signs(x) @ signs(w).T
            bits = kn.pack_signs(w)
            np.testing.assert_array_equal(kn.binary_matmul(kn.pack_signs(x), bits, k), exact)
            scale, bias = np.full(n, 0.5, "f4"), np.arange(n, dtype="f4")
            expected = exact * 0.5 + bias
            np.testing.assert_array_equal(kn.binary_linear(x, bits, scale, bias), expected)
            np.testing.assert_array_equal(kn.binary_linear(x.astype("f2"), bits, scale, bias), expected.astype("f2"))


@pytest.mark.parametrize("sign", [1, -1])
def test_matmul_counts_every_bit_of_a_long_row(isa: str, sign: int) -> None:
    """All bits differ (or none): per-byte counters must be flushed before they wrap."""
    k = 70_001
    a = np.ones((9, k), np.float32)
    b = np.full((11, k), sign, np.float32)
    got = kn.binary_matmul(kn.pack_signs(a), kn.pack_signs(b), k)
    np.testing.assert_array_equal(got, np.full((9, 11), sign * k))


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 100, 77), (3, 5, 33, 129), (70, 31, 512)])
def test_linear(isa: str, shape: tuple[int, ...], dtype: str) -> None:
    *batch, n, k = shape
    rng = np.random.default_rng(2)
    x = rng.normal(size=(*batch, k)).astype(dtype)
    w = rng.normal(size=(n, k)).astype("f4")
    scale = rng.uniform(0.01, 0.1, n).astype("f4")
    bias = rng.normal(size=n).astype("f4") if n % 2 else None
    got = kn.binary_linear(x, kn.pack_signs(w), scale, bias)
    assert got.dtype == x.dtype
    expected = (signs(x) @ signs(w).T) * scale.astype("f8") + (0 if bias is None else bias)
    tolerance = 1e-6 if dtype == "f4" else 1e-3
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("threads", [1, 3])
def test_products_beyond_the_caches(isa: str, threads: int) -> None:
    """x of more than 1 MiB, several blocks of rows: the code that asks ahead runs."""
    rng = np.random.default_rng(14)
    x, w = rng.normal(size=(300, 1100)).astype("f4"), rng.normal(size=(600, 1100)).astype("f4")
    before = kn.num_threads()
    try:
        kn.set_num_threads(threads)
        got = kn.binary_linear(x, kn.pack_signs(w), np.ones(600, "f4"))
    finally:
        kn.set_num_threads(before)
    np.testing.assert_array_equal(got, signs(x) @ signs(w).T)


def test_result_does_not_depend_on_threads(isa: str) -> None:
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(130, 700)).astype("f4"), kn.pack_signs(rng.normal(size=(90, 700)).astype("f4"))
    scale = np.full(90, 0.1, "f4")
    before = kn.num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            kn.set_num_threads(threads)
            results.append(kn.binary_linear(x, w, scale))
        for other in results[1:]:
            np.testing.assert_array_equal(results[0], other)
    finally:
        kn.set_num_threads(before)


def test_bad_arguments_are_named() -> None:
    bits = kn.pack_signs(np.ones((2, 70), np.float32))
    with pytest.raises(ValueError, match="a_bits"):
        kn.binary_matmul(bits, bits, 200)
    with pytest.raises(ValueError, match="b_bits"):
        kn.binary_matmul(bits, bits[:, :1], 70)
    with pytest.raises(ValueError, match="k"):
        kn.unpack_signs(bits, -1)
    with pytest.raises(ValueError, match="a_bits.*int64.*float32"):
        kn.binary_matmul(np.ones((2, 2), np.float32), bits, 70)
    dirty = bits.copy()
    dirty[1, 1] |= 1 << 40
    with pytest.raises(ValueError, match="a_bits"):
        kn.binary_matmul(dirty, bits, 70)
    with pytest.raises(ValueError, match="weight_scale"):
        kn.binary_linear(np.ones((2, 70), np.float32), bits, np.ones(3, np.float32))


def test_linear_is_exact_for_rows_longer_than_float32_can_count(isa: str) -> None:
    k = 2**24 + 1
    w = np.ones((1, k), np.float16)
    w[0, : 2**23] = -1
    got = kn.binary_linear(np.ones((1, k), np.float16), kn.pack_signs(w), np.ones(1, np.float32), None)
    np.testing.assert_array_equal(got, [[1]])


# ---- from bits to bits -----------------------------------------------------------------------------------------------


def below(dots: Array, threshold: Array) -> Array:
    """The bits that `binary_threshold` means, spelled out."""
    m, n = dots.shape
    words = (n + 63) // 64
    table = np.zeros((m, words * 64), np.uint8)
    table[:, :n] = dots < threshold
    return np.frombuffer(np.packbits(table, axis=1, bitorder="little").tobytes(), "<i8").reshape(m, words)


@every_isa
@given(m=rows, n=rows, k=depths, seed=st.integers(0, 2**32 - 1))
def test_threshold_is_a_comparison_of_the_exact_dot(isa: str, m: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, w = rng.normal(size=(m, k)).astype("f4"), rng.normal(size=(n, k)).astype("f4")
    dots = signs(a) @ signs(w).T
    threshold = rng.integers(-k - 1, k + 2, n).astype("i4")
    if m and n:  # ties, which random thresholds of long rows would miss
        threshold = np.where(rng.random(n) < 0.5, dots[0], threshold).astype("i4")
    expected = below(dots, threshold)
    a_bits, w_bits = kn.pack_signs(a), kn.pack_signs(w)
    np.testing.assert_array_equal(kn.binary_threshold(a_bits, w_bits, threshold, k=k), expected)
    np.testing.assert_array_equal(kn.binary_threshold(a, w_bits, threshold), expected)


@pytest.mark.parametrize("rows", range(1, 10))
def test_threshold_of_every_height_and_width_of_tile(isa: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for n in (1, 8, 9, 16, 33, 63, 64, 65, 128, 130, 257):
        for k in (1, 64, 65, 700):
            x, w = rng.normal(size=(rows, k)).astype("f2"), rng.normal(size=(n, k)).astype("f4")
            threshold = rng.integers(-3, 4, n).astype("i4")
            got = kn.binary_threshold(x, kn.pack_signs(w), threshold)
            np.testing.assert_array_equal(got, below(signs(x) @ signs(w).T, threshold))


def test_threshold_at_the_ends_of_its_range(isa: str) -> None:
    """At most -k: always +1. More than k: always -1. Also where the dot is -k or k itself."""
    k, n = 65, 70
    x = np.ones((9, k), np.float32)
    for sign in (1, -1):
        w = kn.pack_signs(np.full((n, k), sign, np.float32))
        for value, bit in ((-(2**31), 0), (-k, 0), (k + 1, 1), (2**31 - 1, 1), (sign * k, 0), (sign * k + 1, 1)):
            got = kn.binary_threshold(x, w, np.full(n, value, "i4"))
            np.testing.assert_array_equal(got, below(np.zeros((9, n)), np.full(n, bit)))


def test_threshold_counts_every_bit_of_a_long_row(isa: str) -> None:
    k = 70_001
    a, w = np.ones((9, k), np.float32), kn.pack_signs(np.full((11, k), -1, np.float32))
    np.testing.assert_array_equal(kn.binary_threshold(a, w, np.full(11, -k, "i4")), 0)
    np.testing.assert_array_equal(kn.binary_threshold(a, w, np.full(11, 1 - k, "i4")), 2**11 - 1)


def test_linear_takes_packed_signs(isa: str) -> None:
    """The same bits as from the values, whatever their dtype: the result is float32."""
    rng = np.random.default_rng(6)
    for batch, n, k in (((1,), 10, 130), ((3, 5), 77, 64), ((40,), 130, 700)):
        x, w = rng.normal(size=(*batch, k)).astype("f4"), kn.pack_signs(rng.normal(size=(n, k)).astype("f4"))
        scale, bias = rng.uniform(0.1, 1, n).astype("f4"), rng.normal(size=n).astype("f4")
        got = kn.binary_linear(kn.pack_signs(x), w, scale, bias, k=k)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, kn.binary_linear(x, w, scale, bias))


def test_bits_do_not_depend_on_threads(isa: str) -> None:
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(230, 700)).astype("f4"), kn.pack_signs(rng.normal(size=(390, 700)).astype("f4"))
    threshold = rng.integers(-30, 30, 390).astype("i4")
    before = kn.num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            kn.set_num_threads(threads)
            results.append(kn.binary_threshold(x, w, threshold))
    finally:
        kn.set_num_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_bad_arguments_of_bits_are_named() -> None:
    bits, threshold = kn.pack_signs(np.ones((2, 70), np.float32)), np.zeros(2, "i4")
    with pytest.raises(ValueError, match="k: expected the number of features"):
        kn.binary_threshold(bits, bits, threshold)
    with pytest.raises(ValueError, match="k: expected 70.*got 71"):
        kn.binary_threshold(np.ones((2, 70), np.float32), bits, threshold, k=71)
    with pytest.raises(ValueError, match="x: expected 4 words"):
        kn.binary_linear(bits, bits, np.ones(2, "f4"), k=200)
    with pytest.raises(ValueError, match="threshold: expected dtype int32, got float32"):
        kn.binary_threshold(bits, bits, np.zeros(2, "f4"), k=70)
    with pytest.raises(ValueError, match="threshold: expected shape"):
        kn.binary_threshold(bits, bits, np.zeros(3, "i4"), k=70)
    dirty = bits.copy()
    dirty[1, 1] |= 1 << 40
    with pytest.raises(ValueError, match="x_bits: row 1"):
        kn.binary_threshold(dirty, bits, threshold, k=70)
    with pytest.raises(ValueError, match="weight_bits: row 1"):
        kn.binary_threshold(bits, dirty, threshold, k=70)
