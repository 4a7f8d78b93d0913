"""DistillationModule: a Distiller as a LightningModule; DistillationCallback: what a LightningModule of your own needs.

    distiller = Distiller(teacher, student, [SoftTargets(T=4)])
    lightning.Trainer(max_epochs=20).fit(DistillationModule(distiller, lr=1e-3), loader, held_out)

In a LightningModule of your own, keep the distiller as a plain attribute, return `self.distiller.loss(batch)` from
`training_step`, and give the Trainer `callbacks=[DistillationCallback(distiller)]`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kdq.distill import Distiller
from kdq.distributed import together
from kdq.integrations.beside import check_trainable, load_state_beside_student, state_beside_student
from kdq.observe import evaluating, parse_batch
from kdq.reporting import compared_outputs
from kdq.teacher_cache import expect_samples
from kdq.training import check_optimizer
from kdq.validation import Tally

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader
except ImportError as error:
    raise ImportError(
        f"kdq.integrations.lightning needs lightning: pip install 'kdq-kernels[lightning]' ({error})"
    ) from error

STATE = "distiller"


class DistillationCallback(Callback):
    """What a LightningModule whose `training_step` calls `distiller.loss` needs beside it.

    Teacher, adapters and losses follow to the device of the module. `distiller.progress`, where schedules are read,
    goes from 0 to 1. Checkpoints hold what the distiller trains beside the student, too. Validation, where the module
    has a `validation_step`, logs "val_teacher_kl" in nats; for that student and teacher run on each batch once more.
    The teacher runs in eval mode and is in no checkpoint and no optimizer: that it is not is checked.

    With several processes (strategy "ddp") they compute together what one process would on their batches together, as
    docs/distributed.md says.

    Args:
        distiller: its student is a submodule of the LightningModule, its teacher is not. Where losses on features need
            adapters, after `distiller.prepare(batch)`.
        with_accuracy: also log "val_accuracy" of batches with labels.

    Raises:
        ValueError: the teacher trains; (when training starts) the module lacks the student or has the teacher, the
            optimizer has the teacher's parameters or lacks those of `distiller.parameters()` beside the student's
            weights, or several processes run by another strategy than DDP.
        RuntimeError: the adapters do not exist yet; (when a training is resumed) the checkpoint is of others, or was
            written without this callback.
    """

    def __init__(self, distiller: Distiller, *, with_accuracy: bool = False) -> None:
        check_trainable(distiller)
        self.distiller = distiller
        self.with_accuracy = with_accuracy

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trained = _ids(pl_module)
        if not _ids(self.distiller.student) <= trained:
            raise ValueError(
                "distiller: its student is not a submodule of the LightningModule, which would not save it"
            )
        if not trained.isdisjoint(_ids(self.distiller.teacher) - _ids(self.distiller.student)):
            raise ValueError(
                "distiller: its teacher is a submodule of the LightningModule, and would be in its checkpoints; keep "
                "the distiller as a plain attribute, and the teacher in it alone"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._to_device(pl_module)
        frozen = _ids(self.distiller.teacher) - _ids(self.distiller.student)
        for optimizer in trainer.optimizers:
            if not frozen.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
                raise ValueError("optimizer: it has the teacher's parameters; make it from distiller.parameters()")
        if len(trainer.optimizers) == 1:  # of several, each may have a part
            check_optimizer(self.distiller, trainer.optimizers[0])
        if trainer.world_size > 1:
            if not isinstance(trainer.model, DistributedDataParallel):
                raise ValueError(
                    f"strategy: expected 'ddp' for several processes, got {type(trainer.strategy).__name__}"
                )
            self.distiller.within = pl_module
            with together():
                self.distiller.start_equal()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = [loader for loader in (trainer.train_dataloader, trainer.val_dataloaders) if loader is not None]
        expect_samples(self.distiller.teacher, map(_samples_of, CombinedLoader(loaders).flattened))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        expect_samples(self.distiller.teacher, [])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Neither `on_train_end` nor `teardown` is called."""
        expect_samples(self.distiller.teacher, [])
        self.distiller.within = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._to_device(pl_module)
        self.tally = Tally()

    def _to_device(self, pl_module: LightningModule) -> None:
        for module in (self.distiller.teacher, *self.distiller.own_modules()):
            module.to(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps):
            self.distiller.progress = min(trainer.global_step / steps, 1.0)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        distiller = self.distiller
        parsed = parse_batch(batch, distiller.student)
        with together(), trainer.precision_plugin.val_step_context(), evaluating(distiller.teacher):
            self.tally.add(*compared_outputs(distiller.student, distiller.teacher, parsed))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with together():
            found = self.tally.result(pl_module.device)
        if found is None:  # the sanity check sees but a few batches, whose labels may all be -100
            return
        told = {"val_teacher_kl": found.teacher_kl}
        if self.with_accuracy and found.accuracy is not None:
            told["val_accuracy"] = found.accuracy
        pl_module.log_dict(told, batch_size=1, sync_dist=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = state_beside_student(self.distiller)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if STATE not in checkpoint:
            raise RuntimeError(
                f"checkpoint: {STATE!r} is missing, what the distiller trains beside its student: it was written "
                "without a DistillationCallback"
            )
        load_state_beside_student(self.distiller, checkpoint[STATE])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.distiller.within = None


def _samples_of(loader: Any) -> Any:
    """The data set of a DataLoader; None, that nobody knows, where its entries are whole batches."""
    return None if getattr(loader, "batch_sampler", None) is None else loader.dataset


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


class DistillationModule(LightningModule):
    """Trains a distiller's student: logs "train_loss" each step, "val_accuracy" (with labels) and "val_teacher_kl" (in
    nats) each validation.

    The student is its submodule; the teacher is not: it is in no state dict, checkpoint or optimizer. It brings a
    `DistillationCallback`. For another optimizer or a schedule, override `configure_optimizers`; where you override
    `configure_callbacks`, add to those of `super().configure_callbacks()`.

    Args:
        distiller: where losses on features need adapters, after `distiller.prepare(batch)`.
        lr: learning rate of Adam.

    Raises:
        ValueError: the teacher trains; (when training starts) several processes run by another strategy than DDP.
        RuntimeError: the adapters do not exist yet.
    """

    def __init__(self, distiller: Distiller, lr: float = 1e-3) -> None:
        super().__init__()
        check_trainable(distiller)
        self.distiller = distiller
        self.lr = lr
        self.student = distiller.student

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.student(*args, **kwargs)

    def configure_callbacks(self) -> list[Callback]:
        return [DistillationCallback(self.distiller, with_accuracy=True)]

    def training_step(self, batch: Any, _index: int) -> Tensor:
        loss = self.distiller.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        """The callback logs what is found on the batch."""

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.Adam(self.distiller.parameters(), lr=self.lr)
