"""Claim C: one student that has tried every precision, against a dedicated student for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kdq.configs import Binary, Config, ConfigMap, Int8Dynamic, LowBit
from kdq.distill import SoftTargets
from kdq.layers.base import InferenceLinear
from kdq.quantize import convert_, prepare_qat_, prepare_switchable_
from kdq.reporting import sqnr_db
from kdq.studies.paired import Outcome
from kdq.studies.study import ACCURACY, KL, Comparison, Metric, Study
from kdq.studies.tasks import Task
from kdq.studies.training import LABELS, QAT_RATE, Batches, Pair, fit, fresh, score, train, train_pair
from kdq.switch import extract, set_precision_
from kdq.switchable_distill import SwitchableDistiller

PRECISIONS: Mapping[str, Config] = {
    "8 bits": Int8Dynamic(),
    **{f"{bits} bits": LowBit(weight_bits=bits, act_bits=bits) for bits in (6, 5, 4, 3, 2)},
}
FOUR: Mapping[str, Config] = {name: PRECISIONS[name] for name in ("8 bits", "4 bits", "2 bits")} | {"1 bit": Binary()}
OF_FOUR = " of four"  # ends the names of groups of the smaller set
GROUPS_OF_FOUR = tuple(name + OF_FOUR for name in FOUR)
MIXED = "mixed"  # the first layer at 8 bits, the last at 4, those between at 2
RUNS = 3  # of a switchable step: the widest precision, the narrowest, and one between
FINETUNE_SHARE = 10  # a finetune takes one in so many of the steps
WITHOUT_LABELS = SoftTargets(T=4.0, alpha=1.0)
SQNR = Metric("weight_sqnr", "SQNR of the weights, dB", +1, digits=1)


@dataclass(frozen=True)
class Recipe:
    """How a switchable student is trained."""

    loss: SoftTargets = WITHOUT_LABELS
    recursive: bool = False


SWITCHABLE: Mapping[str, Recipe] = {
    "switchable": Recipe(),
    "switchable, recursive": Recipe(recursive=True),
    "switchable, labels": Recipe(LABELS),
}


def mixed_plan(model: nn.Module) -> dict[str, Config]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = dict.fromkeys(names, PRECISIONS["2 bits"])
    plan[names[0]], plan[names[-1]] = PRECISIONS["8 bits"], PRECISIONS["4 bits"]
    return plan


class Arms:
    """One seed's students, and what is found of them."""

    def __init__(self, task: Task, seed: int, steps: int) -> None:
        self.task, self.seed, self.steps = task, seed, steps
        self.pair = train_pair(task, seed)
        self.outcomes: list[Outcome] = []

    def note(self, group: str, arm: str, converted: nn.Module, trained: nn.Module) -> None:
        found = score(converted, self.pair)
        values = {"accuracy": found.accuracy, "teacher_kl": found.teacher_kl}
        values["weight_sqnr"] = weight_sqnr(converted, trained)
        self.outcomes.append(Outcome(self.task.name, group, arm, self.seed, values))

    def switchable(self, recipe: Recipe, precisions: Mapping[str, Config]) -> nn.Module:
        student = fresh(self.pair.student)
        prepare_switchable_(student, list(precisions.values()))
        distiller = SwitchableDistiller(
            self.pair.teacher, student, [recipe.loss], recursive=recipe.recursive, seed=self.seed
        )
        fit(distiller, batches(self.task, self.pair, recipe.loss, self.seed, self.steps), QAT_RATE)
        return student

    def dedicated(self, group: str, arm: str, plan: ConfigMap, share: float) -> None:
        """A student of its own for a plan, with so much of the steps."""
        student = fresh(self.pair.student)
        prepare_qat_(student, plan)
        loader = batches(self.task, self.pair, WITHOUT_LABELS, self.seed, max(1, round(self.steps * share)))
        train(student, self.pair.teacher, [WITHOUT_LABELS], loader, QAT_RATE)
        converted = fresh(student)
        convert_(converted)
        self.note(group, arm, converted, student)

    def finetuned(self, student: nn.Module, plan: ConfigMap) -> nn.Module:
        """The switchable student after a short training at one plan."""
        set_precision_(student, plan)
        steps = max(1, self.steps // FINETUNE_SHARE)
        loader = batches(self.task, self.pair, WITHOUT_LABELS, self.seed + 1, steps)
        train(student, self.pair.teacher, [WITHOUT_LABELS], loader, QAT_RATE)
        return student


def run_seed(task: Task, seed: int, steps: int) -> list[Outcome]:
    arms = Arms(task, seed, steps)
    plans: dict[str, ConfigMap] = {**PRECISIONS, MIXED: mixed_plan(arms.pair.student)}
    for arm, recipe in SWITCHABLE.items():
        student = arms.switchable(recipe, PRECISIONS)
        for group, plan in plans.items():
            arms.note(group, arm, extract(student, plan), student)
        if arm == "switchable":
            tuned = arms.finetuned(student, plans[MIXED])
            arms.note(MIXED, "switchable, finetuned", extract(tuned, plans[MIXED]), tuned)
    for group, plan in plans.items():
        arms.dedicated(group, "dedicated, same total", plan, RUNS / len(PRECISIONS))
        arms.dedicated(group, "dedicated, same each", plan, 1.0)
    of_four(arms)
    return arms.outcomes


def of_four(arms: Arms) -> None:
    """The smaller set: the same arms for it."""
    for arm in ("switchable", "switchable, recursive"):
        student = arms.switchable(SWITCHABLE[arm], FOUR)
        for group, config in FOUR.items():
            arms.note(group + OF_FOUR, arm, extract(student, config), student)
    for group, config in FOUR.items():
        arms.dedicated(group + OF_FOUR, "dedicated, same total", config, RUNS / len(FOUR))
        arms.dedicated(group + OF_FOUR, "dedicated, same each", config, 1.0)


def batches(task: Task, pair: Pair, loss: SoftTargets, seed: int, steps: int) -> Batches:
    """All inputs without labels, or, to learn from labels, the few that have them."""
    x, y = pair.data.few() if loss is LABELS else (pair.data.train_x, None)
    return Batches(x, y, task.batch, steps, seed + 1000)


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
    claim="A student that trains at several precisions lets its user choose afterwards, and is better than dedicated "
    "students of the same total training cost; it lowers the quantization error that matters, the output's distance "
    "to the teacher.",
    method=f"""\
From one float student (trained on the few labels) each arm trains on the teacher's soft targets (T = 4, no labels,
all training inputs). *switchable*: one student for 8, 6, 5, 4, 3 and 2 bits; each step runs the widest, the narrowest
and one random precision between (sandwich rule); weights are shared, scales, grids and norms are a precision's own.
*recursive*: each precision learns from the next wider one, which learns from the teacher, instead of all from the
teacher. *dedicated*: a student a precision. A switchable step costs {RUNS} forward and backward passes, so that for the
*same total* cost the {len(PRECISIONS)} dedicated students have {RUNS}/{len(PRECISIONS)} of its steps each; *same each*
gives every one of them as many steps as the switchable student in all, {len(PRECISIONS) // RUNS} times its cost.
*labels*: from the few labels, without a teacher. Groups *of four*: the same with 8, 4, 2 and 1 bits, where *same
total* is {RUNS}/{len(FOUR)} of the steps. *{MIXED}* is a plan that no step of the switchable student ever ran: the
first layer at 8 bits, the last at 4, those between at 2; *finetuned* trains it on for a {FINETUNE_SHARE}th of the
steps. Every student is converted and evaluated on the integer and binary kernels.""",
    comparisons=(
        Comparison(
            "One switchable student against dedicated ones, same total cost",
            "switchable",
            "dedicated, same total",
            "The shared weights see every step, a dedicated student only its own share of them: the more precisions, "
            "the smaller that share. A mixed plan, which the switchable student never tried, wants a finetune.",
            groups=(*PRECISIONS, MIXED),
        ),
        Comparison(
            "Four precisions, one of them 1 bit, same total cost",
            "switchable",
            "dedicated, same total",
            "Where the claim ends: with few precisions there is little to share, and the weights that suit 1 bit are "
            "others than those that suit 8. A net this narrow has no room for both.",
            groups=GROUPS_OF_FOUR,
        ),
        Comparison(
            "Four precisions, one of them 1 bit, recursive, same total cost",
            "switchable, recursive",
            "dedicated, same total",
            "Not for lack of a nearer teacher: what the recursion gains at 1 bit is not enough.",
            groups=GROUPS_OF_FOUR,
        ),
        Comparison(
            "Four precisions, one of them 1 bit, same cost a precision",
            "switchable",
            "dedicated, same each",
            "What is paid for the choice, 1 bit included.",
            groups=GROUPS_OF_FOUR,
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
            "How near the weights lie to their grids says nothing about how near the outputs are to the teacher (the "
            "KL above): who goes by the error of the weights may take the worse student.",
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
            "Recursive distillation against all precisions from the teacher",
            "switchable, recursive",
            "switchable",
            "The next wider precision is a nearer goal than the teacher, and a worse one.",
            groups=tuple(PRECISIONS),
        ),
        Comparison(
            "Recursive distillation against all precisions from the teacher, four precisions",
            "switchable, recursive",
            "switchable",
            "It helps at 1 bit, where the distance to the teacher is large: accuracy on both tasks, the "
            "distance itself on digits alone. At 2 bits nothing is shown; at 8 and 4 bits "
            "it costs on text, and nothing is shown on digits.",
            groups=GROUPS_OF_FOUR,
        ),
        Comparison(
            "A short finetune of a mixed plan, against a dedicated student of that plan",
            "switchable, finetuned",
            "dedicated, same total",
            f"The switchable student needs a {FINETUNE_SHARE}th of the steps for each plan that it is asked for.",
            metrics=(ACCURACY, KL),
            groups=(MIXED,),
        ),
    ),
    run_seed=run_seed,
)
