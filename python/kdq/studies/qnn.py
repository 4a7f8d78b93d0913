"""Quantized Neural Networks (Hubara et al. 2016): binary and 2-bit nets trained from scratch, and how fast they run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kdq.bench.table import markdown_table
from kdq.configs import Binary, Config, LowBit
from kdq.distill import Distiller, SoftTargets
from kdq.fold_binary import fold_binary_chain_
from kdq.qnn import QuantizeGradient, ShiftAdaMax, ShiftBatchNorm1d, clip_weights_
from kdq.quantize import convert_, prepare_qat_
from kdq.studies.binary_speed import speed_section
from kdq.studies.paired import Outcome, mean_and_error
from kdq.studies.study import ACCURACY, Comparison, Study
from kdq.studies.tasks import CLASSES, CONTEXT, Task, embedding
from kdq.studies.training import LABELS, Batches, Pair, score, train_pair

WITH_LABELS = SoftTargets(T=4.0, alpha=0.9)
RATE = 2**-7
# The first layer's inputs keep 8 bits, as in the paper.
PRECISIONS: Mapping[str, tuple[Config, Config] | None] = {
    "float32": None,
    "2 bits": (LowBit(weight_bits=2, act_bits=8), LowBit(weight_bits=2, act_bits=2, method="dorefa")),
    "1 bit": (LowBit(weight_bits=1, act_bits=8), Binary()),
}


@dataclass(frozen=True)
class Arm:
    """One way to train a net from scratch.

    Attributes:
        shift: batch norm and optimizer by shifts, instead of batch norm and Adam.
        gradient: what quantizes the gradients of each layer's results.
    """

    loss: SoftTargets = LABELS
    shift: bool = False
    gradient: QuantizeGradient | None = None


ARMS: Mapping[str, Arm] = {
    "labels": Arm(),
    "6-bit gradients": Arm(gradient=QuantizeGradient(6)),
    "4-bit log gradients": Arm(gradient=QuantizeGradient(4, "log")),
    "shifts": Arm(shift=True),
    "everything": Arm(shift=True, gradient=QuantizeGradient(6)),
    "teacher": Arm(WITH_LABELS),
}


def net(task: Task, arm: Arm) -> nn.Sequential:
    """Linear layers with batch norm behind each, and Hardtanh between them: the paper's order, in which norm and sign
    fold into thresholds."""
    text = task.name == "text"
    widths = [CONTEXT * 16, 128, 128, CLASSES] if text else [64, 128, 128, 10]
    layers: list[nn.Module] = [embedding(16) if text else nn.Identity()]
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Hardtanh()] if i else []
        layers += [nn.Linear(before, after, bias=False)]
        layers += [] if arm.gradient is None else [copy.deepcopy(arm.gradient)]
        layers += [ShiftBatchNorm1d(after) if arm.shift else nn.BatchNorm1d(after)]
    return nn.Sequential(*layers)


def run_seed(task: Task, seed: int, steps: int) -> list[Outcome]:
    pair = train_pair(task, seed)
    outcomes = []
    for precision, configs in PRECISIONS.items():
        for name, arm in ARMS.items():
            model = train_arm(task, pair, arm, configs, seed, steps)
            found = score(model, pair)
            values = {"accuracy": found.accuracy, "teacher_kl": found.teacher_kl}
            # Arms are compared at a precision, and precisions in an arm.
            outcomes.append(Outcome(task.name, precision, name, seed, values))
            outcomes.append(Outcome(task.name, name, precision, seed, values))
    return outcomes


def is_linear(module: nn.Module, _: str) -> bool:
    """Embeddings stay in float."""
    return isinstance(module, nn.Linear)


def train_arm(
    task: Task, pair: Pair, arm: Arm, configs: tuple[Config, Config] | None, seed: int, steps: int
) -> nn.Module:
    """From random weights, the same in all arms, to a net on the real kernels."""
    torch.manual_seed(seed)
    model = net(task, arm)
    if configs is not None:
        first = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        prepare_qat_(model, {first: configs[0], "*": configs[1]}, filter_fn=is_linear)
    loader = Batches(*pair.data.many(), task.batch, steps, seed + 1000)
    fit(Distiller(pair.teacher, model, [arm.loss]), loader, arm.shift)
    if configs is not None:
        convert_(model)
    fold_exactly_(model, pair.data.test_x)
    return model


def fit(distiller: Distiller, loader: Batches, shift: bool) -> None:
    """One pass over the loader; the learning rate falls to zero (cosine), weights of binary layers stay in [-1, 1]."""
    parameters = list(distiller.parameters())
    optimizer = ShiftAdaMax(parameters, RATE) if shift else torch.optim.Adam(parameters, RATE, fused=True)
    optimizer.register_step_post_hook(lambda *_: clip_weights_(distiller.student))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
    distiller.fit(loader, 1, optimizer, scheduler=scheduler, progress=False)
    distiller.student.eval()


@torch.inference_mode()
def fold_exactly_(model: nn.Module, x: torch.Tensor) -> None:
    """Folds hidden binary layers to bits, in place.

    Raises:
        RuntimeError: a result for x is another than before.
    """
    before = model(x)
    fold_binary_chain_(model)
    if not torch.equal(model(x), before):
        raise RuntimeError("the folded net puts out something else than the net did")


def paper_section(outcomes: Sequence[Outcome]) -> str:
    """Markdown: the errors of the paper's nets on its digits and of these nets on theirs."""
    rows = [
        ("the paper, MNIST", "1 bit, in Theano", "0.96"),
        ("the paper, MNIST", "1 bit, in Torch7", "1.40"),
        ("the paper, MNIST", "float32, the best that it names (Maxout Networks)", "0.94"),
    ]
    for precision in PRECISIONS:
        for arm in ("labels", "everything"):
            found = [o.values["accuracy"] for o in outcomes if (o.task, o.group, o.arm) == ("digits", precision, arm)]
            mean, error = mean_and_error([100 - value for value in found])
            rows.append(("here, digits", f"{precision}, {arm}", f"{mean:.2f} ± {error:.2f}"))
    return "\n".join(
        [
            "## The paper's accuracy beside what it gives here",
            "",
            *markdown_table(("task", "net", "error, %"), rows, text_columns=2),
            "",
            "The paper's nets have three hidden layers of thousands of units and see 60,000 digits of 28x28 pixels for "
            "up to 1000 epochs; those here have two of 128 units and see 1200 digits of 8x8. One of the 597 test "
            "digits is 0.17 points. What can be compared is the distance of 1 bit to float32.",
            "",
        ]
    )


COSTS = ("labels", "everything", "teacher")

STUDY = Study(
    name="qnn",
    title="Quantized Neural Networks: trained from scratch, run on bits",
    claim="Nets of 1 and 2 bits can be trained from scratch, with gradients of few bits and with batch norm and "
    "optimizer by shifts, close to float32; a binary net is several times as fast (Hubara et al. 2016).",
    method=f"""\
Every arm starts from the same random weights and takes the same number of steps, on all labels. The nets are not the
tasks' students below but the paper's in small: three linear layers, batch norm behind each, Hardtanh between; digits
64-128-128-10, text (embedding of 16)-128-128-128-{CLASSES}. *1 bit*: XNOR-Net's ±1 weights with a scale a channel and
±1 activations, the first layer ±1 weights on 8-bit inputs; *2 bits*: DoReFa-Net's weights and activations, the first
layer 2-bit weights on 8-bit inputs. *labels*: Adam, batch norm, float gradients. *6-bit gradients*: of each layer's
result, rounded by chance (DoReFa-Net); *4-bit log gradients*: sign and one of seven powers of two. *shifts*:
shift-based batch norm and shift-based AdaMax. *everything*: shifts and 6-bit gradients. *teacher*: soft targets
(T = {WITH_LABELS.T:g}) of a float32 net that was trained on all labels, and a tenth of the labels. Learning rate
{RATE:g} for all, falling to zero; latent weights of binary layers are clipped to [-1, 1]. Every low-bit net is
evaluated on the integer and binary kernels, the binary ones with their hidden layers folded to bits, after a check that
this changes no result.""",
    comparisons=(
        Comparison("What 1 bit costs", "1 bit", "float32", "The same training at two precisions.", groups=COSTS),
        Comparison("What 2 bits cost", "2 bits", "float32", "The same training at two precisions.", groups=COSTS),
        Comparison(
            "6-bit gradients",
            "6-bit gradients",
            "labels",
            "The noise of rounding is that of a smaller batch: right in the mean.",
            metrics=(ACCURACY,),
        ),
        Comparison(
            "4-bit gradients on powers of two",
            "4-bit log gradients",
            "labels",
            "Powers of two reach far with few bits, but a value may be 41 % off, and always is by as much.",
            metrics=(ACCURACY,),
        ),
        Comparison(
            "Shift-based batch norm and AdaMax",
            "shifts",
            "labels",
            "A factor of at most the root of two here and there, and another optimizer.",
            metrics=(ACCURACY,),
        ),
        Comparison(
            "Everything: shifts and 6-bit gradients",
            "everything",
            "labels",
            "Gradients, batch norm and optimizer at once, as the paper trains.",
            metrics=(ACCURACY,),
        ),
        Comparison(
            "A teacher",
            "teacher",
            "labels",
            "All samples have labels; the teacher has seen them more often than the student will.",
        ),
    ),
    run_seed=run_seed,
    steps=400,
    appendix=speed_section,
    section=paper_section,
)
