"""Draws measurements: the share of the machine's limit that each of ours reaches, beside the best peer's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdq.bench.runner import Measurement
from kdq.bench.table import sections


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """A row of panels a family, a column a number of threads, or a clock on a GPU: the share of the machine's limit,
    shape by shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {(family, how): bars(rows) for family, how, rows in sections(measurements)}
    families = list(dict.fromkeys(family for family, _ in panels))
    manners = list(dict.fromkeys(how for _, how in panels))
    size = (9 * len(manners), 3.2 * len(families))
    figure, axes = plt.subplots(len(families), len(manners), figsize=size, squeeze=False, layout="constrained")
    for (family, how), series in panels.items():
        axis = axes[families.index(family), manners.index(how)]
        shapes = list(dict.fromkeys(shape for values in series.values() for shape in values))
        width = 0.8 / len(series)
        for i, (name, values) in enumerate(series.items()):
            positions = [s + (i - (len(series) - 1) / 2) * width for s in range(len(shapes))]
            color = "0.6" if name == "best peer" else None
            axis.bar(positions, [values.get(s, 0.0) for s in shapes], width, label=name, color=color)
        axis.set_xticks(range(len(shapes)), shapes, fontsize=7, rotation=30, ha="right")
        axis.axhline(100, color="black", linewidth=0.8)
        axis.set_ylabel("% of the binding limit")
        axis.set_title(f"{family}, {how}", loc="left")
        axis.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series), frameon=False)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def bars(measurements: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    """By contender, then shape: each of ours, then the fastest peer of each shape."""
    series: dict[str, dict[str, float]] = {}
    for m in measurements:
        if m.role == "ours":
            series.setdefault(m.contender, {})[m.shape] = m.percent_of_limit
    best: dict[str, float] = {}
    for m in measurements:
        if m.role == "peer":
            best[m.shape] = max(best.get(m.shape, 0.0), m.percent_of_limit)
    return {**series, "best peer": best} if best else series
