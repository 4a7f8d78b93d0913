"""codebook through the NumPy face, on every instruction set: the storage order spelled out, results against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kdq_kernels
import kdq_kernels.numpy as kn

every_isa = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.sampled_from([0, 1, 2, 3, 5, 6, 7, 12, 13, 15, 16, 17, 31, 33, 48, 64, 65, 130])
Array = NDArray[Any]


def random_layer(n: int, k: int, bits: int, seed: int) -> tuple[Array, Array, Array]:
    """(indices, packed, codebook)"""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    return indices, kn.pack_indices(indices, bits), rng.normal(size=2**bits).astype("f4")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (17, 33), (40, 100), (0, 5), (5, 0)])
def test_storage(shape: tuple[int, int], bits: int) -> None:
    n, k = shape
    indices, packed, _ = random_layer(n, k, bits, seed=0)
    per_word = 32 // bits
    expected = np.zeros((math.ceil(n / 16), math.ceil(k / per_word), 16), np.int64)
    for c in range(n):
        for i in range(k):
            expected[c // 16, i // per_word, c % 16] |= int(indices[c, i]) << (i % per_word * bits)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed.view(np.uint32), expected)
    np.testing.assert_array_equal(kn.unpack_indices(packed, bits, n, k), indices)


@every_isa
@given(m=sizes, n=sizes, k=sizes, bits=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_linear_is_exact_on_small_integers(isa: str, m: int, n: int, k: int, bits: int, seed: int) -> None:
    """Every look-up counts: with integers that float32 sums exactly, a wrong one cannot hide in rounding."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    codebook = rng.permutation(np.arange(-16, 16))[: 2**bits].astype("f4")
    x = rng.integers(-9, 10, (m, k)).astype("f4")
    got = kn.codebook_linear(x, kn.pack_indices(indices, bits), codebook, n)
    np.testing.assert_array_equal(got, x @ codebook[indices].T)


@pytest.mark.parametrize("rows", range(1, 15))
def test_every_height_and_width_of_tile(isa: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for bits in (1, 4, 5):
        for n in (1, 8, 9, 16, 17, 47, 64, 113, 128, 250):
            for k in (1, 7, 67):
                indices = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
                codebook = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype("f4")
                x, bias = rng.integers(-9, 10, (rows, k)).astype("f4"), np.arange(n, dtype="f4")
                expected = x @ codebook[indices].T + bias
                packed = kn.pack_indices(indices, bits)
                np.testing.assert_array_equal(kn.codebook_linear(x, packed, codebook, n, bias), expected)
                np.testing.assert_array_equal(
                    kn.codebook_linear(x.astype("f2"), packed, codebook, n, bias, activation="relu"),
                    np.maximum(expected, 0).astype("f2"),
                )


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("shape", [(1, 100, 1037), (3, 7, 65, 129), (67, 131, 300)])
def test_linear(isa: str, shape: tuple[int, ...], dtype: str, activation: str | None) -> None:
    *batch, n, k = shape
    rng = np.random.default_rng(1)
    indices, packed, codebook = random_layer(n, k, 4, seed=1)
    x, bias = rng.normal(size=(*batch, k)).astype(dtype), rng.normal(size=n).astype("f4")
    y = x.astype("f8") @ codebook[indices].astype("f8").T + bias
    if activation == "relu":
        y = np.maximum(y, 0)
    elif activation == "gelu":
        y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    elif activation == "silu":
        y = y / (1 + np.exp(-y))
    got = kn.codebook_linear(x, packed, codebook, n, bias, activation=activation)
    assert got.dtype == x.dtype
    assert got.shape == (*batch, n)
    tolerance = 1e-5 if dtype == "f4" else 1e-3
    np.testing.assert_allclose(got, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


def test_nonfinite_rows_stay_in_their_rows(isa: str) -> None:
    _, packed, codebook = random_layer(33, 70, 3, seed=2)
    x = np.random.default_rng(2).normal(size=(20, 70)).astype("f4")
    clean = kn.codebook_linear(x, packed, codebook, 33)
    x[3, 5] = np.nan
    got = kn.codebook_linear(x, packed, codebook, 33)
    assert np.isnan(got[3]).all()
    np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(clean, 3, 0))


def test_result_does_not_depend_on_threads(isa: str) -> None:
    before = kn.num_threads()
    try:
        for m, n, k in [(1, 1000, 900), (65, 190, 257)]:
            x = np.random.default_rng(3).normal(size=(m, k)).astype("f4")
            results = []
            for threads in (1, 2, 7):
                kn.set_num_threads(threads)
                _, packed, codebook = random_layer(n, k, 5, seed=3)
                results.append((packed, kn.codebook_linear(x, packed, codebook, n)))
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    np.testing.assert_array_equal(a, b)
    finally:
        kn.set_num_threads(before)


def test_packed_indices_serve_every_instruction_set() -> None:
    """Unlike a packed int8 weight: sums run in the order of k, so that even the roundings of two vector ISAs agree."""
    _, packed, codebook = random_layer(50, 300, 5, seed=4)
    x = np.random.default_rng(4).normal(size=(9, 300)).astype("f4")
    before, results = kdq_kernels.cpu_isa(), {}
    try:
        for name in kdq_kernels.available_isas():
            kdq_kernels.set_isa(name)
            results[name] = kn.codebook_linear(x, packed, codebook, 50)
    finally:
        kdq_kernels.set_isa(before)
    reference = results.pop("reference")
    for result in results.values():
        np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(result, next(iter(results.values())))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": np.ones((2, 9), "f4")}, r"packed: expected shape \[1, 2, 16\] for 4 x 9 indices of 4 bits, got \[1, 1"),
        ({"x": np.ones((2, 8), "f8")}, "x.*float64"),
        ({"codebook": np.ones(12, "f4")}, "codebook.*2, 4, 8, 16 or 32.*12"),
        ({"codebook": np.full(16, np.inf, "f4")}, "codebook.*inf"),
        ({"packed": np.ones((1, 1, 16), "i8")}, "packed.*int64"),
        ({"out_features": 17}, r"packed: expected shape \[2, 1, 16\]"),
        ({"out_features": -1}, "n: expected at least 0, got -1"),
        ({"bias": np.ones(5, "f4")}, "bias"),
        ({"activation": "tanh"}, "activation.*tanh"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": np.ones((2, 8), "f4"),
        "packed": kn.pack_indices(np.ones((4, 8), np.uint8), 4),
        "codebook": np.ones(16, "f4"),
        "out_features": 4,
    }
    with pytest.raises(ValueError, match=message):
        kn.codebook_linear(**{**arguments, **kwargs})


def test_indices_that_do_not_fit_are_refused() -> None:
    indices = np.zeros((40, 9), np.uint8)
    indices[33, 2] = 8
    with pytest.raises(ValueError, match="indices: expected below 8 for 3 bits, got 8 in row 33"):
        kn.pack_indices(indices, 3)
    with pytest.raises(ValueError, match="bits: expected 1 to 5, got 6"):
        kn.pack_indices(indices, 6)
    with pytest.raises(ValueError, match="packed: expected shape"):
        kn.unpack_indices(np.zeros((1, 1, 16), np.int32), 4, 4, 9)
