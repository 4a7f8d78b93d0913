"""How transferable are features, in float and in few bits? The experiment of Yosinski, Clune, Bengio, Lipson, 2014."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdq.bench.table import markdown_table
from kdq.configs import Config
from kdq.observe import evaluating
from kdq.quantize import convert_, prepare_qat_
from kdq.reporting import accuracy
from kdq.studies import claim_a
from kdq.studies.paired import SURE, Outcome, compare, mean_and_error
from kdq.studies.study import ACCURACY, Comparison, Findings, Metric, Study
from kdq.studies.tasks import CONTEXT, Data, Task, embedding, mlp
from kdq.studies.training import FLOAT_RATE, LABELS, Batches, fresh, train
from kdq.transfer import transfer_

PRECISIONS: Mapping[str, Config | None] = {k: c for k, c in claim_a.PRECISIONS.items() if k != "8 bits"}
NETS: Mapping[str, Callable[[int], nn.Module]] = {  # five layers with weights, given the number of classes
    "digits": lambda classes: mlp(nn.Identity(), [64, 32, 32, 32, 32, classes]),
    "text": lambda classes: mlp(embedding(16), [CONTEXT * 16, 96, 96, 96, classes]),
}
TAKEN = (1, 2, 3, 4)  # layers; the last is always new, its classes are others
LOST = Metric("lost", "accuracy lost against B, points", -1)
KINDS = ("BnB", "BnB+", "AnB", "AnB+")
FROM_FLOAT = "AnB+ from float A"
PAPER = (("1-7", "+1.6", "+1.4"), ("3-7", "+1.8", "+1.4"), ("5-7", "+2.1", "+1.7"))  # its table 1


@dataclass(frozen=True)
class Half:
    """The samples of half of the classes, which are numbered anew."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def halves(data: Data, seed: int) -> tuple[Half, Half]:
    """A and B: classes are drawn by the seed; seed 0 takes them in order (digits 0-4 and 5-9)."""
    count = int(torch.cat([data.train_y, data.test_y]).max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(count)
    new = torch.full((2, count), -1)
    for half, chosen in zip(new, (order[: count // 2], order[count // 2 :]), strict=True):
        half[chosen] = torch.arange(len(chosen))
    first, second = (half_of(data, number) for number in new)
    return first, second


def half_of(data: Data, number: Tensor) -> Half:
    """number int64 `[classes]`: what a class becomes, or -1."""
    train_y, test_y = number[data.train_y], number[data.test_y]
    train, test = train_y >= 0, test_y >= 0
    return Half(data.train_x[train], train_y[train], data.test_x[test], test_y[test], int(number.max()) + 1)


def untrained(task: Task, classes: int, config: Config | None, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = NETS[task.name](classes)
    if config is not None:
        prepare_qat_(net, config)
    return net


def learn(net: nn.Module, task: Task, half: Half, seed: int, steps: int) -> None:
    train(net, net, [LABELS], Batches(half.train_x, half.train_y, task.batch, steps, seed), FLOAT_RATE)


@torch.inference_mode()
def tested(net: nn.Module, half: Half) -> float:
    """Accuracy in percent, on the kernels."""
    converted = fresh(net)
    convert_(converted)
    with evaluating(converted):
        return 100 * accuracy(converted(half.test_x), half.test_y)


def run_seed(task: Task, seed: int, steps: int) -> list[Outcome]:
    a, b = halves(task.split(seed), seed)
    start = seed + 1000  # of all nets that are compared: their new layers, and the order of their batches
    outcomes: list[Outcome] = []
    in_float: dict[str, nn.Module] = {}
    frozen_in_float: dict[int, dict[str, float]] = {}
    for precision, config in PRECISIONS.items():
        bases = {"A": untrained(task, a.classes, config, seed), "B": untrained(task, b.classes, config, seed)}
        learn(bases["A"], task, a, seed, steps)
        learn(bases["B"], task, b, seed, steps)
        in_float = in_float or bases
        anew = untrained(task, b.classes, config, start)
        learn(anew, task, b, start, steps)
        accuracy_anew = tested(anew, b)
        first: dict[str, float] = {}
        for n in TAKEN:
            recipes = {"BnB": (bases["B"], True), "BnB+": (bases["B"], False)}
            recipes |= {"AnB": (bases["A"], True), "AnB+": (bases["A"], False)}
            if config is not None:
                recipes[FROM_FLOAT] = (in_float["A"], False)
            found = {"B": {"accuracy": accuracy_anew, "lost": 0.0}}
            for arm, (base, freeze) in recipes.items():
                net = untrained(task, b.classes, config, start)
                transfer_(base, net, n, freeze=freeze)
                learn(net, task, b, start, steps)
                reached = tested(net, b)
                found[arm] = {"accuracy": reached, "lost": accuracy_anew - reached}
            first = first or found["AnB"]
            found |= {"A1B": first, "AnB in float32": frozen_in_float.setdefault(n, found["AnB"])}
            outcomes += [Outcome(task.name, group(precision, n), arm, seed, values) for arm, values in found.items()]
    return outcomes


def group(precision: str, n: int) -> str:
    return f"{precision} n={n}"


def paper_section(outcomes: Sequence[Outcome]) -> str:
    """Markdown: what the paper's finetuned transfer gains and what these gain, in the mean over layers."""
    rows: list[tuple[str, ...]] = [
        (f"the paper, ImageNet, layers {layers}", over_b, over_control) for layers, over_b, over_control in PAPER
    ]
    for task in dict.fromkeys(o.task for o in outcomes):
        for precision in PRECISIONS:
            gains = (mean_gain(outcomes, task, precision, "AnB+", against) for against in ("B", "BnB+"))
            cells = (f"{mean:+.1f} ± {error:.1f}" for mean, error in gains)
            rows.append((f"here, {task}, {precision}, layers {TAKEN[0]}-{TAKEN[-1]}", *cells))
    return "\n".join(
        [
            "## The paper's gain beside what it gives here",
            "",
            "Points of accuracy that a net has gained which started from another task's first n layers and was "
            "finetuned (*AnB+*), mean over n: over one trained anew (*B*), and over the control (*BnB+*).",
            "",
            *markdown_table(("where", "over B", "over BnB+"), rows, text_columns=1),
            "",
            "The paper's net has eight layers, five of them convolutions, and reaches 62.5 % on 500 classes of "
            "ImageNet with 645,000 pictures. Frozen layers of its own task cost it most when it is cut at layers 3 to "
            "6, where neighbours are co-adapted; those of the other task, at layers 6 and 7, by being specific too.",
            "",
        ]
    )


def mean_gain(outcomes: Sequence[Outcome], task: str, precision: str, arm: str, against: str) -> tuple[float, float]:
    """Over the numbers of layers taken, with the standard error over the seeds."""
    gains: dict[int, float] = dict.fromkeys((o.seed for o in outcomes), 0.0)
    groups = {group(precision, n) for n in TAKEN}
    for o in outcomes:
        if o.task == task and o.group in groups and o.arm in (arm, against):
            gains[o.seed] += o.values["accuracy"] * (1 if o.arm == arm else -1) / len(TAKEN)
    return mean_and_error(list(gains.values()))


def picture(findings: Findings, path: Path) -> None:
    """The paper's figure, a panel a task and precision: accuracy by number of layers taken, with three standard errors
    of the paired difference to B."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(o.task for o in findings.outcomes))
    size = (4 * len(PRECISIONS), 3.6 * len(tasks))
    figure, axes = plt.subplots(len(tasks), len(PRECISIONS), figsize=size, layout="constrained", squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for panel, precision in zip(row, PRECISIONS, strict=True):
            for i, kind in enumerate(KINDS):
                found = [compare(findings.outcomes, task, group(precision, n), kind, "B", "accuracy") for n in TAKEN]
                at = [n + 0.06 * (i - 1.5) for n in TAKEN]
                errors = [0.0 if math.isnan(d.error) else SURE * d.error for d in found]
                panel.errorbar(at, [d.arm for d in found], yerr=errors, marker="o", capsize=3, label=kind)
            panel.axhline(found[0].against, color="black", linestyle="--", linewidth=0.8, label="B")
            panel.set_title(f"{task}, {precision}", fontsize=9, loc="left")
            panel.set_xticks(TAKEN)
            panel.set_xlabel("layers taken, n", fontsize=8)
            panel.set_ylabel(f"accuracy on B, % (± {SURE:g} standard errors to B)", fontsize=8)
            panel.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


LOW = [name for name, config in PRECISIONS.items() if config is not None]

STUDY = Study(
    name="transfer",
    title="How transferable are features, in float and in few bits?",
    claim="Yosinski, Clune, Bengio, Lipson (How transferable are features in deep neural networks?, 2014): features "
    "become less general from layer to layer; a net that is cut in the middle does not grow together again, as "
    "neighbouring layers are co-adapted; and a net that starts from another task's features generalises better than "
    "one trained anew, even after finetuning. Here the same in 4, 2 and 1 bits, too.",
    method="""\
The classes of a task are split into halves A and B, by the seed (seed 0: in order, as the digits 0-4 and 5-9), with
the data that belong to them. Nets of five layers with weights are trained on A and on B: for the digits
64-32-32-32-32-5, for the text an embedding of 16 and 128-96-96-96-51 (the embedding is a layer here), batch norm
before each linear layer. Then `kdq.transfer_` gives the first n layers of such a base to a new net for B, with their
norms and, in few bits, their learned scales; what follows starts at random. *AnB*: the first n layers are those of A,
frozen (`freeze=True`: statistics and scales too). *AnB+*: they are finetuned. *BnB*, *BnB+*: the same with layers of
the base that was trained on B, from another start. *B*: trained anew. All nets that are compared have the same start
of their new layers and the same batches in the same order, and as many steps as a base. At 4, 2 and 1 bits (weights
and activations) the base is trained in these bits too; *from float A*: its first layers come from the base in
float32. Every net is converted and tested on the kernels, on the classes of B.""",
    comparisons=(
        Comparison(
            "Co-adapted layers: the rest learned anew behind frozen layers of the same task",
            "BnB",
            "B",
            "In the paper's net of eight layers this loses most in the middle: neighbouring layers had grown "
            "together, and what was learned anew does not find its way back to them. A shallow net with batch "
            "norms gives the new layers less to miss.",
            metrics=(ACCURACY,),
        ),
        Comparison(
            "Features of another task, frozen",
            "AnB",
            "BnB",
            "Both were cut at the same place, so that what is left between them is how specific the features are "
            "to their own task.",
            metrics=(ACCURACY,),
        ),
        Comparison(
            "From general to specific: n frozen layers of another task against one",
            "AnB",
            "A1B",
            "The first layer's features serve almost any task, the paper finds; each further one that is frozen "
            "belongs more to its own.",
            metrics=(ACCURACY,),
            groups=[group(precision, n) for precision in PRECISIONS for n in TAKEN[1:]],
        ),
        Comparison(
            "Starting from another task's features, all finetuned",
            "AnB+",
            "B",
            "The paper's surprise: what was learned on A stays of use after finetuning on B. A net that started "
            "from A has been trained for twice as many steps in all, which the control shows apart.",
            metrics=(ACCURACY,),
        ),
        Comparison(
            "The control: starting from the same task's features, all finetuned",
            "BnB+",
            "B",
            "As many steps in all as AnB+, without another task. What AnB+ gains beyond this comes from A; what "
            "it gains less comes from longer training.",
            metrics=(ACCURACY,),
        ),
        Comparison(
            "What frozen features of another task cost in few bits, against float32",
            "AnB",
            "AnB in float32",
            "Compared is what AnB loses against B at the same bits, in few bits and in float32: whether rounded "
            "features are less general.",
            metrics=(LOST,),
            groups=[group(precision, n) for precision in LOW for n in TAKEN],
        ),
        Comparison(
            "A low-bit net from a float net's features, against those of a low-bit net",
            FROM_FLOAT,
            "AnB+",
            "The float net's features are better; those of the low-bit net come with their scales and were "
            "learned for its grids.",
            metrics=(ACCURACY,),
        ),
    ),
    run_seed=run_seed,
    steps=200,
    section=paper_section,
    picture=picture,
)
