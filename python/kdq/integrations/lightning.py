"""DistillationModule: a Distiller as a LightningModule.

    distiller = Distiller(teacher, student, [SoftTargets(T=4)])
    lightning.Trainer(max_epochs=20).fit(DistillationModule(distiller, lr=1e-3), loader, held_out)

In a LightningModule of your own, keep the distiller as a plain attribute and return `self.distiller.loss(batch)` from
`training_step`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdq.distill import Distiller
from kdq.observe import evaluating, parse_batch
from kdq.reporting import accuracy, compared_outputs, teacher_kl
from kdq.teacher_cache import expect_samples

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities import CombinedLoader
except ImportError as error:
    raise ImportError(
        f"kdq.integrations.lightning needs lightning: pip install 'kdq-kernels[lightning]' ({error})"
    ) from error


class DistillationModule(LightningModule):
    """Trains a distiller's student: logs "train_loss" each step, "val_accuracy" (with labels) and "val_teacher_kl" (in
    nats) each validation.

    The student, and what the distiller trains beside it, are its submodules; the teacher is not: it is in no state
    dict, checkpoint or optimizer. It follows to the device of the student. For another optimizer or a schedule,
    override `configure_optimizers`.

    Args:
        distiller: where losses on features need adapters, after `distiller.prepare(batch)`.
        lr: learning rate of Adam.

    Raises:
        ValueError: the teacher trains; (when training starts) there are several processes: DistributedDataParallel and
            FSDP2 are for `Distiller` in a loop of its own.
        RuntimeError: the adapters do not exist yet.
    """

    def __init__(self, distiller: Distiller, lr: float = 1e-3) -> None:
        super().__init__()
        if distiller.train_teacher:
            raise ValueError("distiller: a DistillationModule keeps the teacher as it is; use Distiller.fit")
        list(distiller.parameters())  # raises where adapters are missing
        self.distiller = distiller
        self.lr = lr
        self.student = distiller.student
        self.own = nn.ModuleList(distiller.own_modules())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.student(*args, **kwargs)

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ValueError(f"trainer: expected one process, got {self.trainer.world_size}")

    def on_fit_start(self) -> None:
        self.distiller.teacher.to(self.device)

    def on_train_start(self) -> None:
        loaders = [self.trainer.train_dataloader, self.trainer.val_dataloaders]
        flat = CombinedLoader([part for part in loaders if part is not None]).flattened
        expect_samples(self.distiller.teacher, [getattr(loader, "dataset", None) for loader in flat])

    def on_train_end(self) -> None:
        expect_samples(self.distiller.teacher, [])

    def on_validation_start(self) -> None:
        self.distiller.teacher.to(self.device)

    def training_step(self, batch: Any, _index: int) -> Tensor:
        steps = self.trainer.estimated_stepping_batches
        if math.isfinite(steps):
            self.distiller.progress = min(self.trainer.global_step / steps, 1.0)
        loss = self.distiller.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        parsed = parse_batch(batch, self.student)
        with evaluating(self.distiller.teacher):
            ours, theirs, target = compared_outputs(self.student, self.distiller.teacher, parsed)
        if len(ours) == 0:
            return
        self.log("val_teacher_kl", teacher_kl(ours, theirs), batch_size=len(ours))
        if target is not None:
            self.log("val_accuracy", accuracy(ours, target), batch_size=len(ours))

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.Adam(self.distiller.parameters(), lr=self.lr)
