"""DistillationTrainer: the Trainer of Hugging Face transformers with a Distiller's loss.

    prepare_qat_(student, LowBit(weight_bits=4, act_bits=8))
    distiller = Distiller(teacher, student, [SoftTargets(T=2)])
    DistillationTrainer(distiller, TrainingArguments(...), train_dataset=data).train()

docs/training-loops.md has more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kdq.checkpoint import generators_of, write_atomically
from kdq.distill import Distiller
from kdq.layers.qat import TrainingTwin
from kdq.observe import logits_of
from kdq.teacher_cache import expect_samples
from kdq.training import check_optimizer

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "kdq.integrations.transformers needs transformers and accelerate: "
        f"pip install 'kdq-kernels[transformers]' ({error})"
    ) from error

STATE = "distiller.pt"


class DistillationTrainer(Trainer):
    """`Trainer` for a `Distiller`; for another kind of Trainer, `class Mine(DistillationTrainer, Seq2SeqTrainer)`.

    The loss, in evaluation too, is the distiller's; metrics see the student's logits. Batches have their labels under
    any name that `parse_batch` knows, and labels of causal language models are shifted as the model would. Checkpoints
    hold the student alone, and what the distiller trains beside it in a file of its own, `distiller.pt`; the gradients
    of that are not clipped. Learned scales are not decayed.

    Args:
        distiller: its student is the Trainer's model. Where losses on features need adapters, after
            `distiller.prepare(batch)`. Its teacher is moved to the Trainer's device.
        args, kwargs: those of the Trainer, without the model.

    Raises:
        ValueError: the teacher trains, the Trainer is given another loss or label smoothing, or it would run on several
            devices: DistributedDataParallel and FSDP2 are for `Distiller` in a loop of its own.
        RuntimeError: the adapters do not exist yet.
    """

    label_names: list[str]

    def __init__(self, distiller: Distiller, *args: Any, **kwargs: Any) -> None:
        if distiller.train_teacher:
            raise ValueError("distiller: a Trainer trains and saves one model; train_teacher needs Distiller.fit")
        list(distiller.parameters())  # raises where adapters are missing
        super().__init__(distiller.student, *args, **kwargs)
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ValueError("compute_loss_func, label_smoothing_factor: the loss is that of the distiller's losses")
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError(
                f"args: expected one process on one device, got {self.args.world_size} processes with "
                f"{self.args.n_gpu} GPUs each; CUDA_VISIBLE_DEVICES=0 chooses one"
            )
        self.distiller = distiller
        for module in (distiller.teacher, *distiller.own_modules()):
            module.to(self.args.device)
        # Losses are means over a batch, and not over all that a step accumulates: Trainer has to divide them.
        self.model_accepts_loss_kwargs = False
        self.label_names = self.label_names or ["labels"]  # forward of a plain module does not name them
        self.add_callback(_BesideStudent(distiller))

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_counts: Any) -> Any:
        """The distiller's loss of a batch, and if asked for the logits that the student gave last."""
        if model.training and self.state.max_steps > 0:
            self.distiller.progress = min(self.state.global_step / self.state.max_steps, 1.0)
        with self.accelerator.autocast(), _last_output(self.distiller.student) as outputs:
            loss = self.distiller.loss(inputs)
        return (loss, {"logits": logits_of(outputs[0], "student")}) if return_outputs else loss

    def create_optimizer(self, *args: Any) -> Optimizer:
        made = self.optimizer is None
        optimizer: Optimizer = super().create_optimizer(*args)
        own = list(self.distiller.own_parameters())
        if made and own:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        check_optimizer(self.distiller, optimizer)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        decayed: list[str] = super().get_decay_parameter_names(model)
        scales = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            if isinstance(module, TrainingTwin)
            for name, _ in module.named_parameters()
            if name not in ("weight", "bias")
        }
        return [name for name in decayed if name not in scales]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            _load_beside_student(self.distiller, Path(folder) / STATE)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        expect_samples(self.distiller.teacher, [d for d in (self.train_dataset, *evaluated) if d is not None])
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            expect_samples(self.distiller.teacher, [])


class _BesideStudent(TrainerCallback):
    """For what is trained beside the student, all that Trainer does for its model."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer drops the gradients of its model, not those of its optimizer."""
        for parameter in self.distiller.own_parameters():
            parameter.grad = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        own = self.distiller.state_dict()
        own.pop("student")
        generators = [generator.get_state() for generator in generators_of(self.distiller)]
        write_atomically(folder / STATE, lambda path: torch.save({"own": own, "generators": generators}, path))


def _load_beside_student(distiller: Distiller, path: Path) -> None:
    if not path.exists():
        raise ValueError(f"resume_from_checkpoint: {path} is missing: the checkpoint is not of a DistillationTrainer")
    state = torch.load(path, map_location="cpu", weights_only=True)
    distiller.load_state_dict({"student": distiller.student.state_dict(), **state["own"]})
    for generator, own in zip(generators_of(distiller), state["generators"], strict=True):
        generator.set_state(own)


@contextmanager
def _last_output(model: nn.Module) -> Iterator[list[Any]]:
    """A list of one: what the model put out when it last ran."""
    outputs: list[Any] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[:] = [output]

    handle = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
