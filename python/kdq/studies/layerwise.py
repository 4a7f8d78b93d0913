"""Layer-wise learning: a deep autoencoder and classifiers, block by block and end to end, after Hinton, Salakhutdinov,
2006."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from kdq.bench.table import markdown_table
from kdq.blocks import distill_blocks
from kdq.configs import Config
from kdq.distill import Distiller
from kdq.losses import LogitRegression, Loss, SoftTargets
from kdq.observe import evaluating
from kdq.quantize import convert_, prepare_qat_, quantize_
from kdq.studies import claim_a
from kdq.studies.paired import Outcome, mean_and_error
from kdq.studies.study import Comparison, Metric, Study
from kdq.studies.tasks import DIGITS, Task
from kdq.studies.training import FLOAT_RATE, Batches, Pair, fit, fresh, score, train_pair

PRECISIONS: Mapping[str, Config | None] = claim_a.PRECISIONS
WIDTHS = (64, 128, 64, 32, 8)  # of the encoder: pixels to code
REGRESSION: Sequence[Loss] = [LogitRegression()]
SOFT_TARGETS: Sequence[Loss] = [SoftTargets(T=4.0, alpha=1.0)]
BLOCK_RATE, WHOLE_RATE = 1e-2, 5e-3  # of students; each near the best of those tried on one seed
FLOAT_LONGER = 6  # the float autoencoder takes so many times the steps of an arm
HIDDEN = {"3": "3", "7": "7", "10": "10"}  # features of teacher and student: behind both ReLUs, and the logits
ERROR = Metric("error", "reconstruction error, % of the variance", -1)
DISTANCE = Metric("distance", "distance to the float reconstruction, % of the variance", -1)


# ---- the autoencoder -------------------------------------------------------------------------------------------------


def block(before: int, after: int, linear: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, after), nn.Identity() if linear else nn.Tanh())


def autoencoder() -> nn.Sequential:
    """Blocks 0 to 3 are the encoder, 4 to 7 the decoder; code and pixels are linear."""
    pairs = list(itertools.pairwise(WIDTHS))
    down = [block(wide, narrow, linear=narrow == WIDTHS[-1]) for wide, narrow in pairs]
    up = [block(narrow, wide, linear=wide == WIDTHS[0]) for wide, narrow in reversed(pairs)]
    return nn.Sequential(*down, *up)


def pretrain(model: nn.Sequential, x: Tensor, batch: int, steps: int, seed: int) -> None:
    """Each level of the encoder with that of the decoder which is to invert it: a shallow autoencoder of the codes of
    the level below."""
    levels = len(WIDTHS) - 1
    for level in range(levels):
        with torch.no_grad():
            codes = model[:level](x)
        shallow = nn.Sequential(model[level], model[2 * levels - 1 - level])
        learn(nn.Identity(), shallow, REGRESSION, codes, batch, max(1, steps // levels), seed, FLOAT_RATE)


def learn(
    teacher: nn.Module,
    student: nn.Module,
    losses: Sequence[Loss],
    x: Tensor,
    batch: int,
    steps: int,
    seed: int,
    rate: float,
) -> None:
    """End to end; nn.Identity() as the teacher has a student reconstruct its input."""
    fit(Distiller(teacher, student, losses), Batches(x, None, batch, steps, seed), rate)


def learn_blocks(
    teacher: nn.Module, student: nn.Module, pairs: Mapping[str, str], x: Tensor, batch: int, steps: int, seed: int
) -> None:
    """Block by block, with the steps shared out among them."""
    loader = Batches(x, None, batch, max(1, steps // len(pairs)), seed)
    distill_blocks(
        teacher,
        student,
        pairs,
        loader,
        1,
        lr=BLOCK_RATE,
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, len(loader)),
        progress=False,
    )
    student.eval()


def principal_components(x: Tensor, test: Tensor) -> Tensor:
    """The test data from as many principal components as the code has units."""
    mean = x.mean(0)
    axes = torch.linalg.svd(x - mean, full_matrices=False).Vh[: WIDTHS[-1]]
    return (test - mean) @ axes.T @ axes + mean


def autoencoder_outcomes(seed: int, steps: int) -> list[Outcome]:
    data = DIGITS.split(seed)
    x, test = 2 * data.train_x - 1, 2 * data.test_x - 1
    variance = (test - x.mean(0)).square().mean()
    outcomes: list[Outcome] = []

    def share(got: Tensor, expected: Tensor) -> float:
        return float(100 * (got - expected).square().mean() / variance)

    @torch.inference_mode()
    def note(group: str, arm: str, model: nn.Module) -> None:
        with evaluating(model):
            got = model(test)
        values = {"error": share(got, test), "distance": share(got, teacher(test))}
        outcomes.append(Outcome(DIGITS.name, group, arm, seed, values))

    torch.manual_seed(seed)
    start = autoencoder()
    whole, teacher = copy.deepcopy(start), copy.deepcopy(start)
    total = FLOAT_LONGER * steps
    learn(nn.Identity(), whole, REGRESSION, x, DIGITS.batch, total, seed, FLOAT_RATE)
    pretrain(teacher, x, DIGITS.batch, total // 2, seed)
    learn(nn.Identity(), teacher, REGRESSION, x, DIGITS.batch, total - total // 2, seed, FLOAT_RATE)
    note("float32", "pretrained", teacher)
    note("float32", "end to end", whole)
    components = {"error": share(principal_components(x, test), test)}
    outcomes.append(Outcome(DIGITS.name, "float32", "principal components", seed, components))
    for precision, config in PRECISIONS.items():
        if config is not None:
            note(precision, "in float32", teacher)
            for arm, model in quantized(teacher, start, config, x, steps, seed).items():
                note(precision, arm, model)
    return outcomes


def quantized(
    teacher: nn.Sequential, untrained: nn.Sequential, config: Config, x: Tensor, steps: int, seed: int
) -> dict[str, nn.Module]:
    """All arms of one precision, on the kernels."""
    batch, order = DIGITS.batch, seed + 1000
    pairs = {str(i): str(i) for i in range(len(teacher))}
    rounded = fresh(teacher)
    quantize_(rounded, config, calibration=x.split(100))
    arms: dict[str, nn.Module] = {}
    for arm, start, goal, apart in (
        ("whole", teacher, teacher, 0),
        ("blocks, then whole", teacher, teacher, steps // 2),
        ("blocks", teacher, teacher, steps),
        ("from the data", teacher, nn.Identity(), 0),
        ("whole, anew", untrained, teacher, 0),
        ("blocks, then whole, anew", untrained, teacher, steps // 2),
    ):
        student = arms[arm] = fresh(start)
        prepare_qat_(student, config)
        if apart:
            learn_blocks(teacher, student, pairs, x, batch, apart, order)
        if apart < steps:
            learn(goal, student, REGRESSION, x, batch, steps - apart, order, WHOLE_RATE)
        convert_(student)
    return {**arms, "rounded": rounded}


# ---- the classifiers -------------------------------------------------------------------------------------------------


def classifier_outcomes(task: Task, pair: Pair, seed: int, steps: int) -> list[Outcome]:
    outcomes = []
    x, order = pair.data.train_x, seed + 1000
    torch.manual_seed(order)
    untrained = task.student()
    for precision, config in PRECISIONS.items():
        for arm, apart in (("classifier: blocks, then whole", steps // 2), ("classifier: whole", 0)):
            student = fresh(untrained)
            if config is not None:
                prepare_qat_(student, config)
            if apart:
                learn_blocks(pair.teacher, student, HIDDEN, x, task.batch, apart, order)
            learn(pair.teacher, student, SOFT_TARGETS, x, task.batch, steps - apart, order, WHOLE_RATE)
            convert_(student)
            found = score(student, pair)
            values = {"accuracy": found.accuracy, "teacher_kl": found.teacher_kl}
            outcomes.append(Outcome(task.name, precision, arm, seed, values))
    return outcomes


def run_seed(task: Task, seed: int, steps: int) -> list[Outcome]:
    outcomes = autoencoder_outcomes(seed, steps) if task.name == DIGITS.name else []
    return outcomes + classifier_outcomes(task, train_pair(task, seed), seed, steps)


def paper_section(outcomes: Sequence[Outcome]) -> str:
    """Markdown: the reconstruction errors of the paper's autoencoder and of this one, against principal components."""
    rows: list[tuple[str, ...]] = [
        ("the paper, MNIST, code of 30", "deep autoencoder, pretrained", "3.00", "0.22"),
        ("the paper, MNIST, code of 30", "logistic principal components", "8.01", "0.58"),
        ("the paper, MNIST, code of 30", "principal components", "13.87", "1.00"),
    ]
    found = {
        arm: [o.values["error"] for o in outcomes if (o.group, o.arm) == ("float32", arm) and "error" in o.values]
        for arm in ("pretrained", "end to end", "principal components")
    }
    linear = found["principal components"]
    for arm, errors in found.items():
        cells = [mean_and_error(values) for values in (errors, [a / b for a, b in zip(errors, linear, strict=True)])]
        name = arm if arm == "principal components" else f"deep autoencoder, {arm}"
        rows.append((f"here, digits, code of {WIDTHS[-1]}", name, *(f"{mean:.2f} ± {e:.2f}" for mean, e in cells)))
    return "\n".join(
        [
            "## The paper's errors beside what it gives here",
            "",
            *markdown_table(("where", "model", "error", "of principal components'"), rows, text_columns=2),
            "",
            "The paper's errors are squared, a picture of 784 pixels from 0 to 1, of the test pictures that it shows, "
            "one a class; those here are percent of the variance, of all test digits. The paper's encoder is "
            "784-1000-500-250-30 and learns from 60,000 digits, the one here "
            f"{'-'.join(map(str, WIDTHS))} from 1200.",
            "",
        ]
    )


STUDY = Study(
    name="layerwise",
    title="Layer-wise learning: block by block against end to end",
    claim="Hinton, Salakhutdinov (Reducing the dimensionality of data with neural networks, 2006): a deep autoencoder "
    "that is pretrained layer by layer and then finetuned as a whole reconstructs better than one trained end to end, "
    "and than principal components. Here also: a low-bit student that is pretrained block by block on its teacher's "
    "features is better than one trained end to end for as many steps.",
    method=f"""\
The deep autoencoder, {"-".join(map(str, (*WIDTHS, *WIDTHS[-2::-1])))}, learns to reconstruct the digits' pixels
(scaled to -1 to 1) by squared error; code and pixels are linear, all else tanh, which is the paper's logistic unit
with signs, without which 1 bit would see nothing. It is for the digits alone: to guess characters is no regression.
*pretrained*: greedily, each level of the encoder with that of the decoder which inverts it as a shallow autoencoder
of the codes below (autoencoder blocks in the place of the paper's restricted Boltzmann machines), for half of the
steps, then the whole for the other half. *end to end*: all steps on the whole, from the same random weights. Both
take {FLOAT_LONGER} times the steps of an arm (Adam, rate {FLOAT_RATE:g}, falling to 0). Errors are shares of the
variance of the test pixels.

The float autoencoder (*pretrained*) is the teacher of its low-bit copies: *rounded* (`quantize_`, calibrated, not
trained); *whole*: end to end, on its reconstructions; *blocks*: `kdq.distill_blocks`, each of the 8 blocks on the
teacher's feature behind it, with an 8th of the steps each; *blocks, then whole*: half of the steps each way; *from
the data*: end to end, on the pixels themselves. These start from the float weights, *anew* from random ones.

The classifiers, on both tasks, are the untrained small student of the task with the large one as the teacher, on all
inputs without labels: *blocks, then whole* trains the three blocks to put out the teacher's hidden features, by
learned regressors, and its logits, then the whole on soft targets (T = 4); *whole* takes all steps for the latter.
Students learn with Adam at {BLOCK_RATE:g} in blocks and {WHOLE_RATE:g} as a whole (near the best of the rates tried
on one seed), falling to 0 in each part. All low-bit models are converted and tested on the kernels.""",
    comparisons=(
        Comparison(
            "In float: pretrained layer by layer against end to end",
            "pretrained",
            "end to end",
            "The paper pretrained logistic nets that did not train at all from the start. Today's starting weights and "
            "Adam may do without; then the steps that were spent on single levels are missing at the end.",
            (ERROR,),
        ),
        Comparison(
            "In float: against principal components",
            "pretrained",
            "principal components",
            "As many components as the code has units: what a linear encoder and decoder can reach at most.",
            (ERROR,),
        ),
        Comparison(
            "What the bits cost: trained end to end against float32",
            "whole",
            "in float32",
            "A code of few units has little to spare: each bit that is taken shows in the pixels.",
            (ERROR,),
        ),
        Comparison(
            "What training repairs of rounding",
            "whole",
            "rounded",
            "Eight layers in a row each add to the error, and none was told to make up for those before it.",
            (ERROR, DISTANCE),
        ),
        Comparison(
            "Low-bit, from the float weights: blocks first, against end to end",
            "blocks, then whole",
            "whole",
            "The weights are nearly right already; the features of a layer are a nearer goal than the "
            "reconstruction, which is what counts in the end.",
            (ERROR, DISTANCE),
        ),
        Comparison(
            "Low-bit, from random weights: blocks first, against end to end",
            "blocks, then whole, anew",
            "whole, anew",
            "Here the blocks have all to learn. Each gets a goal next to it, where the gradient that comes from "
            "the end has to pass eight rounded layers.",
            (ERROR, DISTANCE),
        ),
        Comparison(
            "Blocks alone, against end to end",
            "blocks",
            "whole",
            "Each block makes up for what those before it lost, but no block before the last is told what matters "
            "for the pixels.",
            (ERROR, DISTANCE),
        ),
        Comparison(
            "The float self as the teacher, against the data themselves",
            "whole",
            "from the data",
            "The data hold what the float net lost, too; its reconstructions are what a net of its shape can reach.",
            (ERROR, DISTANCE),
        ),
        Comparison(
            "A classifier of another width, from random weights: blocks first, against end to end",
            "classifier: blocks, then whole",
            "classifier: whole",
            "The student's hidden layers are too narrow for the teacher's features, which it learns through "
            "regressors that are dropped afterwards; the classes need less.",
        ),
    ),
    run_seed=run_seed,
    steps=400,
    section=paper_section,
)
