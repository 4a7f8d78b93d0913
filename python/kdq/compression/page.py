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
    amounts,
    key_figures,
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
text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
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
    bars = picture(draw_layers, report, height=1.4 + 0.45 * len(report.layers))
    seconds = ", ".join(f"{phase} {value:.3g} s" for phase, value in report.seconds.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Compression report</title><style>{STYLE}</style>
<h1>Compression report</h1>
<div class="key">{"".join(map(key_figure, key_figures(report)))}</div>
<h2>What could be had</h2>
<p>All models on {report.samples:,} validation samples, as they would be deployed. <em>float</em> is the model before,
<em>compressed</em> the result. Those named by a precision are the student with all layers at it, before any training of
its own; <em>only rounded</em> is the float model at the plan's precisions, without any training. On the Pareto front is
what no other beats in quality, size and time together; each dashed line is the front of quality against that cost
alone. Bytes are of the tensors; <code>model.safetensors</code> has {report.file_bytes:,} with its header.</p>
<img alt="quality against size and latency" src="{picture(draw_front, report)}">
<div class="wide">{models}</div>
<h2>Layers</h2>
<p>Budget: {amounts(report.budget)}. Predicted by the search: {amounts(report.predicted)}. The SQNR compares a layer's
output on the first validation batch with that of the float model, so it holds the errors of all layers before it, and
how far training has led away from the float model; it says little about how good the whole is. The last column
compares with what the trained weights would give in float.</p>
<img alt="bits and error by layer, before and after" src="{bars}">
<div class="wide">{layers}</div>
<h2>Training</h2>
<p>Distilling, the loss is the sum over the precisions of a step; in the finetune it is that of the plan alone.</p>
<img alt="loss by epoch" src="{picture(draw_training, report)}">
<p>Time: {escape(seconds)}.</p>
</html>
"""


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


def picture(draw: Callable[[Any, CompressionReport], None], report: CompressionReport, height: float = 3.8) -> str:
    """A data URL of what `draw(figure, report)` draws; height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, report)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def draw_front(figure: Any, report: CompressionReport) -> None:
    """Quality against size, and against latency, with the front of each; one legend, so that no labels overlap."""
    labelled = report.after.accuracy is not None
    size, time = figure.subplots(1, 2, sharey=True)
    unit, name = (1024, "KiB") if report.before.size_bytes < 10 * 1024**2 else (1024**2, "MiB")
    draw_against(size, f"{name} of tensors", report, lambda m: m.size_bytes / unit)
    draw_against(time, "ms a batch", report, lambda m: m.latency_ms)
    size.set_ylabel("accuracy, %" if labelled else "KL to the teacher, nats")
    if not labelled:
        size.invert_yaxis()
    figure.legend(*size.get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)


def draw_against(panel: Any, label: str, report: CompressionReport, cost: Callable[[Model], float]) -> None:
    """One panel: every model, and the front in this cost."""

    def height(m: Model) -> float:
        return m.teacher_kl if m.accuracy is None else 100 * m.accuracy

    others = iter(("o", "s", "^", "v", "D", "P", "X") * len(report.choices))
    marks = {
        id(report.before): ("black", "o"),
        id(report.rounded): ("tab:red", "x"),
        id(report.searched): ("tab:olive", "d"),
        id(report.after): ("tab:green", "*"),
    }
    for m in report.models:
        color, mark = marks.get(id(m), ("tab:blue", None))
        area = 220 if m is report.after else 55
        panel.scatter(cost(m), height(m), s=area, color=color, marker=mark or next(others), label=m.name, zorder=3)
    front = staircase(report.models, cost)
    steps = {"linestyle": "--", "color": "gray", "drawstyle": "steps-post"}
    panel.plot([cost(m) for m in front], [height(m) for m in front], label="front in this cost", **steps)
    panel.set_xlim(0, 1.1 * max(map(cost, report.models)))
    panel.set_xlabel(label)
    panel.margins(y=0.15)
    panel.grid(alpha=0.3)


def staircase(models: Sequence[Model], cost: Callable[[Model], float]) -> list[Model]:
    """The front in two dimensions, from the cheapest on: each better than all that cost less."""
    front: list[Model] = []
    for m in sorted(models, key=lambda m: (cost(m), -quality(m))):
        if not front or quality(m) > quality(front[-1]):
            front.append(m)
    return front


def draw_layers(figure: Any, report: CompressionReport) -> None:
    """Bits of each layer, and its error before and after."""
    rows = range(len(report.layers))
    bits, error = figure.subplots(1, 2, sharey=True)
    above, below = ([i + shift for i in rows] for shift in (-0.2, 0.2))
    bits.barh(above, [layer.weight_bits for layer in report.layers], height=0.38, label="weights")
    bits.barh(below, [layer.act_bits for layer in report.layers], height=0.38, label="inputs")
    bits.set_yticks(rows, [layer.name for layer in report.layers])
    bits.set_xlabel("bits")
    before = [layer.rounded_sqnr_db for layer in report.layers]
    after = [layer.sqnr_db for layer in report.layers]
    for places, values, color, label in (
        (above, before, "lightgray", "before: only rounded"),
        (below, after, "tab:green", "after: compressed"),
    ):
        known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        bars = error.barh([p for p, _ in known], [v for _, v in known], height=0.38, color=color, label=label)
        error.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    figure.legend(*bits.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    figure.legend(*error.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    error.set_xlabel("SQNR of the output, dB (more is better)")
    error.margins(x=0.2)
    bits.set_ylim(len(report.layers) - 0.4, -0.6)


def draw_training(figure: Any, report: CompressionReport) -> None:
    """The loss of each phase's epochs."""
    panels = figure.subplots(1, len(report.training), squeeze=False)[0]
    for panel, training in zip(panels, report.training, strict=True):
        panel.plot(range(1, len(training.losses) + 1), training.losses, marker=".")
        panel.set_title(training.phase, fontsize=10, loc="left")
        panel.set_xlabel("epoch")
        panel.set_ylabel("loss")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
