"""What the language demo shows of its report: the table on the console and the picture. Both are made from the report
alone, as `report.json` has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kdq.demo import spread

# How each arm is drawn in the picture, how far beside the others, and what it is called there.
MARKS = {
    "untrained": ("x", "tab:gray", 0.0, "quantized without training"),
    "text": ("o", "tab:blue", -0.15, "trained on the text"),
    "teacher": ("D", "tab:orange", 0.15, "trained on text and teacher"),
}


def table(report: Mapping[str, Any]) -> Table:
    """The demo's result."""
    speed = report["speed"]
    prompt = speed["float32"]["prompt_bytes"]
    scores = [score for row in report["rows"] for score in row["arms"].values()]
    result = Table(
        title=f"The next byte of Python's library; {report['parameters']:,} parameters, "
        f"trained on {trained_bytes(report):,} bytes",
        caption=(
            "bits: per held-out byte; gain: of the teacher over the text alone, paired difference ± standard error "
            "over windows; KL: to the float32 model, nats; bytes: of the saved file; prefill, decode: bytes a second "
            f"at batch 1, reading {prompt} (in thousands) and writing the one behind them, median, below "
            "it slowest-fastest. Without its linear layers the int8 model decodes "
            f"{speed['no products']['decode'][0]:,.0f} a second. Kernels and fake-quant models find the same byte "
            f"likeliest in at least {min(score['kernel_agreement'] for score in scores):.2%} of all places. Run on: "
            f"{report['place']}."
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for column in ("model", "training", "bits", "gain", "KL", "bytes", "prefill", "decode"):
        result.add_column(column, justify="left" if column in ("model", "training") else "right", no_wrap=True)
    for row in report["rows"]:
        rates = _rates(speed[row["precision"]])
        for i, (arm, score) in enumerate(row["arms"].items()):
            result.add_row(
                "" if i else row["precision"],
                arm,
                f"{score['bits_per_byte'][0]:.3f}",
                spread(tuple(row["gain"]), 3, sign=True) if arm == "teacher" else "",
                f"{score['teacher_kl']:.4f}",
                "" if i else f"{row['size_bytes']:,}",
                *(rates[i] if i < 2 else ()),
            )
        if len(row["arms"]) == 1:
            result.add_row(*[""] * 6, *rates[1])
        result.add_section()
    return result


def _rates(speed: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the two columns: medians, and below them slowest-fastest."""
    (read, slowest, fastest), (written, least, most) = speed["prefill"], speed["decode"]
    return [
        [f"{read / 1e3:.1f}k", f"{written:,.0f}"],
        [f"{slowest / 1e3:.1f}-{fastest / 1e3:.1f}k", f"{least:,.0f}-{most:,.0f}"],
    ]


def trained_bytes(report: Mapping[str, Any]) -> int:
    """How many bytes the float model saw, with repetitions."""
    settings = report["settings"]
    return int(settings["teacher_steps"] * settings["batch"] * settings["shape"]["context"])


def picture(report: Mapping[str, Any], path: Path) -> None:
    """Bits per byte, size, and bytes a second, by precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, speed = report["rows"], report["speed"]
    names = [row["precision"] for row in rows]
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for arm, (mark, color, beside, label) in MARKS.items():
        points = [
            (i + beside, row["arms"][arm]["bits_per_byte"][0]) for i, row in enumerate(rows) if arm in row["arms"]
        ]
        across, bits = zip(*points, strict=True)
        axes[0].plot(across, bits, linestyle="none", marker=mark, color=color, label=label)
    in_float = [row["arms"][""]["bits_per_byte"][0] for row in rows if "" in row["arms"]]
    axes[0].plot(range(len(in_float)), in_float, linestyle="none", marker="s", color="black", label="not quantized")
    axes[0].set_ylabel("bits per held-out byte")
    axes[0].legend(fontsize=8)
    axes[1].bar(names, [row["size_bytes"] / 1024 for row in rows], color="tab:gray")
    axes[1].set_ylabel("KiB on disk")
    prompt = speed["float32"]["prompt_bytes"]
    for axis, kind, label in (
        (axes[2], "prefill", f"reading {prompt} bytes"),
        (axes[3], "decode", "writing one byte"),
    ):
        rates = [speed[name][kind] for name in names]
        middle = [rate[0] for rate in rates]
        ends = [[rate[0] - rate[1] for rate in rates], [rate[2] - rate[0] for rate in rates]]
        axis.bar(names, middle, yerr=ends, capsize=4, color="tab:green")
        axis.set_ylabel(f"bytes a second, {label}")
        axis.axhline(speed["no products"][kind][0], color="black", linestyle="--", linewidth=0.8)
        axis.set_title("dashed: int8 without its linear layers", fontsize=8)
    for axis in axes:
        axis.set_xticks(range(len(names)), names, rotation=20)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle("A byte-level transformer over Python's library, compressed and run on the kernels, batch 1")
    figure.savefig(path, dpi=120)
    plt.close(figure)
