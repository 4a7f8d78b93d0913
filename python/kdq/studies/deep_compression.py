"""Deep Compression (Han, Mao, Dally 2016) end to end: pruning, weight sharing and Huffman coding, down to the file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kdq.bench.table import markdown_table
from kdq.configs import Codebook, Int8WeightOnly
from kdq.distill import SoftTargets
from kdq.io import save
from kdq.layers.codebook_linear import CodebookLinear
from kdq.layers.int8_linear import Int8Linear
from kdq.prune import prune_
from kdq.quantize import convert_, prepare_qat_, quantize_
from kdq.reporting import interleaved_latency
from kdq.studies.paired import Outcome, mean_and_error
from kdq.studies.study import ACCURACY, KL, Comparison, Metric, Study
from kdq.studies.tasks import Task
from kdq.studies.training import FLOAT_RATE, LABELS, QAT_RATE, Batches, Pair, fresh, score, train

RISING = (0.6, 0.8, 0.92, 0.96)  # share of the hidden layers' weights that is pruned, step after step
RISING_TEXT = ", ".join(f"{share:.0%}" for share in RISING)
SETTINGS: Mapping[float, tuple[str, int]] = {  # at which of these the file is made: its name, the bits of an index
    0.8: ("80%, 5 bits", 5),
    0.92: ("92%, 5 bits", 5),
    0.96: ("96%, 4 bits", 4),
}
HEAD_KEEPS = 3  # the last layer keeps so many times the share that others keep, as in the paper (8%, 9% and 26%)
HEAD = "4"
TIMES = Metric("times", "times smaller than the dense file", +1, digits=1)
WITH_LABELS = SoftTargets(T=4.0, alpha=0.9)
WITHOUT_LABELS = SoftTargets(T=4.0, alpha=1.0)


@dataclass(frozen=True)
class Arm:
    """What the network is retrained on. data: "few" (the labelled samples) or "many"."""

    loss: SoftTargets
    is_own_teacher: bool = False
    data: str = "many"


ARMS: Mapping[str, Arm] = {
    "labels": Arm(LABELS),
    "teacher": Arm(WITH_LABELS),
    "itself, no labels": Arm(WITHOUT_LABELS, is_own_teacher=True),
    "few labels": Arm(LABELS, data="few"),
}


def network() -> nn.Sequential:
    """LeNet-300-100 (LeCun et al. 1998) for digits of 8 x 8."""
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def trained_pair(task: Task, seed: int) -> Pair:
    """The task's teacher and the dense network, on all labels."""
    torch.manual_seed(seed)
    data = task.split(seed)
    pair = Pair(data, task.teacher(), network())
    x, y = data.many()
    steps = task.teacher_epochs * max(1, len(x) // task.batch)
    for model in (pair.teacher, pair.student):
        train(model, model, [LABELS], Batches(x, y, task.batch, steps, seed), FLOAT_RATE)
    return pair


@dataclass(frozen=True)
class Size:
    """Of a real file: all of its bytes, and those of its header (names, shapes, architecture)."""

    total: int
    header: int


def size_of(model: nn.Module, *, huffman: bool = False) -> Size:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path, huffman=huffman)
        content = path.read_bytes()
    return Size(len(content), 8 + int.from_bytes(content[:8], "little"))


def run_seed(task: Task, seed: int, steps: int) -> list[Outcome]:
    pair = trained_pair(task, seed)
    dense_size = size_of(pair.student)
    outcomes = []

    def note(group: str, arm: str, model: nn.Module, size: Size) -> None:
        found = score(model, pair)
        values = {"accuracy": found.accuracy, "teacher_kl": found.teacher_kl, "times": dense_size.total / size.total}
        outcomes.append(
            Outcome(task.name, group, arm, seed, {**values, "bytes": size.total, "header_bytes": size.header})
        )

    for arm, how in ARMS.items():
        dense, model = fresh(pair.student), fresh(pair.student)
        retrain(task, pair, how, dense, seed + 1000, steps)
        for i, sparsity in enumerate(RISING):
            prune_(model, sparsity, lambda _, name: name != HEAD)
            prune_(model, max(0.0, 1 - HEAD_KEEPS * (1 - sparsity)), lambda _, name: name == HEAD)
            retrain(task, pair, how, model, seed + 1000 * (i + 1), max(1, steps // len(RISING)))
            if sparsity not in SETTINGS:
                continue
            group, bits = SETTINGS[sparsity]
            pruned, shared = fresh(model), fresh(model)
            convert_(pruned)
            prepare_qat_(shared, Codebook(weight_bits=bits))
            retrain(task, pair, how, shared, seed + 9000, max(1, steps // len(RISING) // 2))
            convert_(shared)
            note(group, f"dense: {arm}", dense, dense_size)
            note(group, f"pruned: {arm}", pruned, size_of(pruned, huffman=True))
            note(group, f"shared: {arm}", shared, size_of(shared))
            note(group, f"coded: {arm}", shared, size_of(shared, huffman=True))
    return outcomes


def retrain(task: Task, pair: Pair, how: Arm, model: nn.Module, seed: int, steps: int) -> None:
    teacher = pair.student if how.is_own_teacher else pair.teacher
    x, y = pair.data.few() if how.data == "few" else pair.data.many()
    train(model.train(), teacher, [how.loss], Batches(x, y, task.batch, steps, seed), QAT_RATE)


# ---- the page --------------------------------------------------------------------------------------------------------

STAGES = {
    "dense: {}": "dense, float32",
    "pruned: {}": "pruned: positions coded, float32 values",
    "shared: {}": "+ shared: an index for every weight",
    "coded: {}": "+ Huffman: positions and indices coded",
}


def stages_section(outcomes: Sequence[Outcome]) -> str:
    """Markdown: bytes and accuracy at every stage, for labels and for the teacher."""
    lines = ["## Bytes on disk, stage by stage", ""]
    lines += [
        "Files as `kdq.save` writes them, with names, shapes and biases, of the arm on labels. Means over the seeds, "
        "accuracy ± standard error. Accuracy is that of the model on the kernels; coding changes no bit of it.",
        "",
    ]
    rows = []
    for task in dict.fromkeys(o.task for o in outcomes):
        for group, _ in SETTINGS.values():
            for stage, label in STAGES.items():
                cells = [_cells(outcomes, task, group, stage.format(arm)) for arm in ("labels", "teacher")]
                (size, times, accuracy), (_, _, taught) = cells
                rows.append((task, group, label, size, times, accuracy, taught))
    headers = [o.values["header_bytes"] for o in outcomes if o.arm.startswith("coded")]
    columns = ("task", "at", "stage", "bytes", "smaller", "accuracy: labels", "accuracy: teacher")
    lines += markdown_table(columns, rows, text_columns=3)
    lines += [
        "",
        "The paper's LeNet-300-100 on MNIST, 784 inputs, 92% pruned, 6 bits: 1,070 KB to 27 KB, 40 times smaller, at "
        "an error of 1.58% after 1.64%. What is here is another task: *digits* has 64 inputs, not 784, and 597 digits "
        "to test on, so that one digit is 0.17 points. Its network has a fifth of the weights, and what no coding "
        "shrinks weighs more in its file: 2,024 bytes of biases and centroids at 5 bits, and a header of "
        f"{max(headers):,.0f} bytes for names, shapes and architecture. An index here has at most 5 bits, and one of "
        "its values is the 0 of pruned weights.",
    ]
    return "\n".join(lines) + "\n"


def _cells(outcomes: Sequence[Outcome], task: str, group: str, arm: str) -> tuple[str, str, str]:
    found = [o.values for o in outcomes if (o.task, o.group, o.arm) == (task, group, arm)]
    size, times, accuracy = (mean_and_error([v[key] for v in found]) for key in ("bytes", "times", "accuracy"))
    return f"{size[0]:,.0f}", f"{times[0]:.1f}x", f"{accuracy[0]:.2f} ± {accuracy[1]:.2f}"


def random_layer(n: int, k: int, bits: int) -> CodebookLinear:
    indices = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    return CodebookLinear.from_indices(indices, torch.randn(2**bits), torch.randn(n), Codebook(weight_bits=bits))


def speed_section(quick: bool) -> str:
    """Markdown: the layer beside others on this machine, and the paper's own shape on disk."""
    torch.manual_seed(0)
    shapes = [(300, 784), (100, 300), (1024, 1024), (4096, 4096)][: 1 if quick else 4]
    rows = []
    for n, k in shapes:
        linear = nn.Linear(k, n).eval()
        layers = {
            "float32": linear,
            "int8": Int8Linear.from_float(linear, Int8WeightOnly()),
            **{f"{bits} bits": random_layer(n, k, bits) for bits in (3, 4, 5)},
        }
        with torch.inference_mode():
            times = interleaved_latency([partial(layer.eval(), torch.randn(1, k)) for layer in layers.values()])
        rows.append((f"1 x {n} x {k}", *(f"{1e6 * t.median:.1f}" for t in times)))
    lines = ["## Time of the layer", "", "Microseconds of one row, one thread; int8 with float activations.", ""]
    lines += markdown_table(("rows x outputs x inputs", *layers), rows, text_columns=1)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    dense = size_of(model).total
    prune_(model, 0.92)
    quantize_(model, Codebook(weight_bits=5))
    coded = size_of(model, huffman=True).total
    lines += [
        "",
        f"Of the paper's own shape, 784-300-100-10, 92% pruned and at 5 bits, untrained: {dense:,} bytes to {coded:,}, "
        f"{dense / coded:.0f} times smaller. That is size alone; there is no accuracy to it.",
    ]
    return "\n".join(lines) + "\n"


def loss_of(stage: str, title: str, why: str) -> list[Comparison]:
    metrics = (ACCURACY, KL, TIMES)
    return [
        Comparison(f"{title}, labels: what it costs", f"{stage}: labels", "dense: labels", why, metrics),
        Comparison(f"{title}, teacher: what it costs", f"{stage}: teacher", "dense: teacher", why, metrics),
    ]


STUDY = Study(
    name="deep-compression",
    title="Deep Compression: pruning, weight sharing and Huffman coding, down to the file",
    claim="A trained network can be made tens of times smaller on disk at no loss of accuracy (Han, Mao, Dally: Deep "
    "Compression, 2016), and a teacher in retraining keeps more of it than labels do.",
    method=f"""\
A LeNet-300-100 (ReLU, no norms) for these digits is trained on all labels. Each arm prunes its weights of least
magnitude to {RISING_TEXT} of each hidden layer, retraining after each step; the last layer keeps
{HEAD_KEEPS} times the share of the others, as in the paper. From three of these steps it clusters what is left of each
layer (`Codebook`; k-means from equally spaced centroids, and one more value for the zeros), finetunes the centroids for
half as long as a pruning, and saves the Huffman-coded file (`save(huffman=True)`). *labels*: on all labels. *teacher*:
the same samples, soft targets of the task's teacher (T = {WITH_LABELS.T:g}), of 1.7 times the weights, and a tenth of
the labels. *itself*: the same samples without labels, soft targets of the dense network. *few labels*: the 100
samples of which the task's student has labels. *dense* is the network trained on for the steps of all prunings
together, on what the arm trains on, and never compressed.""",
    comparisons=(
        *loss_of(
            "pruned",
            "Pruning",
            "What is lost although the weights that are left were retrained.",
        ),
        *loss_of("coded", "All of it", "Down to the Huffman-coded file; its accuracy is that of the shared weights."),
        Comparison(
            "Pruning with a teacher, against labels",
            "pruned: teacher",
            "pruned: labels",
            "The same steps on the same batches.",
        ),
        Comparison(
            "All of it with a teacher, against labels",
            "coded: teacher",
            "coded: labels",
            "The same, down to the file.",
            metrics=(ACCURACY, KL, TIMES),
        ),
        Comparison(
            "All of it without labels, the dense network as the teacher, against all labels",
            "coded: itself, no labels",
            "coded: labels",
            "What compression needs no labels for.",
        ),
        Comparison(
            "All of it without labels, the dense network as the teacher, against few labels",
            "coded: itself, no labels",
            "coded: few labels",
            "Who compresses a network later may have inputs, but few labels.",
        ),
    ),
    run_seed=run_seed,
    steps=2000,
    section=stages_section,
    tasks=("digits",),
    appendix=speed_section,
)
