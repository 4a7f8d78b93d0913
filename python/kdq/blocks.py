"""distill_blocks: pretrains a student block by block on a teacher's features, before the whole is finetuned.

histories = distill_blocks(teacher, student, {"block1": "layer2", "block2": "layer4"}, loader, epochs=5)
Distiller(teacher, student, [SoftTargets(T=4)]).fit(loader, epochs=20)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdq.distill import Distiller, History, check_unfused
from kdq.losses import Hint
from kdq.losses.features import make_adapters
from kdq.observe import Batch, check_repeatable, evaluating, find_layer, parse_batch
from kdq.training import check_count


def distill_blocks(
    teacher: nn.Module,
    student: nn.Module,
    pairs: Mapping[str, str],
    loader: Iterable[Any],
    epochs: int,
    *,
    lr: float = 1e-3,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    progress: bool | Progress = True,
) -> dict[str, History]:
    """Trains the student block after block, each to put out a feature of the teacher's, by mean squared error.

    The greedy layer-wise pretraining of Hinton, Salakhutdinov: Reducing the dimensionality of data with neural
    networks, 2006, with a teacher's features as what a block reconstructs (Romero et al.: FitNets: Hints for Thin Deep
    Nets, 2015). It needs no labels. Finetune the whole afterwards with a `Distiller`.

    A block is what a feature depends on and no feature before does. It trains on what the blocks before it put out,
    which are done: they are in eval mode and do not change any more. Both models run only as far as the feature, so
    that nothing behind it changes, no statistics and no activation scales, which so start from what a trained block
    gives them. Where the widths of a pair differ, a linear regressor from the student's feature to the teacher's is
    trained with the block, and dropped.

    Args:
        teacher: in eval mode meanwhile; is not changed.
        student: in float or with training twins (`prepare_qat_`); in training mode meanwhile. What it has behind the
            last pair is not trained.
        pairs: {"student layer": "teacher layer"} in the order in which the student runs them, names as in
            `named_modules()`. The feature is what the layer puts out in its first call, without an in-place activation
            that may follow.
        loader: batches as for `Distiller`; targets only leave out samples, with -100.
        epochs: passes over the loader for each block.
        lr: learning rate of each block's Adam.
        scheduler: makes each block's scheduler from its optimizer; it is stepped after every optimizer step.
        progress: False: no bars; a rich Progress: tasks are added to it.

    Returns:
        The history of each block, by the name of the student's layer; `losses` are mean squared errors.

    Raises:
        ValueError: the loader can be used only once or gives nothing, epochs is below 1; there is no such layer, it
            does not run, or the order is another; a pair's features cannot be compared; or a block has nothing to
            train. Nothing is trained then.
        RuntimeError: the loss is not finite; blocks before are then trained.
    """
    check_count("epochs", epochs)
    if not isinstance(pairs, Mapping) or not pairs:
        raise ValueError(f'pairs: expected {{"student layer": "teacher layer", ...}}, got {pairs!r}')
    batch = _first_batch(loader)
    blocks = _find_blocks(teacher, student, Hint(pairs), batch)
    distillers = {block.ours: _BlockDistiller(teacher, student, block) for block in blocks}
    histories = {}
    own_bar = nullcontext(progress) if isinstance(progress, Progress) else Progress(disable=not progress)
    with own_bar as bar:
        task = bar.add_task("blocks", total=len(blocks))
        try:
            for block in blocks:
                bar.update(task, description=f"block {block.ours}")
                distiller = distillers[block.ours]
                with _training_only(student, block.parameters):
                    optimizer = torch.optim.Adam(list(distiller.parameters()), lr=lr)
                    schedule = None if scheduler is None else scheduler(optimizer)
                    histories[block.ours] = distiller.fit(loader, epochs, optimizer, scheduler=schedule, progress=bar)
                bar.advance(task)
        finally:
            bar.remove_task(task)
    return histories


@dataclass(frozen=True)
class _Block:
    """A part of the student, by names: the layers whose outputs are compared, the parameters that train, and the
    modules that the blocks before have finished with; and the regressor between the two outputs, if there is one."""

    ours: str
    theirs: str
    parameters: list[str]
    done: list[str]
    adapters: dict[tuple[int, str], nn.Module]


class _BlockDistiller(Distiller):
    """Trains one block on its feature."""

    def __init__(self, teacher: nn.Module, student: nn.Module, block: _Block) -> None:
        super().__init__(teacher, student, [Hint({block.ours: block.theirs})])
        self.done = [student.get_submodule(name) for name in block.done]
        # Not by `prepare`, in whose eval mode activation scales would start from what fresh batch norms put out.
        self.adapters, self._adapters_known = block.adapters, True

    def loss(self, batch: Any) -> Tensor:
        """The mean squared error of the feature; both models run as far as that."""
        ((ours, theirs),) = self._pairs
        parsed = parse_batch(batch, self.student)
        with torch.no_grad(), evaluating(self.teacher):
            taught = _outputs(self.teacher, [theirs], parsed, "teacher")
        for module in self.done:
            module.training = False
        learned = _outputs(self.student, [ours], parsed, "student")
        adapters = {layer: adapter for (_, layer), adapter in self.adapters.items()}
        return self._features[0](learned, taught, parsed.target, adapters)


@contextmanager
def _training_only(student: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """No other parameter requires a gradient meanwhile."""
    wanted = set(names)
    others = [p for name, p in student.named_parameters() if name not in wanted and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


# ---- what a block is -------------------------------------------------------------------------------------------------


def _first_batch(loader: Iterable[Any]) -> Any:
    check_repeatable(loader, "every block needs all batches")
    for batch in loader:
        return batch
    raise ValueError("loader: expected at least one batch, got none")


def _find_blocks(teacher: nn.Module, student: nn.Module, hint: Hint, batch: Any) -> list[_Block]:
    """Runs both on a batch, the student as a copy, whose activation scales may start from untrained features."""
    parsed = parse_batch(batch, student)
    trial = copy.deepcopy(student)
    names = {id(module): name for name, module in trial.named_modules()}
    finished: list[str] = []  # in the order of their first call
    handles = [m.register_forward_hook(lambda m, _args, _out: finished.append(names[id(m)])) for m in trial.modules()]
    with torch.no_grad(), evaluating(teacher):
        taught = _outputs(teacher, hint.layers.values(), parsed, "teacher")
    with torch.enable_grad(), evaluating(trial):
        learned = _outputs(trial, hint.layers, parsed, "student")
    for handle in handles:
        handle.remove()
    if list(learned) != list(hint.layers):
        raise ValueError(
            f"pairs: expected student layers in the order in which they run, {', '.join(map(repr, learned))}, "
            f"got {', '.join(map(repr, hint.layers))}"
        )
    for ours, theirs in hint.layers.items():
        check_unfused(student, ours, "student")
        check_unfused(teacher, theirs, "teacher")
    adapters = make_adapters({0: hint}, learned, taught)
    blocks: list[_Block] = []
    trained: set[str] = set()
    done: list[str] = []
    for ours, theirs in hint.layers.items():
        mine = [name for name in _depends_on(learned[ours], trial) if name not in trained]
        if not mine:
            before = f"behind {blocks[-1].ours!r}" if blocks else "from the input on"
            raise ValueError(f"pairs: there is nothing to train in the block of student layer {ours!r}, {before}")
        own = {key: adapter for key, adapter in adapters.items() if key[1] == ours}
        blocks.append(_Block(ours, theirs, mine, done, own))
        trained |= set(mine)
        done = finished[: finished.index(names[id(trial.get_submodule(ours))]) + 1]
    return blocks


def _depends_on(feature: Tensor, model: nn.Module) -> list[str]:
    """Names of the parameters that the feature has a gradient for."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not feature.requires_grad:
        return []
    grads = torch.autograd.grad(feature.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    return [name for name, grad in zip(parameters, grads, strict=True) if grad is not None]


class _Reached(Exception):
    """All outputs that were asked for are there."""


def _outputs(model: nn.Module, names: Iterable[str], batch: Batch, role: str) -> dict[str, Tensor]:
    """What the named layers put out in their first calls, in the order of these; the model runs no further.

    Raises:
        ValueError: a name is unknown, or the layer did not run.
        TypeError: a layer's output is not a tensor.
    """
    outputs: dict[str, Tensor] = {}
    wanted = dict.fromkeys(names)

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"{role} layer {name!r}: expected a tensor as output, got {type(output).__name__}")
            outputs.setdefault(name, output)
            if len(outputs) == len(wanted):
                raise _Reached

        return hook

    layers = {name: find_layer(model, name, role) for name in wanted}
    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        model(*batch.args, **batch.kwargs)
    except _Reached:
        return outputs
    finally:
        for handle in handles:
            handle.remove()
    lacking = next(name for name in wanted if name not in outputs)
    raise ValueError(f"{role} layer {lacking!r} did not run in the forward pass: it gives no feature")
