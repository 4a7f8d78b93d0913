"""DistillationTrainer: the Trainer of Hugging Face transformers with a Distiller's loss.

    prepare_qat_(student, LowBit(weight_bits=4, act_bits=8))
    distiller = Distiller(teacher, student, [SoftTargets(T=2)])
    DistillationTrainer(distiller, TrainingArguments(...), train_dataset=data).train()

docs/training-loops.md has more.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kdq.checkpoint import write_atomically
from kdq.distill import Distiller
from kdq.distributed import alone, together
from kdq.integrations.beside import check_trainable, load_state_beside_student, state_beside_student
from kdq.layers.qat import TrainingTwin
from kdq.observe import logits_of
from kdq.teacher_cache import expect_samples
from kdq.training import check_optimizer

try:
    from accelerate import DistributedType
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "kdq.integrations.transformers needs transformers and accelerate: "
        f"pip install 'kdq-kernels[transformers]' ({error})"
    ) from error

STATE = "distiller.pt"
NO, MULTI_CPU, MULTI_GPU = DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU


class DistillationTrainer(Trainer):
    """`Trainer` for a `Distiller`; for another kind of Trainer, `class Mine(DistillationTrainer, Seq2SeqTrainer)`.

    The loss, in evaluation too, is the distiller's (but where Seq2SeqTrainer evaluates by `predict_with_generate`, the
    model's own); metrics see the student's logits. Batches have their labels under any name that `parse_batch` knows,
    and labels of causal language models are shifted as the model would. Checkpoints hold the student alone, and what
    the distiller trains beside it in a file of its own, `distiller.pt`; the gradients of that are not clipped. Learned
    scales are not decayed. `load_best_model_at_end` puts both back; where that file is missing, the student alone, with
    a UserWarning if there are adapters or losses that are modules.

    Under torchrun the Trainer puts DistributedDataParallel around the student by itself: make the distiller with the
    student as it is, within `kdq.distributed.alone()`. Every process then trains on its part of the data as
    docs/distributed.md says. Evaluation is each process's own, and the Trainer's to gather.

    Args:
        distiller: its student is the Trainer's model. Where losses on features need adapters, after
            `distiller.prepare(batch)`. Its teacher is moved to the Trainer's device.
        args, kwargs: those of the Trainer, without the model.

    Raises:
        ValueError: the teacher trains, the Trainer is given another loss or label smoothing, one process would run on
            several devices, or several processes by other means than DistributedDataParallel.
        RuntimeError: the adapters do not exist yet.
    """

    label_names: list[str]

    def __init__(self, distiller: Distiller, *args: Any, **kwargs: Any) -> None:
        check_trainable(distiller)
        super().__init__(distiller.student, *args, **kwargs)
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ValueError("compute_loss_func, label_smoothing_factor: the loss is that of the distiller's losses")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"args: expected one device a process, got {self.args.n_gpu}; CUDA_VISIBLE_DEVICES=0 chooses one, "
                "torchrun starts a process for each"
            )
        if (kind := self.accelerator.distributed_type) not in (NO, MULTI_CPU, MULTI_GPU):
            raise ValueError(f"args: expected one process, or DistributedDataParallel around the student, got {kind}")
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
        spread = isinstance(model, DistributedDataParallel)  # in training; in evaluation it is the student itself
        self.distiller.within = model if spread else None
        scope = nullcontext() if spread else alone()
        with scope, self.accelerator.autocast(), _last_output(self.distiller.student) as outputs:
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
            path = Path(folder) / STATE
            if not path.exists():
                raise ValueError(
                    f"resume_from_checkpoint: {path} is missing: the checkpoint is not of a DistillationTrainer"
                )
            _load_beside_student(self.distiller, path)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        expect_samples(self.distiller.teacher, [d for d in (self.train_dataset, *evaluated) if d is not None])
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            expect_samples(self.distiller.teacher, [])
            self.distiller.within = None


class _BesideStudent(TrainerCallback):
    """For what is trained beside the student, all that Trainer does for its model."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer drops the gradients of its model, not those of its optimizer."""
        for parameter in self.distiller.own_parameters():
            parameter.grad = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with together():
            self.distiller.start_equal()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save:
            write_atomically(folder / STATE, lambda path: torch.save(state_beside_student(self.distiller), path))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            args.distributed_state.wait_for_everyone()  # rank 0 may have written it a moment ago
            path = Path(state.best_model_checkpoint) / STATE
            if path.exists():
                _load_beside_student(self.distiller, path)
            elif self.distiller.own_modules():  # an error would lose the whole training; the student is put back
                warnings.warn(
                    f"load_best_model_at_end: {path} is missing, so that the adapters and losses of the distiller stay "
                    "as they are at the end of the training",
                    UserWarning,
                    stacklevel=2,
                )


def _load_beside_student(distiller: Distiller, path: Path) -> None:
    load_state_beside_student(distiller, torch.load(path, map_location="cpu", weights_only=True))


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
