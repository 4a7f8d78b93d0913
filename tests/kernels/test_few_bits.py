"""Weights packed in 4 and 2 bits: results are those of the same integers in 8 bits, to the last bit, on every
instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdq_kernels as kk
import kdq_kernels.numpy as kn
from op_cases import randn

# One, few and many rows; channels in narrow and several panels, side by side and left over; all remainders of k by 16.
SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (1, 1000, 37),
    (2, 300, 129),
    (3, 17, 65),
    (4, 257, 98),
    (5, 70, 19),
    (6, 40, 256),
    (7, 130, 70),
    (13, 200, 301),
    (100, 129, 258),
    (1, 257, 5),
]
GRIDS: list[dict[str, Any]] = [
    {},
    {"input_scale": 0.05, "activation": "relu"},
    {"input_scale": 0.05, "input_zero_point": 3, "input_quant_max": 15, "activation": "gelu"},
]


def integers(n: int, k: int, bits: int) -> Tensor:
    """With both ends of the range, if there is room."""
    half = 1 << (bits - 1)
    w = torch.randint(-half, half, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(4))
    w.view(-1)[-1], w.view(-1)[0] = half - 1, -half
    return w


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_from_eight_bits(isa: str, shape: tuple[int, int, int], bits: int) -> None:
    m, n, k = shape
    w, scale, bias = integers(n, k, bits), randn(n, seed=2).abs() * 0.01 + 0.001, randn(n, seed=3)
    packed, eight = kk.pack_int8_weight(w, bits), kk.pack_int8_weight(w)
    assert torch.equal(kk.unpack_int8_weight(packed), w)
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(m, k).to(dtype)
        for grid in GRIDS:
            got = kk.int8_linear(x, packed, scale, bias, **grid)
            assert torch.equal(got, kk.int8_linear(x, eight, scale, bias, **grid))


@pytest.mark.parametrize("bits", [4, 2])
def test_convolutions(isa: str, bits: int) -> None:
    x, w, scale = randn(2, 5, 9, 8), integers(70, 5 * 9, bits), randn(70, seed=2).abs() * 0.01 + 0.001
    window: dict[str, Any] = {"kernel_size": (3, 3), "padding": (1, 1)}
    for grid in ({}, {"input_scale": 0.05}):
        got = kk.int8_conv2d(x, kk.pack_int8_weight(w, bits), scale, **window, **grid)
        assert torch.equal(got, kk.int8_conv2d(x, kk.pack_int8_weight(w), scale, **window, **grid))


@pytest.mark.parametrize("bits", [4, 2])
def test_a_row_with_nan_stays_alone(isa: str, bits: int) -> None:
    x, w, scale = randn(9, 70), integers(33, 70, bits), torch.ones(33)
    packed = kk.pack_int8_weight(w, bits)
    clean = kk.int8_linear(x, packed, scale)
    x[4, 7] = torch.nan
    got = kk.int8_linear(x, packed, scale)
    assert got[4].isnan().all()
    others = [r for r in range(9) if r != 4]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("rows", [1, 40])
def test_threads_do_not_change_the_result(isa: str, rows: int) -> None:
    x, packed, scale = randn(rows, 600), kk.pack_int8_weight(integers(3000, 600, 4), 4), torch.ones(3000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(kk.int8_linear(x, packed, scale))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_memory(isa: str) -> None:
    sizes = [kk.pack_int8_weight(integers(1024, 1024, 2), bits).numel() for bits in (8, 4, 2)]
    assert sizes[1] < 0.51 * sizes[0]
    assert sizes[2] < 0.26 * sizes[0]


def test_numpy_is_the_same() -> None:
    x, w, scale = randn(3, 70), integers(33, 70, 4), np.ones(33, np.float32)
    packed = kn.pack_int8_weight(w.numpy(), 4)
    np.testing.assert_array_equal(kn.unpack_int8_weight(packed), w)
    got = kn.int8_linear(x.numpy(), packed, scale)
    np.testing.assert_array_equal(got, kn.int8_linear(x.numpy(), kn.pack_int8_weight(w.numpy()), scale))


def test_bad_arguments() -> None:
    w = integers(5, 70, 4)
    with pytest.raises(ValueError, match="bits: expected 8, 4 or 2, got 3"):
        kk.pack_int8_weight(w, 3)
    with pytest.raises(ValueError, match="bits: expected 8, 4 or 2, got 16"):
        kn.pack_int8_weight(w.numpy(), 16)
    w[3, 9] = 8
    with pytest.raises(ValueError, match=r"w: expected values from -8 to 7 for 4 bits, got 8 at \[3, 9\]"):
        kk.pack_int8_weight(w, 4)
    packed, one = kk.pack_int8_weight(integers(5, 70, 4), 4), torch.ones(5)
    with pytest.raises(ValueError, match="b: holds weights of 4 bits, which int8_linear and int8_conv2d alone take"):
        kk.int8_matmul(integers(2, 70, 8), packed)
    with pytest.raises(ValueError, match="packed: holds weights of 4 bits, which int8_linear and int8_conv2d alone"):
        kk.int8_weight_only_linear(randn(2, 70), packed, one)
    flat = packed.flatten()
    flat[12] = 5  # the header's bits
    with pytest.raises(ValueError, match="packed: the header is corrupt"):
        kk.int8_linear(randn(2, 70), flat.view_as(packed), one)
