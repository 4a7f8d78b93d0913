"""Claim B: distillation tells the quantizer which precision each layer needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from kdq.configs import Config, ConfigMap, LowBit
from kdq.distill import SoftTargets
from kdq.quantize import convert_, prepare_qat_, quantize_
from kdq.search import Budget, search_precision
from kdq.search.sensitivity import Sensitivity
from kdq.studies.latency import latency_section
from kdq.studies.paired import Outcome
from kdq.studies.study import Comparison, Study
from kdq.studies.tasks import Task
from kdq.studies.training import LABELS, QAT_RATE, Batches, Pair, fresh, score, train, train_pair

ACT_BITS = 8
BITS = (1, 2, 3, 4, 6, 8)
CANDIDATES: Sequence[Config] = [LowBit(weight_bits=bits, act_bits=ACT_BITS) for bits in BITS]
BUDGETS = {"2 bits": 2, "3 bits": 3, "4 bits": 4}  # average bits of a weight; uniform plans meet them exactly
REFINE = 3
TEN_LABELS = "label loss, ten labels"
PLANS: Mapping[str, tuple[Sensitivity, int]] = {  # by what, and how often it is measured again
    "teacher KL": ("teacher_kl", REFINE),
    "label loss": ("label_loss", REFINE),
    TEN_LABELS: ("label_loss", REFINE),
    "weight SQNR": ("weight_sqnr", 0),
    "teacher KL, once": ("teacher_kl", 0),
}
UNIFORM = "uniform"
TUNED = ", finetuned"
MEASURED_SAMPLES, MEASURED_BATCH = 400, 100  # what sensitivities are measured on
WITHOUT_LABELS = SoftTargets(T=4.0, alpha=1.0)


def float_student(task: Task, pair: Pair, seed: int, steps: int) -> nn.Module:
    """A deep student that has learned all it can from the teacher, so that what plans lose is quantization alone."""
    student = task.deep()
    x, y = pair.data.few()
    labelled = max(1, len(x) // task.batch) * task.student_epochs
    train(student, student, [LABELS], Batches(x, y, task.batch, labelled, seed), QAT_RATE)
    train(student, pair.teacher, [WITHOUT_LABELS], batches(task, pair, seed, 2 * steps), 2 * QAT_RATE)
    return student


def batches(task: Task, pair: Pair, seed: int, steps: int) -> Batches:
    return Batches(pair.data.train_x, None, task.batch, steps, seed + 1000)


Loader: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]


def split(x: torch.Tensor, y: torch.Tensor) -> Loader:
    """The first samples, as batches."""
    x, y = x[:MEASURED_SAMPLES], y[:MEASURED_SAMPLES]
    return list(zip(x.split(MEASURED_BATCH), y.split(MEASURED_BATCH), strict=True))


def plans(student: nn.Module, pair: Pair, bits: int) -> dict[str, ConfigMap]:
    """All plans of one budget, by arm. Labels are few; for the KL, samples need none."""
    few_x, few_y = pair.data.few()
    found: dict[str, ConfigMap] = {UNIFORM: LowBit(weight_bits=bits, act_bits=ACT_BITS)}
    for arm, (sensitivity, refine) in PLANS.items():
        loader = split(*(pair.data.few() if sensitivity == "label_loss" else pair.data.many()))
        found[arm] = search_precision(
            student,
            pair.teacher,
            [(few_x[:10], few_y[:10])] if arm == TEN_LABELS else loader,
            budget=Budget(average_bits=float(bits)),
            candidates=CANDIDATES,
            sensitivity=sensitivity,
            refine=refine,
            rounds=1,  # no plan here hangs on times
            progress=False,
        )
    return found


def run_seed(task: Task, seed: int, steps: int) -> list[Outcome]:
    pair = train_pair(task, seed)
    student = float_student(task, pair, seed, steps)
    loader = split(*pair.data.many())
    outcomes = []
    for group, bits in BUDGETS.items():
        for arm, plan in plans(student, pair, bits).items():
            rounded, tuned = fresh(student), fresh(student)
            quantize_(rounded, plan, calibration=loader)
            prepare_qat_(tuned, plan)
            train(tuned, pair.teacher, [WITHOUT_LABELS], batches(task, pair, seed, steps // 2), QAT_RATE)
            convert_(tuned)
            for suffix, model in (("", rounded), (TUNED, tuned)):
                found = score(model, pair)
                values = {"accuracy": found.accuracy, "teacher_kl": found.teacher_kl}
                outcomes.append(Outcome(task.name, group, arm + suffix, seed, values))
    return outcomes


def against(arm: str, other: str, title: str, why: str) -> list[Comparison]:
    """The question for plans that are only rounded, and for those that were finetuned."""
    return [
        Comparison(title, arm, other, why),
        Comparison(
            f"{title}, after a finetune", arm + TUNED, other + TUNED, "Training mends much of what a plan spoils."
        ),
    ]


STUDY = Study(
    name="claim-b",
    title="Claim B: distillation tells the quantizer which precision each layer needs",
    claim="At an equal budget, bits chosen by the KL to the teacher are better than the same number everywhere, and "
    "than bits chosen by the loss on labels or by the error of the weights.",
    method=f"""\
A student of five linear layers learns in float from the few labels and then from the teacher, on all inputs. Then
each arm gives its layers 1 to 8 bits (weights; activations have {ACT_BITS}) at 2, 3 and 4 bits a weight on average:
*uniform* the same to all; the others solve for the least summed sensitivity, each layer measured alone: *teacher KL*
by the increase of KL(teacher || student) on {MEASURED_SAMPLES} training samples, *label loss* by that of the
cross-entropy on as many of the labelled ones as there are, or on *ten labels*, *weight SQNR* by the noise power of the
rounded weights, which needs no data. KL and loss measure again around the best plan so far, the uniform one among
them, up to {REFINE} times; *once* does not. The plans are rounded and calibrated (`quantize_`), and, *finetuned*,
trained under the teacher without labels for half of the steps. Every student runs on the integer kernels.""",
    comparisons=(
        *against(
            "teacher KL",
            UNIFORM,
            "Bits by teacher KL against uniform bits",
            "Layers differ in what their rounding costs; where they hardly do, there is nothing to choose.",
        ),
        *against(
            "teacher KL",
            "label loss",
            "Bits by teacher KL against bits by label loss",
            "The KL sees every class, on samples that need no label, where labels are few and say little about a "
            "sample that the student has right anyway. But what moves the one mostly moves the other: with measuring "
            "again around the plan, both find almost the same plans.",
        ),
        Comparison(
            "Bits by teacher KL against bits by the loss on ten labels",
            "teacher KL",
            TEN_LABELS,
            "Ten labels say less about the layers than the KL, which needs none, does on many inputs; a hundred "
            "(above) say as much.",
        ),
        *against(
            "teacher KL",
            "weight SQNR",
            "Bits by teacher KL against bits by weight SQNR",
            "The error of a weight does not tell what it does to the output. It does tell which layers are large, and "
            "where all layers of a size matter alike, that is most of what there is to know.",
        ),
        *against(
            "teacher KL",
            "teacher KL, once",
            "Measuring again around the plan",
            "Increases of single layers do not quite add up, least of all at few bits.",
        ),
    ),
    run_seed=run_seed,
    appendix=latency_section,
)
