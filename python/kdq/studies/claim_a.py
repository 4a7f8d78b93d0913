"""Claim A: the teacher keeps what quantization would lose. Same bits, same data: with a teacher and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from kdq.configs import Binary, Config, Int8Dynamic, LowBit
from kdq.distill import SoftTargets
from kdq.quantize import convert_, prepare_qat_
from kdq.studies.paired import Outcome
from kdq.studies.study import Comparison, Metric, Study
from kdq.studies.tasks import Data, Task
from kdq.studies.training import FLOAT_RATE, LABELS, QAT_RATE, Batches, Pair, fresh, score, train, train_pair

PRECISIONS: Mapping[str, Config | None] = {
    "float32": None,
    "8 bits": Int8Dynamic(),
    "4 bits": LowBit(weight_bits=4, act_bits=4),
    "2 bits": LowBit(weight_bits=2, act_bits=2),
    "1 bit": Binary(),
}
WITH_LABELS = SoftTargets(T=4.0, alpha=0.9)
WITHOUT_LABELS = SoftTargets(T=4.0, alpha=1.0)
COST = Metric("cost", "accuracy lost by quantizing, points", -1)
WEAK_SHARE = 3  # the weak teacher saw one in so many of the student's labelled samples


@dataclass(frozen=True)
class Arm:
    """One way to train a low-bit student from the same float student.

    Attributes:
        teacher: "teacher", "self" (the float student) or "weak" (a model worse than the student).
        data: "few" (the labelled samples) or "many".
    """

    loss: SoftTargets
    teacher: str
    data: str
    labels: bool


ARMS: Mapping[str, Arm] = {
    "labels": Arm(LABELS, "teacher", "few", labels=True),
    "teacher": Arm(WITH_LABELS, "teacher", "few", labels=True),
    "teacher, no labels, all inputs": Arm(WITHOUT_LABELS, "teacher", "many", labels=False),
    "itself, no labels": Arm(WITHOUT_LABELS, "self", "few", labels=False),
    "itself, no labels, all inputs": Arm(WITHOUT_LABELS, "self", "many", labels=False),
    "weak teacher": Arm(WITH_LABELS, "weak", "few", labels=True),
    "all labels": Arm(LABELS, "teacher", "many", labels=True),
    "teacher, all labels": Arm(WITH_LABELS, "teacher", "many", labels=True),
}


def weak_teacher(task: Task, data: Data, seed: int) -> nn.Module:
    """The student's net on a part of its labelled data: a teacher that is worse than the float student."""
    x, y = (part[: data.labelled // WEAK_SHARE] for part in data.few())
    model = task.student()
    train(model, model, [LABELS], Batches(x, y, task.batch, 10 * max(1, len(x) // task.batch), seed), FLOAT_RATE)
    return model


def samples(data: Data, arm: Arm) -> tuple[Tensor, Tensor | None]:
    x, y = data.few() if arm.data == "few" else data.many()
    return x, y if arm.labels else None


def run_seed(task: Task, seed: int, steps: int) -> list[Outcome]:
    pair = train_pair(task, seed)
    teachers = {"teacher": pair.teacher, "self": pair.student, "weak": weak_teacher(task, pair.data, seed)}
    outcomes = []
    for name, arm in ARMS.items():
        in_float = 0.0
        for precision, config in PRECISIONS.items():
            student = train_arm(task, pair, teachers[arm.teacher], arm, config, seed, steps)
            found = score(student, pair)
            in_float = found.accuracy if config is None else in_float
            values = {"accuracy": found.accuracy, "teacher_kl": found.teacher_kl, "cost": in_float - found.accuracy}
            outcomes.append(Outcome(task.name, precision, name, seed, values))
    return outcomes


def train_arm(
    task: Task, pair: Pair, teacher: nn.Module, arm: Arm, config: Config | None, seed: int, steps: int
) -> nn.Module:
    """From the float student to a low-bit one on the real kernels (config None: it goes on in float32)."""
    student = fresh(pair.student)
    if config is not None:
        prepare_qat_(student, config)
    x, y = samples(pair.data, arm)
    train(student, teacher, [arm.loss], Batches(x, y, task.batch, steps, seed + 1000), QAT_RATE)
    if config is not None:
        convert_(student)
    return student


STUDY = Study(
    name="claim-a",
    title="Claim A: the teacher keeps what quantization would lose",
    claim="At the same bits, the same data and the same number of steps, a student that is quantized under a teacher "
    "is better than one that is quantized on labels.",
    method=f"""\
A teacher is trained on all labels of the training data, a small float student on its few. From that float student
each arm trains a low-bit one for the same number of steps, with its own data in an order that the seed fixes: all
arms on the same samples see the same batches. *labels*: quantization-aware training (QAT) on the few labelled
samples. *teacher*: the same samples, soft targets of the teacher (T = {WITH_LABELS.T:g}) and a tenth of the labels.
*no labels*: soft targets alone. *all inputs*: all training inputs, of which only few have labels. *itself*: the float
student teaches its own low-bit copy. *weak teacher*: the student's net trained shortly on a third of its labelled
data, worse than the float student. *all labels*: what QAT does where labels are plentiful. 8 bits are int8 with
dynamic scales, 4 and 2 bits weights and activations with learned scales (LSQ), 1 bit is XNOR-Net. *float32* goes on
training without quantization. Every student is converted and evaluated on the integer and binary kernels.""",
    comparisons=(
        Comparison(
            "A teacher, same samples, same labels",
            "teacher",
            "labels",
            "The soft targets say of each sample what a label does not; the fewer the labels, the more that is.",
        ),
        Comparison(
            "What quantization takes away, with a teacher and without",
            "teacher",
            "labels",
            "The teacher helps the float student as much, and a better model has more to lose: a gain at few bits need "
            "not be a smaller loss on the way there. Compared is the accuracy of an arm in float32 less its accuracy "
            "here.",
            metrics=(COST,),
            groups=("8 bits", "4 bits", "2 bits", "1 bit"),
        ),
        Comparison(
            "What quantization takes away, with a teacher on all inputs and without",
            "teacher, no labels, all inputs",
            "labels",
            "The same for label-free distillation.",
            metrics=(COST,),
            groups=("8 bits", "4 bits", "2 bits", "1 bit"),
        ),
        Comparison(
            "Label-free: the teacher's soft targets on all inputs, against the few labels",
            "teacher, no labels, all inputs",
            "labels",
            "Inputs without labels are cheap; only with a teacher can they be used.",
        ),
        Comparison(
            "Label-free: the float student teaches its own low-bit copy, same samples",
            "itself, no labels",
            "labels",
            "The copy can become what it was, not more; labels that were already learned add little to that.",
        ),
        Comparison(
            "Label-free: the float student teaches its own copy on all inputs",
            "itself, no labels, all inputs",
            "labels",
            "More inputs tie the copy to the float model where the labelled samples do not reach.",
        ),
        Comparison(
            "A teacher where labels are plentiful",
            "teacher, all labels",
            "all labels",
            "With a label for everything, less is left that only the teacher could tell.",
        ),
        Comparison(
            "A teacher worse than its student",
            "weak teacher",
            "labels",
            "It hands on its errors. `Distiller.fit(validation=...)` warns of such a teacher.",
        ),
    ),
    run_seed=run_seed,
)
