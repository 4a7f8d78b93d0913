"""Choosing quantization grids: scales and zero points for weights and activations.

Training and inference both take their grids from here, so that they mean the same integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import kdq_kernels as kk

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
SEARCH_STEPS = 64


@dataclass(frozen=True)
class AffineGrid:
    """Unsigned activations: `q = clamp(round(x / scale) + zero_point, 0, quant_max)`. scale float32, zero_point
    int32, 0-d."""

    scale: Tensor
    zero_point: Tensor


def weight_range(bits: int) -> tuple[int, int]:
    """The integers of a `bits`-bit weight: symmetric for 8 bits, all `2**bits` values below (LSQ, Esser et al.
    2020)."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def int8_weight_scale(weight: Tensor) -> Tensor:
    """`max|w| / 127` of each output channel: weight `[N, K]` -> float32 `[N]`."""
    return channel_magnitude(weight).div(127).clamp_min(SMALLEST_SCALE)


def channel_magnitude(weight: Tensor) -> Tensor:
    """`max|w|` of each row; 0 for rows without elements."""
    return weight.float().abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight)).float()


def low_bit_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale of each output channel with the least squared rounding error, of 64 candidates below the one that
    clips nothing.

    For 1 bit it is known in closed form: the mean magnitude (Rastegari et al. 2016).
    """
    if bits == 1:
        return weight.abs().mean(1).clamp_min(SMALLEST_SCALE)
    quant_min, quant_max = weight_range(bits)
    largest = channel_magnitude(weight).div(max(quant_max, 1)).clamp_min(SMALLEST_SCALE * SEARCH_STEPS)
    best_scale = largest
    best_error = torch.full_like(largest, torch.inf)
    for step in range(SEARCH_STEPS):
        scale = largest * (1 - step / SEARCH_STEPS)
        fake = kk.fake_quantize(weight, scale, quant_min=quant_min, quant_max=quant_max, axis=0)
        error = (fake - weight).square().sum(1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def low_bit_weight_integers(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 `[N, K]`: ±1 for 1 bit, else `quantize` on the grid of `weight_range`."""
    if bits == 1:
        return torch.where(weight < 0, -1, 1).to(torch.int8)
    quant_min, quant_max = weight_range(bits)
    return kk.quantize(weight, scale, quant_min=quant_min, quant_max=quant_max, axis=0)


def dorefa_weight(weight: Tensor) -> Tensor:
    """`tanh(w) / max|tanh w|`, float32: the weight that DoReFa-Net (Zhou et al. 2016) rounds. Zeros stay."""
    bounded = weight.float().tanh()
    largest = bounded.abs().amax()
    return bounded / torch.where(largest > 0, largest, 1.0)


def dorefa_weight_integers(bounded: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(int8 `[N, K]`, float32 `[N]`) of a `dorefa_weight`: DoReFa's `2 quantize_k(b / 2 + 1/2) - 1` is the product of
    an odd integer `2 round((b / 2 + 1/2) n) - n` and the scale `1 / n`, with `n = 2**bits - 1`."""
    levels = 2**bits - 1
    integers = ((bounded / 2 + 0.5) * levels).round() * 2 - levels
    return integers.to(torch.int8), torch.full((len(bounded),), 1 / levels)


def affine_grid(low: float, high: float, bits: int) -> AffineGrid:
    """The grid whose ends are at `low` and `high`, widened to contain 0, so that padding and ReLU's zero are exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    quant_max = 2**bits - 1
    scale = max((high - low) / quant_max, SMALLEST_SCALE * 256)
    zero_point = min(max(round(-low / scale), 0), quant_max)
    return AffineGrid(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))


def clipped_range(low: float, high: float, share: float) -> tuple[float, float]:
    """`[low, high]` without the values whose magnitude is above `share` of the largest: an outlier at one end does not
    cost values at the other."""
    threshold = share * max(-low, high)
    return max(low, -threshold), min(high, threshold)


def search_affine_grid(
    sample: Tensor,
    low: float,
    high: float,
    bits: int,
    counts: Tensor | None = None,
    pooled: Callable[[list[float]], list[float]] = list,
) -> AffineGrid:
    """The grid with the least squared error on `sample`, of 64 that clip `[low, high]`.

    counts: how often each element of the sample occurs, None: once. pooled: turns the errors on this sample into those
    on all ranks' samples.
    """
    grids = [affine_grid(*clipped_range(low, high, 1 - step / SEARCH_STEPS), bits) for step in range(SEARCH_STEPS)]
    errors = []
    for grid in grids:
        scale, zero_point = grid.scale.to(sample.device), grid.zero_point.to(sample.device)
        fake = kk.fake_quantize(sample, scale, zero_point, quant_min=0, quant_max=2**bits - 1)
        squares = (fake - sample).square()
        errors.append(float(squares.sum() if counts is None else squares.double() @ counts.double()))
    best, best_error = affine_grid(low, high, bits), torch.inf
    for grid, error in zip(grids, pooled(errors), strict=True):
        if error < best_error:
            best, best_error = grid, error
    return best
