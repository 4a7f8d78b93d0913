"""Observers: grids against plain formulas, streaming and merging, and what they do to a quantized model."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdq
import kdq_kernels as kk
from kdq.grids import AffineGrid, search_affine_grid
from kdq.observers import Observer

OBSERVERS: list[Observer] = [
    kdq.MinMax(),
    kdq.MovingAverage(),
    kdq.Percentile(99.9),
    kdq.MeanSquaredError(),
    kdq.KLHistogram(),
]
every_observer = pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 17, generator=generator) * scale + 0.3 for n, scale in ((30, 1.0), (50, 2.0), (7, 0.1))]


def grid_of(observer: Observer, tensors: list[Tensor], bits: int = 8) -> AffineGrid:
    state = observer.start()
    for tensor in tensors:
        state.observe(tensor)
    return state.grid(bits)


def ends(grid: AffineGrid, bits: int = 8) -> tuple[float, float]:
    return float(-grid.zero_point * grid.scale), float((2**bits - 1 - grid.zero_point) * grid.scale)


def squared_error(x: Tensor, grid: AffineGrid, bits: int) -> float:
    fake = kk.fake_quantize(x, grid.scale, grid.zero_point, quant_min=0, quant_max=2**bits - 1)
    return float((fake.double() - x.double()).square().mean())


def equal(a: AffineGrid, b: AffineGrid) -> bool:
    return torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


# ---- each against its formula ----------------------------------------------------------------------------------------


def test_min_max() -> None:
    x = torch.cat(batches())
    low, high = ends(grid_of(kdq.MinMax(), batches()))
    step = float(x.max() - x.min()) / 255
    assert abs(low - float(x.min())) < step
    assert high - low == pytest.approx(255 * step)


def test_moving_average() -> None:
    lows, highs = [float(b.min()) for b in batches()], [float(b.max()) for b in batches()]
    low, high = lows[0], highs[0]
    for a, b in zip(lows[1:], highs[1:], strict=True):
        low, high = 0.75 * low + 0.25 * a, 0.75 * high + 0.25 * b
    got = ends(grid_of(kdq.MovingAverage(0.25), batches()))
    assert got[1] - got[0] == pytest.approx(high - low, rel=1e-5)


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 100])
def test_percentile_is_numpys(percentile: float) -> None:
    x = torch.randn(200, 333, generator=torch.Generator().manual_seed(5)).pow(3)
    expected = np.percentile(x.numpy(), [100 - percentile, percentile], method="inverted_cdf")
    low, high = ends(grid_of(kdq.Percentile(percentile), list(x.split(9))))
    assert high - low == pytest.approx(expected[1] - expected[0], rel=2e-3)
    mirrored = ends(grid_of(kdq.Percentile(percentile), [-x]))
    assert mirrored[1] - mirrored[0] == pytest.approx(high - low, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mean_squared_error_is_the_least_of_all(bits: int) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(6)).pow(3).relu()
    got = squared_error(x, grid_of(kdq.MeanSquaredError(), [x], bits), bits)
    assert all(got <= squared_error(x, grid_of(o, [x], bits), bits) * 1.01 for o in OBSERVERS)
    shrunk = [AffineGrid(x.max() * s / 64 / (2**bits - 1), torch.tensor(0, dtype=torch.int32)) for s in range(1, 65)]
    assert got == pytest.approx(min(squared_error(x, g, bits) for g in shrunk), rel=0.01)


def test_kl_clips_a_long_tail_and_keeps_a_short_one() -> None:
    generator = torch.Generator().manual_seed(7)
    body = torch.rand(100_000, generator=generator)
    assert ends(grid_of(kdq.KLHistogram(), [body]))[1] > 0.9
    tail = torch.cat([body, torch.tensor([40.0, 55.0, 60.0])])
    assert 0.9 < ends(grid_of(kdq.KLHistogram(), [tail], 4), 4)[1] < 6
    assert ends(grid_of(kdq.MinMax(), [tail]))[1] == pytest.approx(60)
    low, high = ends(grid_of(kdq.KLHistogram(), [torch.cat([body - 0.5, torch.tensor([-30.0, 30.0])])], 4), 4)
    assert -6 < low < -0.4
    assert 0.4 < high < 6


def test_an_outlier_hurts_min_max_most() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(8))
    seen = torch.cat([x, torch.tensor([500.0])])
    errors = {type(o).__name__: squared_error(x, grid_of(o, [seen], 6), 6) for o in OBSERVERS}
    assert errors["Percentile"] < errors["MinMax"] / 100
    assert errors["KLHistogram"] < errors["MinMax"] / 10


# ---- streams ---------------------------------------------------------------------------------------------------------


@every_observer
def test_merging_is_like_seeing_all(observer: Observer) -> None:
    parts = []
    for seed in (0, 1):
        state = observer.start()
        for batch in batches(seed):
            state.observe(batch)
        parts.append(pickle.loads(pickle.dumps(state)))
    parts[0].merge(parts[1])
    parts[0].merge(observer.start())  # has seen nothing, and changes nothing
    if not isinstance(observer, kdq.MovingAverage):
        assert equal(parts[0].grid(4), grid_of(observer, batches(0) + batches(1), 4))
        assert equal(parts[0].grid(4), grid_of(observer, (batches(0) + batches(1))[::-1], 4))
    else:
        first, second = (ends(grid_of(observer, batches(seed))) for seed in (0, 1))
        width = (first[1] - first[0] + second[1] - second[0]) / 2
        got = ends(parts[0].grid(8))
        assert got[1] - got[0] == pytest.approx(width, rel=1e-5)
    fresh = observer.start()
    fresh.merge(parts[0])
    assert equal(fresh.grid(4), parts[0].grid(4))


@every_observer
def test_nan_and_inf_are_left_out(observer: Observer) -> None:
    x = torch.cat(batches())
    spoilt = torch.cat([x.flatten(), torch.tensor([float("nan"), float("inf"), -float("inf")])])
    assert equal(grid_of(observer, [spoilt]), grid_of(observer, [x]))
    state = observer.start()
    for nothing in (torch.full((3,), float("nan")), torch.empty(0, 4)):
        state.observe(nothing)
    with pytest.raises(RuntimeError, match="no finite activation"):
        state.grid(8)


@every_observer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_odd_values_give_valid_grids(observer: Observer, dtype: torch.dtype, bits: int) -> None:
    largest = torch.finfo(dtype).max
    for values in ([0.0], [-0.0, 0.0], [3.0], [-3.0], [1e-30], [1e-45], [largest / 4], [-largest / 4, 1.0]):
        grid = grid_of(observer, [torch.tensor(values, dtype=dtype)], bits)
        assert 0 < float(grid.scale) < float("inf")
        assert 0 <= int(grid.zero_point) < 2**bits


def test_memory_does_not_grow_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(60, 100, generator=torch.Generator().manual_seed(9))
    whole = kdq.Percentile(99.0).start()
    whole.observe(x)
    monkeypatch.setattr("kdq.observers.CHUNK", 700)
    state: Any = kdq.Percentile(99.0).start()
    state.observe(x[:20].t())
    state.observe(x[20:].reshape(2, 20, 100))
    assert equal(state.grid(8), whole.grid(8))
    size = len(state.keys)
    for _ in range(3):
        state.observe(x[:2])
    assert len(state.keys) == size


def test_half_precision_is_counted_exactly() -> None:
    x = torch.randn(500).bfloat16()
    state: Any = kdq.MeanSquaredError().start()
    state.observe(x)
    values, counts = state.values()
    expected, times = torch.unique(x.float(), return_counts=True)
    assert torch.equal(values, expected)
    assert torch.equal(counts, times)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kdq.Percentile(50), "percentile"),
        (lambda: kdq.Percentile(float("nan")), "percentile"),
        (lambda: kdq.MovingAverage(0), "momentum"),
        (lambda: kdq.KLHistogram(bins=100), "bins"),
        (lambda: kdq.MinMax().start().grid(9), "bits"),
    ],
)
def test_settings_are_validated(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_states_of_different_observers_do_not_merge() -> None:
    with pytest.raises(TypeError, match=r"Percentile\(percentile=99.9\)"):
        kdq.Percentile(99.9).start().merge(kdq.Percentile(99.0).start())


# ---- in quantize_ ----------------------------------------------------------------------------------------------------


@every_observer
def test_quantize_takes_an_observer(observer: Observer) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 8))
    kdq.quantize_(model, kdq.LowBit(weight_bits=4, act_bits=4), calibration=batches(), observer=observer)
    expected = grid_of(observer, batches(), 4)
    layer: Any = model[0]
    assert equal(AffineGrid(layer.input_scale, layer.input_zero_point), expected)


@every_observer
def test_no_batches_is_an_error(observer: Observer) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        kdq.quantize_(nn.Sequential(nn.Linear(17, 8)), kdq.Int8Static(), calibration=iter([]), observer=observer)


def test_a_wrong_observer_is_an_error() -> None:
    with pytest.raises(TypeError, match="observer.*MinMax"):
        kdq.quantize_(nn.Sequential(nn.Linear(17, 8)), kdq.Int8Dynamic(), observer="minmax")  # type: ignore[arg-type]


def test_grids_are_tried_where_the_sample_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grids are made on the CPU; kernels take all of their tensors from one device."""

    class Tried(Exception):
        pass

    def fake_quantize(*tensors: Tensor, **_: int) -> Tensor:
        raise Tried([tensor.device.type for tensor in tensors])

    monkeypatch.setattr(kk, "fake_quantize", fake_quantize)
    with pytest.raises(Tried) as tried:
        search_affine_grid(torch.ones(3, device="meta"), -1.0, 1.0, 4)
    assert tried.value.args == (["meta"] * 3,)
