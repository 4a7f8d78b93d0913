"""What each of two processes does in `test_distributed` under torchrun: in the loops of other libraries they end at
the weights that one process reaches with `fit` on their batches together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import TrainingArguments

import kdq
from kdq.distributed import alone
from kdq.integrations.lightning import DistillationCallback, DistillationModule
from kdq.integrations.transformers import DistillationTrainer
from kdq.validation import validate
from small_models import randn

X = randn(24, 6) * (1 + torch.arange(24)[:, None] / 4)
Y = X[:, :4].argmax(1)
SOME = torch.where(torch.arange(24) % 5 == 0, -100, Y)  # ranks differ in how many rows count
EPOCHS, RATE = 3, 0.05


class Net(nn.Module):
    """No batch norm, whose statistics would be each rank's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, features: Tensor) -> Tensor:
        y: Tensor = self.body(features)
        return y


def made(adapter: bool, seed: int, wrap: Callable[[nn.Module], nn.Module] | None = None) -> kdq.Distiller:
    """With an adapter: the seed is its own, and scales start from a batch that all ranks have. Without: they start from
    the first batch of the training."""
    student = Net(1)
    kdq.prepare_qat_(student, kdq.LowBit(weight_bits=4, act_bits=8))
    losses = [kdq.SoftTargets(alpha=0.5), kdq.Hint({"body.2": "body.0"})][: 1 + adapter]
    with alone() if wrap is None else nullcontext():
        distiller = kdq.Distiller(Net(0), student if wrap is None else wrap(student), losses)
        torch.manual_seed(seed)
        if adapter:
            distiller.prepare((X[:8], Y[:8]))
    return distiller


def fitted(adapter: bool, batches: list[Any], accumulate: int = 1) -> kdq.Distiller:
    """By one process."""
    single = made(adapter, seed=0)
    with alone():
        optimizer = torch.optim.SGD(single.parameters(), lr=RATE)
        single.fit(batches, EPOCHS, optimizer, accumulate=accumulate, progress=False)
    return single


def assert_agreed(value: Any) -> None:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    torch.testing.assert_close(every[1], every[0], rtol=0, atol=0)


def assert_as_in_one_process(ours: kdq.Distiller, single: kdq.Distiller) -> None:
    assert_agreed(ours.state_dict())
    torch.testing.assert_close(ours.state_dict(), single.state_dict(), rtol=1e-4, atol=1e-5)


def batches_of(size: int, target: Tensor) -> list[Any]:
    return list(zip(X.split(size), target.split(size), strict=True))


# ---- transformers ----------------------------------------------------------------------------------------------------


def transformers_loop(folder: Path) -> None:
    """All rows in one step, whose order then does not matter; a training that is resumed; and evaluation."""
    for adapter, accumulate, target in ((False, 1, SOME), (True, 2, Y)):
        rows = [{"features": x, "labels": y} for x, y in zip(X, target, strict=True)]
        arguments = TrainingArguments(
            str(folder / f"transformers-{accumulate}"), use_cpu=True, ddp_backend="gloo", report_to="none",
            disable_tqdm=True, save_strategy="epoch", num_train_epochs=EPOCHS, optim="sgd", learning_rate=RATE,
            lr_scheduler_type="constant", max_grad_norm=0.0, per_device_train_batch_size=12 // accumulate,
            gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        expected = fitted(adapter, [(X, target)])
        for resume in (None, f"{arguments.output_dir}/checkpoint-2"):
            ours = made(adapter, seed=dist.get_rank())
            trainer = DistillationTrainer(ours, arguments, train_dataset=rows, eval_dataset=rows)
            trainer.train(resume_from_checkpoint=resume)
            assert_as_in_one_process(ours, expected)
        assert_agreed(torch.tensor(trainer.evaluate()["eval_loss"]))


# ---- Lightning -------------------------------------------------------------------------------------------------------


class Own(pl.LightningModule):
    def __init__(self, distiller: kdq.Distiller) -> None:
        super().__init__()
        self.distiller, self.student = distiller, distiller.student

    def training_step(self, batch: Any, _index: int) -> Tensor:
        return self.distiller.loss(batch)

    def validation_step(self, batch: Any, _index: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.distiller.parameters(), lr=RATE)


class Brought(DistillationModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.distiller.parameters(), lr=RATE)


def lightning_loop(folder: Path) -> None:
    """The module that comes with its callback, and one's own with an adapter that DDP does not know."""
    for adapter in (False, True):
        expected = fitted(adapter, batches_of(12, SOME))
        ours = made(adapter, seed=dist.get_rank())
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=EPOCHS, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=folder,
            callbacks=[DistillationCallback(ours)] if adapter else [],
        )  # fmt: skip
        data = TensorDataset(X, SOME)
        loader = DataLoader(data, batch_size=6, sampler=DistributedSampler(data, shuffle=False))  # every other row
        trainer.fit((Own if adapter else Brought)(ours), loader, DataLoader(data, batch_size=6))
        assert_as_in_one_process(ours, expected)
        with alone():
            found = validate(expected.student, expected.teacher, [(X, SOME)])
        torch.testing.assert_close(
            trainer.callback_metrics["val_teacher_kl"].item(), found.teacher_kl, rtol=1e-3, atol=0
        )
        trainer.save_checkpoint(folder / "lightning.ckpt")
        assert ours.within is None


# ---- Accelerate ------------------------------------------------------------------------------------------------------


def accelerate_loop(_: Path) -> None:
    """The distiller gets what `prepare` makes of the student."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    ours = made(True, seed=dist.get_rank(), wrap=accelerator.prepare)
    optimizer = torch.optim.SGD(ours.parameters(), lr=RATE)
    optimizer, loader = accelerator.prepare(optimizer, DataLoader(TensorDataset(X, SOME), batch_size=6))
    for _epoch in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(ours.student):
                accelerator.backward(ours.loss(batch))
                optimizer.step()
                optimizer.zero_grad()
    assert_as_in_one_process(ours, fitted(True, batches_of(12, SOME), accumulate=2))


def a_student_that_nobody_wraps(_: Path) -> None:
    """Is refused by the loss, too, if the distiller was made before there were several processes."""
    ours = made(False, seed=0)
    try:
        ours.loss((X, Y))
    except ValueError as error:
        assert "neither DDP nor FSDP2 is around it" in str(error)  # noqa: PT017
    else:
        raise AssertionError("each rank would train its own")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for check in (transformers_loop, lightning_loop, accelerate_loop, a_student_that_nobody_wraps):
        check(Path(sys.argv[1]))
        print(check.__name__, flush=True)
    os._exit(0)  # without waiting for the libraries' own ends
