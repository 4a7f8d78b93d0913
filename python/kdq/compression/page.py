"""The HTML page of a compression: one file, tables and plots inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from kdq.compression.report import (
    LAYER_COLUMNS,
    MODEL_COLUMNS,
    CompressionReport,
    Model,
    layer_cells,
    model_cells,
    pareto_front,
    quality,
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.key { display: flex; flex-wrap: wrap; gap: 1rem; } .key div { flex: 1 1 12rem; background: #f3f5f8; border-radius: 8px;
padding: .8rem 1rem; } .key b { display: block; font-size: 1.5rem; } .key small { color: #555; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } th, td { padding: .3rem .6rem;
text-align: right; border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; }
tr.ours { font-weight: bold; background: #eef6ee; } img { max-width: 100%; } .wide { overflow-x: auto; }
"""


def html(report: CompressionReport) -> str:
    """The page's text."""
    front = pareto_front(report.models)
    rows = [(model_cells(m, m in front), m is report.after) for m in report.models]
    if report.teacher is not None:
        rows.insert(0, (model_cells(report.teacher, False), False))
    models = table(MODEL_COLUMNS, rows)
    layers = table(LAYER_COLUMNS, ((layer_cells(layer), False) for layer in report.layers))
    expected = ", ".join(f"{name} {value:,.4g}" for name, value in report.predicted.items())
    budget = ", ".join(f"{name} {value:,.4g}" for name, value in report.budget.items())
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in report.seconds.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Compression report</title><style>{STYLE}</style>
<h1>Compression report</h1>
<div class="key">{"".join(map(key_figure, key_figures(report)))}</div>
<h2>What could be had</h2>
<p>All models on {report.samples:,} validation samples, as they would be deployed. The switchable student at each
precision took no training of its own. On the Pareto front is what no other model beats in quality, size and time.</p>
<img alt="quality against size and latency" src="{picture(draw_front, report)}">
<div class="wide">{models}</div>
<h2>Layers</h2>
<p>Budget: {escape(budget)}. Predicted by the search: {escape(expected)}.</p>
<img alt="bits and error by layer" src="{picture(draw_layers, report)}">
<div class="wide">{layers}</div>
<h2>Training</h2>
<img alt="loss by epoch" src="{picture(draw_training, report)}">
<p>Time: {escape(seconds)}.</p>
</html>
"""


def key_figures(report: CompressionReport) -> list[tuple[str, str, str]]:
    """Name, value, remark."""
    before, after = report.before, report.after
    figures = [
        ("size", f"{before.size_bytes / after.size_bytes:.1f}x smaller", f"{after.size_bytes:,} bytes"),
        ("time", f"{before.latency_ms / after.latency_ms:.2f}x faster", f"{after.latency_ms:.3g} ms a batch"),
        ("KL to the teacher", f"{after.teacher_kl:.4f}", f"before: {before.teacher_kl:.4f} nats"),
    ]
    if before.accuracy is not None and after.accuracy is not None:
        change = 100 * (after.accuracy - before.accuracy)
        figures.insert(0, ("accuracy", f"{after.accuracy:.2%}", f"{change:+.2f} points"))
    return figures


def key_figure(figure: tuple[str, str, str]) -> str:
    name, value, remark = map(escape, figure)
    return f"<div>{name}<b>{value}</b><small>{remark}</small></div>"


def table(columns: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    """Rows with a mark: whether they are set off."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join(
        f'<tr class="{"ours" if marked else ""}">' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
        for cells, marked in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(draw: Callable[[Any, CompressionReport], None], report: CompressionReport) -> str:
    """A data URL of what `draw(figure, report)` draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, report)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def draw_front(figure: Any, report: CompressionReport) -> None:
    """Quality against size, and against latency, with the front of each."""
    labelled = report.after.accuracy is not None
    for panel, label, cost in zip(
        figure.subplots(1, 2),
        ("bytes on disk", "ms a batch"),
        (lambda m: float(m.size_bytes), lambda m: m.latency_ms),
        strict=True,
    ):
        for m in report.models:
            ours = m is report.after
            panel.scatter(cost(m), quality(m), s=90 if ours else 40, marker="*" if ours else "o", zorder=3)
            panel.annotate(m.name, (cost(m), quality(m)), xytext=(5, 4), textcoords="offset points", fontsize=8)
        front = staircase(report.models, cost)
        panel.plot([cost(m) for m in front], [quality(m) for m in front], "--", color="gray", drawstyle="steps-post")
        panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.set_ylabel("accuracy" if labelled else "minus KL to the teacher, nats")
        panel.margins(x=0.2, y=0.15)
        panel.grid(alpha=0.3)


def staircase(models: Sequence[Model], cost: Callable[[Model], float]) -> list[Model]:
    """The front in two dimensions, from the cheapest on: each better than all that cost less."""
    front: list[Model] = []
    for m in sorted(models, key=lambda m: (cost(m), -quality(m))):
        if not front or quality(m) > quality(front[-1]):
            front.append(m)
    return front


def draw_layers(figure: Any, report: CompressionReport) -> None:
    """Bits of each layer, and its error."""
    names = [layer.name for layer in report.layers]
    bits, error = figure.subplots(1, 2, sharey=True)
    bits.barh(names, [layer.weight_bits for layer in report.layers], height=0.4, align="edge", label="weights")
    bits.barh(names, [layer.act_bits for layer in report.layers], height=-0.4, align="edge", label="activations")
    bits.set_xlabel("bits")
    bits.legend(fontsize=8)
    error.barh(names, [layer.sqnr_db or 0.0 for layer in report.layers], color="tab:gray")
    error.set_xlabel("SQNR of the output, dB (more is better)")
    bits.invert_yaxis()


def draw_training(figure: Any, report: CompressionReport) -> None:
    """The loss of each phase's epochs."""
    panels = figure.subplots(1, max(1, len(report.training)), squeeze=False)[0]
    for panel, training in zip(panels, report.training, strict=False):
        panel.plot(range(1, len(training.losses) + 1), training.losses, marker=".")
        panel.set_title(training.phase, fontsize=10, loc="left")
        panel.set_xlabel("epoch")
        panel.set_ylabel("loss")
        panel.grid(alpha=0.3)
