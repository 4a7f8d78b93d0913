"""int8_weight_only_linear on bfloat16 rows, on every instruction set: their products are exact in float32, and sums are
made in float32, also where the CPU multiplies bfloat16 natively."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdq_kernels as kk
from op_cases import int8, randn

# Rows in one, two and more tiles, in two blocks; channels in narrow and several panels; all remainders of k by 4.
SHAPES = [
    (1, 1, 1),
    (1, 100, 37),
    (2, 16, 64),
    (5, 65, 66),
    (12, 131, 303),
    (13, 131, 303),
    (67, 40, 129),
    (130, 200, 258),
    (600, 17, 64),
]


def layer(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and its scales."""
    m, n, k = shape
    return randn(m, k).bfloat16(), int8(n, k), randn(n, seed=2).abs() * 0.01 + 0.001


def sum_error_bound(x: Tensor, w: Tensor) -> Tensor:
    """Of exact products added up in float32, in any order: eps / 2 of the sum of magnitudes for each addition."""
    return x.shape[-1] * 2.0**-24 * (x.double().abs() @ w.double().abs().t())


def errors_of_sums(x: Tensor, w: Tensor, scale: Tensor, row: int) -> Tensor:
    """|error| of the sums of one row. The bias takes the exact result away, so that rounding what is left to bfloat16
    hides nothing."""
    exact = (x[row].double() @ w.double().t()) * scale
    bias = -exact.float()
    y = kk.int8_weight_only_linear(x, kk.pack_int8_weight(w), scale, bias)
    assert y.dtype == torch.bfloat16
    return ((y[row].double() - (exact + bias)).abs() * (1 - 2.0**-8) - 2.0**-22 * exact.abs()) / scale


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_float32(isa: str, shape: tuple[int, int, int]) -> None:
    x, w, scale = layer(shape)
    bound = sum_error_bound(x, w)
    for row in {0, shape[0] // 2, shape[0] - 1}:
        assert (errors_of_sums(x, w, scale, row) <= bound[row]).all()


def test_the_bound_refuses_a_sum_in_bfloat16() -> None:
    x, w, _ = layer((13, 131, 303))
    exact = x.double() @ w.double().t()
    assert ((exact.bfloat16().double() - exact).abs() > sum_error_bound(x, w)).double().mean() > 0.5


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_activations(isa: str, activation: str | None, rows: int) -> None:
    functions: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda y: y,
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
    }
    x, w, scale = layer((rows, 70, 130))
    bias = randn(70, seed=3)
    got = kk.int8_weight_only_linear(x, kk.pack_int8_weight(w), scale, bias, activation=activation)
    expected = functions[activation]((x.double() @ w.double().t()) * scale + bias)
    torch.testing.assert_close(got.double(), expected, rtol=2.0**-8, atol=1e-4)


def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    """Nor on where it lies in memory."""
    x, w, scale = layer((40, 70, 132))
    packed = kk.pack_int8_weight(w)
    whole = kk.int8_weight_only_linear(x, packed, scale)
    for rows in (slice(0, 1), slice(7, 19), slice(20, 33)):
        assert torch.equal(kk.int8_weight_only_linear(x[rows], packed, scale), whole[rows])
    moved = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert torch.equal(kk.int8_weight_only_linear(moved, packed, scale), whole)


@pytest.mark.parametrize("shape", [(6, 700, 512), (130, 200, 301), (600, 64, 128)])
def test_threads_do_not_change_the_result(isa: str, shape: tuple[int, int, int]) -> None:
    x, w, scale = layer(shape)
    packed = kk.pack_int8_weight(w)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(kk.int8_weight_only_linear(x, packed, scale))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [12, 20])
def test_nonfinite_rows_stay_in_their_rows(isa: str, rows: int) -> None:
    x, w, scale = layer((rows, 33, 71))
    w[:, -1] = w[:, -1].clamp(-1, 1)  # infinity times 0 among them
    packed = kk.pack_int8_weight(w)
    clean = kk.int8_weight_only_linear(x, packed, scale)
    x[3, 5], x[11, -1] = torch.nan, torch.inf
    got = kk.int8_weight_only_linear(x, packed, scale)
    assert got[3].isnan().all()
    torch.testing.assert_close(got[11], w[:, -1].bfloat16() * torch.inf, equal_nan=True, rtol=0, atol=0)
    others = [r for r in range(rows) if r not in (3, 11)]
    assert torch.equal(got[others], clean[others])


def test_subnormal_numbers_may_count_as_zero(isa: str) -> None:
    tiny = torch.finfo(torch.float32).tiny
    x, w, scale = torch.full((20, 66), tiny / 4).bfloat16(), int8(33, 66), torch.ones(33)
    got = kk.int8_weight_only_linear(x, kk.pack_int8_weight(w), scale).double()
    exact = x.double() @ w.double().t()
    assert ((got - exact).abs() <= exact.abs() * 2.0**-8 + 66 * 128 * tiny / 4).all()
