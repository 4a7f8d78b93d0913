"""Knowledge distillation: a teacher's outputs and inner features as training targets for a (quantized) student.

    prepare_qat_(student, LowBit(weight_bits=2, act_bits=4))
    distiller = Distiller(teacher, student, losses=[SoftTargets(T=4), Hint({"block2": "layer3"})])
    distiller.fit(loader, epochs=20)

The losses are in `kdq.losses`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdq import distributed, ranks
from kdq.fitting import History, fit
from kdq.layers.base import fused_activation
from kdq.losses import FeatureLoss, Hint, Loss, SoftTargets, Weighted, mean_kl
from kdq.losses.features import make_adapters
from kdq.observe import (
    Batch,
    captured_outputs,
    check_repeatable,
    check_same_shape,
    count_of_rows,
    evaluating,
    find_layer,
    parse_batch,
)
from kdq.phases import Phase
from kdq.progressive import lower_precision_, plan_lower_precision
from kdq.prune import prune_
from kdq.teacher_cache import CachedTeacher
from kdq.training import Log

__all__ = ["Distiller", "Hint", "History", "SoftTargets", "mean_kl"]


class Distiller:
    """Trains a student on a teacher.

    Three uses, one argument apart, after `teacher = self_teacher(model)` and then `prepare_qat_(model, config)`:

        Distiller(teacher, model, [SoftTargets()])   # the float model teaches its low-bit self: no labels
        Distiller(teacher, model, [CrossEntropy()])  # quantization-aware training on labels
        Distiller(larger, model, [SoftTargets()])    # a larger model teaches a low-bit student

    The teacher runs in eval mode and without gradients and is never changed, unless `train_teacher`; it does not run at
    all where no loss needs it. Adapters of feature losses (regressors, projection heads) belong to the distiller: they
    exist from the first batch on, in `adapters` by position of the loss and student layer, and are trained with the
    student.

    Where the student is wrapped in DistributedDataParallel or by `fully_shard`, every rank makes the same calls, each
    with its own batches, and all together compute what one process would on their batches together. The teacher is
    whole on every rank, or sharded by `fully_shard` too. `kdq.distributed` and docs/distributed.md tell more.

    Args:
        teacher, student: models whose outputs are logits of one shape, have `.logits`, or are tuples that start with
            them.
        losses: their sum is the loss; `Weighted(loss, weight)` gives one a factor or a schedule.
        train_teacher: the teacher trains too, in the same steps, in the mode that it is in (`fit`: training mode): on
            the losses on logits with the roles swapped, that is on the labels and the student's outputs.

    Attributes:
        progress: 0 to 1, where schedules are read; `fit` sets it, a loop of your own may.
        within: None, or what another library's loop has put around a student that was not wrapped: DDP, or the module
            in DDP whose forward pass calls `loss`, as a LightningModule. `kdq.integrations` sets it.

    Raises:
        ValueError: a feature loss names a layer that does not exist, or asks for features of a `CachedTeacher`, a
            cached teacher shall be trained, there is no loss, or of several processes each would train its own student
            or teacher (but within `kdq.distributed.alone`).
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        losses: Sequence[Loss | Weighted],
        *,
        train_teacher: bool = False,
    ) -> None:
        if not losses:
            raise ValueError("losses: expected at least one, for example [SoftTargets(T=4)]")
        self.teacher = teacher
        self.student = student
        self._inner = distributed.unwrapped(student)
        self.losses = [loss if isinstance(loss, Weighted) else Weighted(loss) for loss in losses]
        self.train_teacher = train_teacher
        self.progress = 0.0
        self.within: nn.Module | None = None
        self.adapters: dict[tuple[int, str], nn.Module] = {}
        self._features = {i: term.loss for i, term in enumerate(self.losses) if isinstance(term.loss, FeatureLoss)}
        self._pairs = [pair for loss in self._features.values() for pair in loss.layers.items()]
        self._adapters_known = not self._features
        for ours, theirs in self._pairs:
            find_layer(student, ours, "student")
            find_layer(teacher, theirs, "teacher")
        if any(isinstance(module, CachedTeacher) for module in teacher.modules()):
            if self._features:
                raise ValueError("losses: a CachedTeacher keeps logits, not features; take the teacher itself")
            if train_teacher:
                raise ValueError("train_teacher: the outputs of a CachedTeacher cannot change; take the teacher itself")
        distributed.check_spread(student)
        if train_teacher and distributed.is_spread(student) != distributed.is_spread(teacher):
            raise ValueError("train_teacher: expected DDP or FSDP2 around both student and teacher, or neither")
        trained = (student, teacher) if train_teacher else (student,)
        self._replicated = [p for model in trained for p in distributed.replicated_parameters(model)]
        with distributed.scope_of(student):
            ranks.broadcast_([*self._replicated, *student.buffers()])
            self.start_equal()

    # ---- what trains -------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that trains: the student, adapters, losses that are modules, and the teacher if it trains.

        Raises:
            RuntimeError: there are feature losses, and no batch has shown yet which adapters they need.
        """
        if not self._adapters_known:
            raise RuntimeError(
                "the feature losses' adapters take their shapes from a batch: call distiller.prepare(batch) first"
            )
        self.reshard()
        yield from (p for p in self.student.parameters() if p.requires_grad)
        yield from self.own_parameters()
        if self.train_teacher:
            yield from (p for p in self.teacher.parameters() if p.requires_grad)

    def reshard(self) -> None:
        """After a forward pass alone FSDP2 leaves gathered parameters in the model, which no optimizer must take."""
        distributed.reshard(self.student)
        distributed.reshard(self.teacher)

    def names(self) -> dict[int, str]:
        """Names of all parameters, by id: the same with any wrapper."""
        self.reshard()
        parts = {"student": self._inner, "teacher": distributed.unwrapped(self.teacher), **self._own_parts()}
        return {id(p): f"{part}.{name}" for part, m in parts.items() for name, p in m.named_parameters()}

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the adapters and losses."""
        for module in self.own_modules():
            yield from module.parameters()

    def own_modules(self) -> list[nn.Module]:
        """The adapters, and the losses that are modules."""
        return list(self._own_parts().values())

    def _own_parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {f"adapters.{i}.{layer}": module for (i, layer), module in self.adapters.items()}
        parts |= {f"losses.{i}": t.loss for i, t in enumerate(self.losses) if isinstance(t.loss, nn.Module)}
        return parts

    def start_equal(self) -> None:
        """Within `kdq.distributed.together`: adapters and losses become on all ranks what they are on rank 0."""
        ranks.broadcast_(t for module in self.own_modules() for t in (*module.parameters(), *module.buffers()))

    def state_dict(self) -> dict[str, Any]:
        """The student's state, and that of the adapters and losses, for checkpoints of training; not the teacher's.

        It does not depend on the number of ranks or the wrapper. All ranks call it; a sharded student's part is whole
        on rank 0, and empty on the others.
        """
        own = {name: module.state_dict() for name, module in self._own_parts().items()}
        return {"student": distributed.full_state_dict(self.student), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; where there are adapters, after `prepare`. All ranks call it with the same
        state; of a sharded student's, that of rank 0 counts.

        Raises:
            RuntimeError: a part is missing or does not fit.
        """
        parts = self._own_parts()
        if (expected := {"student", *parts}) != state.keys():
            raise RuntimeError(f"state: expected {', '.join(sorted(expected))}, got {', '.join(sorted(state))}")
        distributed.load_full_state_dict(self.student, state["student"])
        for name, module in parts.items():
            module.load_state_dict(state[name])

    def prepare(self, batch: Any) -> None:
        """Makes the adapters from the shapes that one batch shows. Nothing is trained, no statistics change; activation
        grids that have seen no batch yet start from this one."""
        parsed = parse_batch(batch, self._inner)
        with distributed.scope_of(self.student), torch.no_grad(), evaluating(self.student, self.teacher):
            self._compare(parsed, *self._run_teacher(parsed))
        self.reshard()

    def prepare_for(self, loader: Iterable[Any]) -> None:
        """`prepare` on the loader's first batch, if there are adapters to make."""
        if not self._adapters_known:
            for batch in loader:
                self.prepare(batch)
                break

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch (`kdq.observe.parse_batch` says of which kinds): a scalar to call `backward()` on.

        Raises:
            ValueError: teacher and student differ in the shape of their logits, features cannot be compared, or there
                are several processes and neither DDP nor FSDP2 around the student (but within
                `kdq.distributed.alone`).
            TypeError: the batch or an output is of an unknown kind.
        """
        parsed = parse_batch(batch, self._inner)
        if self.within is None:
            distributed.check_said(self.student)
        with distributed.scope_of(self.student) if self.within is None else distributed.together():
            return self._as_step(self._computation(parsed))

    def _computation(self, batch: Batch) -> Callable[[], Tensor]:
        """Runs the teacher; the rest of the loss is left to be called within DDP's forward pass."""
        teacher, taught = self._run_teacher(batch)
        return lambda: self._compare(batch, teacher, taught)[0]

    def _as_step(self, compute: Callable[[], Tensor]) -> Tensor:
        """The loss that compute gives, whose backward pass averages all gradients over the ranks."""
        around = self.student if self.within is None else self.within
        loss = distributed.run_as_forward(around, compute)
        averaged = set() if self.within is None else {id(p) for p in self.within.parameters()}
        rest = [p for p in (*self._replicated, *self.own_parameters()) if id(p) not in averaged]
        ranks.average_after_backward(loss, rest)
        return loss

    def _compare(self, batch: Batch, teacher: Tensor | None, taught: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Runs the student: the loss against the given logits and features, and the student's logits."""
        with captured_outputs(self._inner, [ours for ours, _ in self._pairs], "student") as learned:
            student = batch.logits(self._inner, "student")
        if teacher is None:
            teacher = student.detach()  # nobody reads it
        check_same_shape(student, teacher)
        self._see_features(learned, taught)
        terms = [student[:0].sum()]
        share = ranks.share_of_rows(count_of_rows(student, batch.target), student.device)
        for i, term in enumerate(self.losses):
            weight = term.at(self.progress)
            if weight == 0:
                continue
            if isinstance(term.loss, FeatureLoss):
                adapters = {layer: module for (of, layer), module in self.adapters.items() if of == i}
                terms.append(weight * term.loss(learned, taught, batch.target, adapters))
                continue
            terms.append(weight * share * term.loss(student, teacher.detach(), batch.target))
            if self.train_teacher:
                terms.append(weight * share * term.loss(teacher, student.detach(), batch.target))
        dtype = torch.promote_types(student.dtype, torch.float32)
        return torch.stack([term.to(dtype) for term in terms]).sum(), student

    def _run_teacher(self, batch: Batch) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Its logits and features; None if no loss needs it."""
        if not (self.train_teacher or any(getattr(term.loss, "needs_teacher", True) for term in self.losses)):
            return None, {}
        with (
            nullcontext() if self.train_teacher else _frozen(self.teacher),
            captured_outputs(self.teacher, [theirs for _, theirs in self._pairs], "teacher") as taught,
        ):
            return batch.logits(self.teacher, "teacher"), taught

    def _see_features(self, learned: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> None:
        """Checks that all layers of the pairs gave a feature; the first features give the adapters."""
        roles = (("student", self._inner, learned, 0), ("teacher", self.teacher, taught, 1))
        for role, model, features, side in roles:
            for name in (pair[side] for pair in self._pairs):
                if name not in features:
                    raise ValueError(f"{role} layer {name!r} did not run in the forward pass: it gives no feature")
                if not self._adapters_known:
                    check_unfused(model, name, role)
        if not self._adapters_known:
            self.adapters, self._adapters_known = make_adapters(self._features, learned, taught), True
            self.start_equal()

    # ---- training ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        optimizer: Optimizer | None = None,
        lr: float = 1e-3,
        *,
        scheduler: LRScheduler | None = None,
        validation: Iterable[Any] | None = None,
        patience: int | None = None,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        span: tuple[float, float] = (0.0, 1.0),
        ema: float | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        log: Log | None = None,
        progress: bool | Progress = True,
    ) -> History:
        """Trains for some passes over the loader; the student is in training mode meanwhile.

        For mixed precision, `torch.autocast` may be around the call. With validation, a UserWarning says once if the
        teacher is worse than the student on its labels, by more than two standard errors of the paired difference.

        A training with a checkpoint that was killed is taken up by the same call in a new process, with models,
        optimizer and scheduler made anew: it ends with the same weights, bit for bit, as it would have. A finished one
        gives its result again. The order of a DataLoader and the random numbers of torch, NumPy, `random` and of the
        loaders' generators are taken up too; what else a loader draws from, and persistent workers, are not.

        Several ranks take the same steps and decisions; losses and validation are those of all their batches, and rank
        0 draws the bar. A sampler with `set_epoch` is told the epoch.

        Args:
            optimizer: None: Adam with the learning rate `lr` on `parameters()`.
            scheduler: stepped after every optimizer step.
            validation: batches on which accuracy and KL to the teacher are taken after every epoch.
            patience: stop after so many epochs without a better one (higher accuracy, then lower KL; without labels the
                KL), and put the student's weights of the best epoch back at the end.
            clip_grad_norm: largest norm of all gradients of a step together.
            accumulate: batches a step; the gradient is their mean. An epoch's last step may have fewer.
            span: the part of the whole training that this call is, for the losses' schedules.
            ema: decay of a moving average of the student's weights (`WeightAverage`), which is what is validated, and
                what the student has at the end.
            checkpoint: a file, written after each epoch and read first, if it exists.
            checkpoint_every: it is also written every so many steps; where an epoch is taken up, the loader goes
                through the batches before.
            log: called with the number of steps and values by name: after each step "loss", "lr" (of the first group)
                and, if clipped, "grad_norm"; after each validation "accuracy", "teacher_accuracy" and "teacher_kl".
            progress: False: no bar; a rich Progress: a task is added to it.

        Raises:
            ValueError: the loader gives nothing or in one epoch or rank more than in another, loader or validation can
                be used only once but there are several epochs, nothing can be trained, the optimizer lacks adapters,
                learned scales or the teacher that trains, an argument is out of range, or the checkpoint is damaged or
                of another training.
            RuntimeError: the loss is not finite; the step that would follow is not taken.
        """
        return fit(
            self,
            loader,
            epochs,
            optimizer,
            lr,
            scheduler=scheduler,
            validation=validation,
            patience=patience,
            clip_grad_norm=clip_grad_norm,
            accumulate=accumulate,
            span=span,
            ema=ema,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            log=log,
            progress=progress,
        )

    def run(self, loader: Iterable[Any], phases: Sequence[Phase], **options: Any) -> list[History]:
        """Trains in phases, one `fit` each, with a new optimizer each; the options are those of `fit`.

        A checkpoint is one file a phase: its name followed by a dot and the number of the phase, from 0.

        Raises:
            ValueError, RuntimeError: as `fit`, and as `prune_` and `lower_precision_` at the start of a phase with a
                sparsity or a config.
        """
        if "optimizer" in options or "scheduler" in options:
            raise ValueError("options: each phase makes its own optimizer; call fit for one of yours")
        if len(phases) > 1:
            check_repeatable(loader, f"{len(phases)} phases need all batches each")
            if options.get("validation") is not None:
                check_repeatable(options["validation"], f"{len(phases)} phases need all batches each", "validation")
        distillers = [self._for_phase(phase) for phase in phases]  # mistakes show before anything is trained
        for phase in phases:
            if phase.sparsity is not None:
                break  # what later phases find depends on what is pruned
            if phase.config is not None:
                plan_lower_precision(self.student, phase.config)  # an error too if DDP or FSDP2 is around the student
        histories = []
        checkpoint = options.pop("checkpoint", None)
        for number, (phase, distiller) in enumerate(zip(phases, distillers, strict=True)):
            if phase.sparsity is not None:
                prune_(self.student, phase.sparsity)
            if phase.config is not None:
                lower_precision_(self.student, phase.config)
            path = None if checkpoint is None else f"{os.fspath(checkpoint)}.{number}"
            histories.append(distiller.fit(loader, phase.epochs, lr=phase.lr, checkpoint=path, **options))
        return histories

    def _for_phase(self, phase: Phase) -> Distiller:
        """This distiller, with its adapters, where the phase changes neither losses nor roles."""
        if phase.losses is None and phase.train_teacher == self.train_teacher:
            return self
        losses = self.losses if phase.losses is None else phase.losses
        return Distiller(self.teacher, self.student, losses, train_teacher=phase.train_teacher)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    with torch.no_grad(), evaluating(model):
        yield


def check_unfused(model: nn.Module, name: str, role: str) -> None:
    """Raises ValueError if the layer computes an activation that the feature of its float form lacks."""
    fused = fused_activation(find_layer(model, name, role))
    if fused is not None:
        raise ValueError(
            f"{role} layer {name!r} computes its {fused} too, so its output is not a linear layer's; name "
            "what follows it, or quantize with fuse_activations=False"
        )
