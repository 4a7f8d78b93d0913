"""The `kdq` command: compress, search, demo, study, bench, report, info."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Distil a teacher into a low-bit student and run it on integer and binary kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()


@app.command()
def compress(
    source: Annotated[str, typer.Argument(help="module:function that returns a dict of kdq.compress's arguments.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run, to go on with after an interruption; compressed.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds of a forward pass on the first batch.")] = None,
    size_bytes: Annotated[float | None, typer.Option(help="Bytes of the saved tensors, no header.")] = None,
    average_bits: Annotated[float | None, typer.Option(help="Bits of a weight, on average.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the loader at every precision.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Passes over the loader at the plan.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
) -> None:
    """Compress a model to a budget: distil it at every precision, choose, finetune, convert, report.

    The function's dict has "model" and "loader", and may have "teacher", "validation" and all other arguments of
    kdq.compress. Options given here count before it.
    """
    import kdq

    arguments = import_function(source, "source")()
    if not isinstance(arguments, dict) or not {"model", "loader"} <= arguments.keys():
        raise ValueError(f'source: expected {source} to return a dict with "model" and "loader", got {arguments!r:.80}')
    options: dict[str, Any] = {"folder": out, "epochs": epochs, "finetune_epochs": finetune_epochs, "seed": seed}
    arguments |= {name: value for name, value in options.items() if value is not None}
    bounds = {"latency_ms": latency_ms, "size_bytes": size_bytes, "average_bits": average_bits}
    if "budget" not in arguments or any(bound is not None for bound in bounds.values()):
        arguments["budget"] = kdq.Budget(**bounds)
    result = kdq.compress(**arguments)
    console.print(result.report)
    console.print(f"wrote model.safetensors, plan.json, report.html and report.json to {result.folder}")


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help="Which demo: digits or language.")] = "digits",
    seeds: Annotated[int | None, typer.Option(help="digits: how many; both arms of a seed are paired; 5.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json, the picture and the checkpoints.")] = Path(
        "demo-output"
    ),
    prompt: Annotated[str | None, typer.Option(help="language: the beginning that every model completes.")] = None,
    quick: Annotated[bool, typer.Option(help="A few steps only, to see that everything works.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda or cuda:N for a GPU.")] = "cpu",
) -> None:
    """Distil and quantize a digit classifier or a small language model to 8, 4, 2 and 1 bits; run it on the kernels."""
    if name not in ("digits", "language"):
        raise ValueError(f"demo: expected digits or language, got {name!r}")
    if (other := {"digits": prompt, "language": seeds}[name]) is not None:
        raise ValueError(f"{'prompt' if name == 'digits' else 'seeds'}: not an option of {name}, got {other!r}")
    if name == "language":
        from kdq.language import demo as language

        settings = language.Settings.quick(device) if quick else language.Settings(device=device)
        language.run_language(out, settings, console, language.PROMPT if prompt is None else prompt)
        return
    from kdq.demo import Settings, run_digits

    count = 5 if seeds is None else seeds
    run_digits(out, Settings.quick(count, device) if quick else Settings(seeds=count, device=device), console)


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(help="Which study: claim-a, claim-b, claim-c, deep-compression, qnn, transfer, layerwise."),
    ],
    seeds: Annotated[int, typer.Option(help="How many seeds; all arms of a seed are paired.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for the page, its picture and every outcome as JSON.")] = Path(
        "docs/studies"
    ),
    quick: Annotated[bool, typer.Option(help="A few steps only, to see that everything works.")] = False,
) -> None:
    """Run an experiment about distillation and quantization, and write its page."""
    from kdq.studies import document
    from kdq.studies.all import STUDIES
    from kdq.studies.study import run_study

    if name not in STUDIES:
        raise ValueError(f"study: expected one of {', '.join(STUDIES)}, got {name!r}")
    findings = run_study(STUDIES[name], seeds, quick=quick)
    console.print(document.rich_summary(findings))
    for path in document.write(findings, out):
        console.print(f"wrote {path}")


@app.command()
def bench(
    family: Annotated[list[str] | None, typer.Option(help="A kernel family (repeatable); all by default.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads, for torch too (repeatable); 1.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the share of the limit reached, as PNG.")] = None,
    scaling: Annotated[Path | None, typer.Option(help="Time products along M, N and K too; draw that, as PNG.")] = None,
    families: Annotated[bool, typer.Option(help="Run the families; --no-families leaves --scaling alone.")] = True,
    update: Annotated[bool, typer.Option(help="Keep what --json's file has of families that are not run now.")] = False,
    quick: Annotated[bool, typer.Option(help="Small shapes, few rounds: no figures to quote.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda or cuda:N for a GPU.")] = "cpu",
    keep_going: Annotated[bool, typer.Option(help="Note what is wrong or does not run, and fail at the end.")] = False,
) -> None:
    """Time every kernel against its best peer and the machine's limit, interleaved, results checked first."""
    from kdq.bench import plot as drawing
    from kdq.bench import run_bench, table
    from kdq.bench import scaling as scales
    from kdq.bench.results import Results

    if update and json_path is None:
        raise ValueError("update: expected --json with the file to update")
    if not families and (family or plot is not None):
        raise ValueError("families: --no-families leaves nothing for --family and --plot")
    if scaling is not None and device != "cpu":
        raise ValueError(f"scaling: expected device cpu, got {device}")
    counts = threads or [1]
    measurements, machine = run_bench(
        family if families else [], threads=counts, quick=quick, device=device, keep_going=keep_going
    )
    for _, _, rows in table.sections(measurements):
        console.print(table.rich_table(rows))
    points = scales.run_scaling(counts, quick) if scaling is not None else []
    if points and scaling is not None:
        console.print(scales.markdown(points), highlight=False)
        scales.plot(points, scaling)
    results = Results(machine, measurements, points)
    if update and json_path is not None:
        results = Results.load(json_path).updated(results)
    if json_path is not None:
        results.save(json_path)
    if markdown is not None:
        text = table.markdown(results.measurements, results.machine)
        markdown.write_text(text + (scales.markdown(results.scaling) if results.scaling else ""))
    if plot is not None:
        drawing.plot(results.measurements, plot)
    failures: Any = machine["failures"]
    if failures:
        console.print("\n".join(table.describe_failures(failures)), markup=False)
        raise RuntimeError(f"{len(failures)} failures, listed above; everything else was timed")


@app.command()
def report(
    student: Annotated[Path, typer.Argument(help="A checkpoint that kdq.save wrote and kdq.load can rebuild.")],
    teacher: Annotated[Path, typer.Argument(help="The teacher's checkpoint.")],
    data: Annotated[str, typer.Option(help="module:function that returns the batches to compare on.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the report as PNG.")] = None,
) -> None:
    """Compare a quantized checkpoint with its teacher: accuracy, distance, size, time, error by layer."""
    import kdq

    result = kdq.report(kdq.load(student), kdq.load(teacher), import_function(data)())
    console.print(result)
    if json_path is not None:
        result.save_json(json_path)
    if plot is not None:
        result.plot(plot)


@app.command()
def search(
    student: Annotated[Path, typer.Argument(help="The float student's checkpoint, which kdq.load can rebuild.")],
    teacher: Annotated[Path, typer.Argument(help="The teacher's checkpoint.")],
    data: Annotated[str, typer.Option(help="module:function that returns the batches to measure on.")],
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds of a forward pass on the first batch.")] = None,
    size_bytes: Annotated[int | None, typer.Option(help="Bytes of the saved tensors, no header.")] = None,
    average_bits: Annotated[float | None, typer.Option(help="Bits a weight, averaged.")] = None,
    sensitivity: Annotated[str, typer.Option(help="teacher_kl, label_loss or weight_sqnr.")] = "teacher_kl",
    refine: Annotated[int, typer.Option(help="Times to measure again around the plan.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the plan, for kdq.Plan.load.")] = None,
) -> None:
    """Choose each layer's precision: nearest to the teacher within a budget."""
    import kdq

    budget = kdq.Budget(latency_ms=latency_ms, size_bytes=size_bytes, average_bits=average_bits)
    batches = import_function(data)()
    plan = kdq.search_precision(
        kdq.load(student),
        kdq.load(teacher),
        batches,
        budget=budget,
        sensitivity=sensitivity,  # type: ignore[arg-type]  # checked there
        refine=refine,
    )
    console.print(plan)
    if json_path is not None:
        plan.save(json_path)


@app.command()
def info(
    peaks: Annotated[bool, typer.Option(help="Measure the machine's limits too.")] = False,
    threads: Annotated[int, typer.Option(help="Threads for --peaks.")] = 1,
) -> None:
    """Show the build, the CPU, and the instruction set in force."""
    import kdq_kernels

    table = Table(show_header=False)
    for key, value in kdq_kernels.build_info().items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    table.add_row("isa in force", kdq_kernels.cpu_isa())
    if peaks:
        for key, value in kdq_kernels.machine_peaks(threads).items():
            table.add_row(key, f"{value:,.1f}" if isinstance(value, float) else str(value))
    console.print(table)


def import_function(spec: str, role: str = "data") -> Any:
    """The object that `module:name` names; modules of the working directory count. role: the argument's name."""
    module_name, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"{role}: expected module:function, got {spec!r}")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{role}: cannot import {spec!r}: {error}") from error
    finally:
        sys.path.remove("")


def main() -> None:
    """Entry point: an error of the user's is one line on stderr and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        sys.exit(1)
