"""Observers: how calibration chooses the grid of a layer's activations from the values that come by.

An observer (`MinMax`, `Percentile`, ...) is a frozen config; `start()` makes the state that sees tensors, merges with
the states of other processes, and gives an `AffineGrid`. A state takes memory for the spread of the values, not for
their number, and is the same however often it is run. NaN and infinite elements are left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.grids import AffineGrid, affine_grid, clipped_range, search_affine_grid

CHUNK = 1 << 22  # elements worked on at a time
DROPPED_BITS = 13  # of a float32: 10 bits of mantissa stay, all that a float16 or bfloat16 has
SIGN_BIT = 1 << (31 - DROPPED_BITS)
KL_CANDIDATES = 256


class ObserverState(ABC):
    """What an observer has seen of one layer's input. States pickle, so that processes can exchange and merge them."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.low = float("inf")
        self.high = float("-inf")

    def observe(self, x: Tensor) -> None:
        """Takes in a tensor of any shape and floating-point dtype."""
        ends = [(float(chunk.min()), float(chunk.max())) for chunk in _finite_chunks(x)]
        if ends:
            self._see(x, min(low for low, _ in ends), max(high for _, high in ends))

    def merge(self, other: ObserverState) -> None:
        """Takes in what another state has seen, as of another process.

        Raises:
            TypeError: the other is of another observer, or of one with other settings.
        """
        if not isinstance(other, ObserverState) or other.observer != self.observer:
            raise TypeError(f"other: expected a state of {self.observer}, got {getattr(other, 'observer', other)!r}")
        if other.low <= other.high:
            self._merge(other)

    def grid(self, bits: int) -> AffineGrid:
        """The grid of `bits` bits.

        Raises:
            ValueError: bits is not an integer from 1 to 8.
            RuntimeError: nothing finite was seen.
        """
        if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
            raise ValueError(f"bits: expected an integer from 1 to 8, got {bits!r}")
        if self.low > self.high:
            raise RuntimeError("calibration saw no finite activation of this layer")
        return self._grid(bits)

    @abstractmethod
    def _see(self, x: Tensor, low: float, high: float) -> None: ...

    @abstractmethod
    def _merge(self, other: ObserverState) -> None: ...

    def _grid(self, bits: int) -> AffineGrid:
        return affine_grid(self.low, self.high, bits)


def _finite_chunks(x: Tensor) -> Iterator[Tensor]:
    """The finite elements in float32, at most CHUNK at a time; no chunk is empty."""
    for chunk in x.detach().flatten().split(CHUNK):
        values = chunk.float()
        values = values[torch.isfinite(values)]
        if values.numel():
            yield values


# ---- ranges ----------------------------------------------------------------------------------------------------------


class _RangeState(ObserverState):
    def _see(self, x: Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _merge(self, other: ObserverState) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class _AverageState(ObserverState):
    def __init__(self, observer: MovingAverage) -> None:
        super().__init__(observer)
        self.momentum = observer.momentum
        self.tensors = 0

    def _see(self, x: Tensor, low: float, high: float) -> None:
        self._blend(low, high, self.momentum, 1)

    def _merge(self, other: ObserverState) -> None:
        assert isinstance(other, _AverageState)
        self._blend(other.low, other.high, other.tensors / (self.tensors + other.tensors), other.tensors)

    def _blend(self, low: float, high: float, share: float, tensors: int) -> None:
        if self.tensors == 0:
            self.low, self.high = low, high
        else:
            self.low += share * (low - self.low)
            self.high += share * (high - self.high)
        self.tensors += tensors


@dataclass(frozen=True)
class MinMax:
    """From the smallest to the largest value ever seen.

    Clips nothing, so one outlier takes levels from all other values: for data without outliers, or 8 bits.
    """

    def start(self) -> ObserverState:
        return _RangeState(self)


@dataclass(frozen=True)
class MovingAverage:
    """Exponential moving averages of each tensor's minimum and maximum (Jacob et al., "Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).

    A single odd batch counts little. Depends on the order of the batches; a merge weighs both states by their numbers
    of tensors.
    """

    momentum: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum: expected a number above 0, at most 1, got {self.momentum!r}")

    def start(self) -> ObserverState:
        return _AverageState(self)


# ---- distributions ---------------------------------------------------------------------------------------------------


class _CountState(ObserverState):
    """Counts the values, rounded to a mantissa of 10 bits: exact for float16 and bfloat16, within 1/2048 of the value
    for float32. That takes some hundred kilobytes, never needs another range, and merges by adding: the order of the
    tensors does not matter, to the bit.

    keys: int64, ascending, the leading bits of the float32 pattern; counts: int64.
    """

    observer: Percentile | MeanSquaredError | KLHistogram

    def __init__(self, observer: Percentile | MeanSquaredError | KLHistogram) -> None:
        super().__init__(observer)
        self.keys = torch.empty(0, dtype=torch.int64)
        self.counts = torch.empty(0, dtype=torch.int64)

    def _see(self, x: Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        for values in _finite_chunks(x):
            half = 1 << (DROPPED_BITS - 1)  # added to the pattern, it rounds the magnitude, whatever the sign
            keys = (values.contiguous().view(torch.int32) + half) >> DROPPED_BITS
            counts = torch.bincount(keys.cpu() + SIGN_BIT, minlength=2 * SIGN_BIT)
            seen = counts.nonzero().squeeze(1)
            self._add(seen - SIGN_BIT, counts[seen])

    def _merge(self, other: ObserverState) -> None:
        assert isinstance(other, _CountState)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._add(other.keys, other.counts)

    def _add(self, keys: Tensor, counts: Tensor) -> None:
        self.keys, places = torch.unique(torch.cat([self.keys, keys]), return_inverse=True)
        both = torch.cat([self.counts, counts])
        self.counts = torch.zeros(len(self.keys), dtype=torch.int64).index_add_(0, places, both)

    def values(self) -> tuple[Tensor, Tensor]:
        """The values seen, float32, ascending, and how often each was."""
        values = (self.keys << DROPPED_BITS).to(torch.int32).view(torch.float32).clamp(self.low, self.high)
        order = values.argsort(stable=True)
        return values[order], self.counts[order]

    def _grid(self, bits: int) -> AffineGrid:
        values, counts = self.values()
        return self.observer.choose(values, counts, self.low, self.high, bits)


@dataclass(frozen=True)
class Percentile:
    """From the `100 - percentile`-th to the `percentile`-th percentile: that share is clipped at each end.

    For heavy tails whose largest values matter little. The right share depends on the model: where a few large values
    carry the meaning, as in transformers' outlier channels, prefer `MeanSquaredError`.
    """

    percentile: float = 99.9

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile: expected a number above 50, at most 100, got {self.percentile!r}")

    def start(self) -> ObserverState:
        return _CountState(self)

    def choose(self, values: Tensor, counts: Tensor, low: float, high: float, bits: int) -> AffineGrid:
        """The grid between the two percentiles, each counted from its own end: mirrored values give mirrored ends."""
        if self.percentile < 100:
            low = self._beyond_the_clipped(values, counts)
            high = self._beyond_the_clipped(values.flip(0), counts.flip(0))
        return affine_grid(low, high, bits)

    def _beyond_the_clipped(self, values: Tensor, counts: Tensor) -> float:
        """The first value that is not clipped."""
        clipped = int(counts.sum()) * (100 - self.percentile) / 100
        return float(values[int((counts.cumsum(0) <= clipped).sum())])


@dataclass(frozen=True)
class MeanSquaredError:
    """The range with the least squared error, of 64 between 0 and the whole one. The default.

    Weighs clipping against rounding for the number of bits at hand; good from 2 to 8 bits.
    """

    def start(self) -> ObserverState:
        return _CountState(self)

    def choose(self, values: Tensor, counts: Tensor, low: float, high: float, bits: int) -> AffineGrid:
        return search_affine_grid(values, low, high, bits, counts)


@dataclass(frozen=True)
class KLHistogram:
    """The range whose quantized histogram loses the least information: KL(before || after), over a histogram of `bins`
    bins (Migacz, "8-bit Inference with TensorRT", 2017).

    Made for 8 bits and activations after a ReLU, where it clips long tails; with few bits, or where zero itself is
    the most frequent value by far, `MeanSquaredError` is the safer choice. Levels here are those of the affine grid, so
    that negative values are handled too.
    """

    bins: int = 2048

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int) or isinstance(self.bins, bool) or not 512 <= self.bins <= 1 << 16:
            raise ValueError(f"bins: expected an integer from 512 to 65536, got {self.bins!r}")

    def start(self) -> ObserverState:
        return _CountState(self)

    def choose(self, values: Tensor, counts: Tensor, low: float, high: float, bits: int) -> AffineGrid:
        """Of KL_CANDIDATES ranges, from 2**bits bins to all of them, the one with the least divergence."""
        low, high = min(low, 0.0), max(high, 0.0)
        width = (high - low) / self.bins
        if width < torch.finfo(torch.float32).tiny:
            return affine_grid(low, high, bits)
        bins = ((values.double() - low) / width).long().clamp(0, self.bins - 1)
        histogram = torch.zeros(self.bins, dtype=torch.float64).index_add_(0, bins, counts.double())
        centres = (low + (torch.arange(self.bins, dtype=torch.float64) + 0.5) * width).float()
        best, best_divergence = affine_grid(low, high, bits), torch.inf
        kept = torch.linspace(self.bins, 2**bits, KL_CANDIDATES).round().unique().flip(0).tolist()
        for count in kept:
            bottom, top = clipped_range(low, high, count / self.bins)
            grid = affine_grid(bottom, top, bits)
            inside = (centres >= bottom) & (centres <= top)
            levels = kk.quantize(centres, grid.scale, grid.zero_point, quant_min=0, quant_max=2**bits - 1).long()
            divergence = _divergence(histogram, inside, levels, 2**bits)
            if divergence < best_divergence:
                best, best_divergence = grid, divergence
        return best


def _divergence(histogram: Tensor, inside: Tensor, levels: Tensor, count: int) -> float:
    """KL between a clipped histogram and its quantized form, in nats; all `[bins]`, levels from 0 to count - 1.

    As in the paper, what lies outside is added to the outermost bins of the clipped histogram only, and a level spreads
    evenly over its bins that are not empty.
    """
    filled = (inside & (histogram > 0)).nonzero().squeeze(1)
    if len(filled) == 0:
        return torch.inf
    first, last = int(filled[0]), int(filled[-1])
    before = histogram[filled].clone()
    after_level = levels[filled]
    mass = torch.zeros(count, dtype=torch.float64).index_add_(0, after_level, before)
    bins = torch.bincount(after_level, minlength=count).clamp_min(1)
    after = (mass / bins)[after_level]
    before[0] += histogram[:first].sum()
    before[-1] += histogram[last + 1 :].sum()
    before, after = before / before.sum(), after / after.sum()
    return float((before * (before / after).log()).sum())


Observer: TypeAlias = MinMax | MovingAverage | Percentile | MeanSquaredError | KLHistogram
DEFAULT_OBSERVER = MeanSquaredError()


def check_observer(observer: Observer) -> None:
    """Raises TypeError unless it is one of this module's."""
    kinds = (MinMax, MovingAverage, Percentile, MeanSquaredError, KLHistogram)
    if not isinstance(observer, kinds):
        raise TypeError(f"observer: expected one of {', '.join(k.__name__ for k in kinds)}, got {observer!r}")
