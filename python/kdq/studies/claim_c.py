"""Claim C: one student that has tried every precision, against a dedicated student for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kdq.configs import Config, ConfigMap
from kdq.distill import SoftTargets
from kdq.layers.base import InferenceLinear
from kdq.quantize import convert_, prepare_qat_, prepare_switchable_
from kdq.reporting import sqnr_db
from kdq.studies import claim_a
from kdq.studies.paired import Outcome
from kdq.studies.study import ACCURACY, KL, Comparison, Metric, Study
from kdq.studies.tasks import Task
from kdq.studies.training import LABELS, QAT_RATE, Batches, Pair, fit, fresh, score, train, train_pair
from kdq.switch import extract, set_precision_
from kdq.switchable_distill import SwitchableDistiller

PRECISIONS: Mapping[str, Config] = {name: c for name, c in claim_a.PRECISIONS.items() if c is not None}
MIXED = "mixed"  # the first layer at 8 bits, the last at 4, those between at 2
COUNT = len(PRECISIONS)
RUNS = 3  # of a switchable step: the widest precision, the narrowest, and one between
FINETUNE_SHARE = 10  # a finetune takes one in so many of the steps
WITHOUT_LABELS = SoftTargets(T=4.0, alpha=1.0)
SQNR = Metric("weight_sqnr", "SQNR of the weights, dB", +1, digits=1)


@dataclass(frozen=True)
class Recipe:
    """How a switchable student is trained."""

    loss: SoftTargets
    recursive: bool = True


SWITCHABLE: Mapping[str, Recipe] = {
    "switchable": Recipe(WITHOUT_LABELS),
    "switchable, all from the teacher": Recipe(WITHOUT_LABELS, recursive=False),
    "switchable, labels": Recipe(LABELS),
}


def mixed_plan(model: nn.Module) -> dict[str, Config]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = dict.fromkeys(names, PRECISIONS["2 bits"])
    plan[names[0]], plan[names[-1]] = PRECISIONS["8 bits"], PRECISIONS["4 bits"]
    return plan


def run_seed(task: Task, seed: int, steps: int) -> list[Outcome]:
    pair = train_pair(task, seed)
    plans: dict[str, ConfigMap] = {**PRECISIONS, MIXED: mixed_plan(pair.student)}
    outcomes: list[Outcome] = []

    def note(group: str, arm: str, converted: nn.Module, trained: nn.Module) -> None:
        found = score(converted, pair)
        values = {"accuracy": found.accuracy, "teacher_kl": found.teacher_kl}
        values["weight_sqnr"] = weight_sqnr(converted, trained)
        outcomes.append(Outcome(task.name, group, arm, seed, values))

    for arm, recipe in SWITCHABLE.items():
        student = train_switchable(task, pair, recipe, seed, steps)
        for group, plan in plans.items():
            note(group, arm, extract(student, plan), student)
        if arm == "switchable":
            set_precision_(student, plans[MIXED])
            loader = batches(task, pair, WITHOUT_LABELS, seed + 1, max(1, steps // FINETUNE_SHARE))
            train(student, pair.teacher, [WITHOUT_LABELS], loader, QAT_RATE)
            note(MIXED, "switchable, finetuned", extract(student, plans[MIXED]), student)
    for group, plan in plans.items():
        for arm, loss, share in (
            ("dedicated, same total", WITHOUT_LABELS, RUNS / COUNT),
            ("dedicated, same each", WITHOUT_LABELS, 1.0),
            ("dedicated, labels", LABELS, 1.0),
        ):
            student = fresh(pair.student)
            prepare_qat_(student, plan)
            loader = batches(task, pair, loss, seed, max(1, round(steps * share)))
            train(student, pair.teacher, [loss], loader, QAT_RATE)
            converted = fresh(student)
            convert_(converted)
            note(group, arm, converted, student)
    return outcomes


def batches(task: Task, pair: Pair, loss: SoftTargets, seed: int, steps: int) -> Batches:
    """All inputs without labels, or, to learn from labels, the few that have them."""
    x, y = pair.data.few() if loss is LABELS else (pair.data.train_x, None)
    return Batches(x, y, task.batch, steps, seed + 1000)


def train_switchable(task: Task, pair: Pair, recipe: Recipe, seed: int, steps: int) -> nn.Module:
    student = fresh(pair.student)
    prepare_switchable_(student, list(PRECISIONS.values()))
    distiller = SwitchableDistiller(pair.teacher, student, [recipe.loss], recursive=recipe.recursive, seed=seed)
    fit(distiller, batches(task, pair, recipe.loss, seed, steps), QAT_RATE)
    return student


@torch.no_grad()
def weight_sqnr(converted: nn.Module, trained: nn.Module) -> float:
    """SQNR in dB of all quantized weights together, against the float weights that they were rounded from."""
    pairs = [
        (layer.dequantized_weight().flatten(), trained.get_parameter(f"{name}.weight").float().flatten())
        for name, layer in converted.named_modules()
        if isinstance(layer, InferenceLinear)
    ]
    return sqnr_db(torch.cat([rounded for rounded, _ in pairs]), torch.cat([weight for _, weight in pairs]))


STUDY = Study(
    name="claim-c",
    title="Claim C: one student that has tried every precision",
    claim="A student that trains at several precisions lets its user choose afterwards, at no loss against dedicated "
    "students of the same total training cost; and it lowers the quantization error that matters, the output's "
    "distance to the teacher.",
    method=f"""\
From one float student (trained on the few labels) each arm trains on the teacher's soft targets (T = 4, no labels,
all training inputs). *switchable*: one student for 8, 4, 2 and 1 bits; each step runs the widest, the narrowest and
one random precision between (sandwich rule), each learning from the next wider one (recursive distillation); weights
are shared, scales, grids and norms are a precision's own. *all from the teacher*: without recursion. *dedicated*: a
student a precision. A switchable step costs {RUNS} forward and backward passes, so that for the *same total* cost the
{COUNT} dedicated students have {RUNS}/{COUNT} of its steps each; *same each* gives every one of them as many steps as
the switchable student in all, {COUNT / RUNS:.2f} times its cost. *labels*: from the few labels, without a teacher.
*{MIXED}* is a plan that no step of the switchable student ever ran: the first layer at 8 bits, the last at 4, those
between at 2; *finetuned* trains it on for a {FINETUNE_SHARE}th of the steps. Every student is converted and evaluated
on the integer and binary kernels.""",
    comparisons=(
        Comparison(
            "One switchable student against dedicated ones, same total cost",
            "switchable",
            "dedicated, same total",
            "The shared weights see every step, a dedicated student only its own share of them; but they must serve "
            "all precisions. From 8 to 2 bits the two even out; the weights that suit 1 bit are others, and a narrow "
            "net has no room for both.",
        ),
        Comparison(
            "One switchable student against dedicated ones, same cost a precision",
            "switchable",
            "dedicated, same each",
            "What is paid for the choice, where training costs nothing.",
            groups=tuple(PRECISIONS),
        ),
        Comparison(
            "The error that does not matter: rounding of the weights",
            "switchable",
            "dedicated, same each",
            "The switchable student's weights lie nearer to their grids, and its outputs no nearer to the teacher (the "
            "KL above): who goes by the error of the weights takes the worse student.",
            metrics=(SQNR,),
            groups=tuple(PRECISIONS),
        ),
        Comparison(
            "A teacher for the switchable student",
            "switchable",
            "switchable, labels",
            "The teacher's soft targets on all inputs against the few labels.",
        ),
        Comparison(
            "Switchable against dedicated without a teacher",
            "switchable, labels",
            "dedicated, labels",
            "With few labels, each precision also regularises the others.",
        ),
        Comparison(
            "Recursive distillation against all precisions from the teacher",
            "switchable",
            "switchable, all from the teacher",
            "The next wider precision is a nearer goal than the teacher, and a worse one: it helps where the distance "
            "is large, at 1 bit.",
        ),
        Comparison(
            "A short finetune of a mixed plan, against a dedicated student of that plan",
            "switchable, finetuned",
            "dedicated, same each",
            f"The switchable student needs a {FINETUNE_SHARE}th of the steps for each plan that it is asked for.",
            metrics=(ACCURACY, KL),
            groups=(MIXED,),
        ),
    ),
    run_seed=run_seed,
)
