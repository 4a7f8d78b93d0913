"""Looking at models from outside: inputs and labels out of a batch, logits and layer outputs out of a model.

Distillation and reports share it, so that both accept the same batches and the same models.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdq.distributed import unwrapped

TARGET_KEYS = ("labels", "label", "target")
IGNORED_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """The arguments of a model's forward, and the class indices of its rows if the batch has them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor | None

    def logits(self, model: nn.Module, role: str) -> Tensor:
        """Runs the model; `role` names it in error messages."""
        return logits_of(model(*self.args, **self.kwargs), role)


def parse_batch(batch: Any, device: torch.device | None = None) -> Batch:
    """Takes a loader's batch apart: a tensor, `(x,)`, `(x, target)`, or a dict.

    A dict's target is under "labels", "label" or "target"; its other entries are keyword arguments of the model.

    Raises:
        TypeError: anything else.
    """
    if isinstance(batch, Mapping):
        inputs = {key: move(value, device) for key, value in batch.items() if key not in TARGET_KEYS}
        targets = [batch[key] for key in TARGET_KEYS if batch.get(key) is not None]
        if len(targets) > 1:
            raise TypeError(f"batch: expected one of the keys {', '.join(TARGET_KEYS)}, got {len(targets)} of them")
        return Batch((), inputs, move(targets[0], device) if targets else None)
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        x, target = batch if len(batch) == 2 else (batch[0], None)
        return Batch((move(x, device),), {}, move(target, device))
    if isinstance(batch, Tensor):
        return Batch((move(batch, device),), {}, None)
    what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise TypeError(f"batch: expected a tensor, (x,), (x, target) or a dict, got {what}")


def move(value: Any, device: torch.device | None) -> Any:
    """Tensors to the device; anything else as it is."""
    return value.to(device) if device is not None and isinstance(value, Tensor) else value


def logits_of(output: Any, role: str) -> Tensor:
    """The logits of a model's output: the tensor itself, or its `logits` attribute or entry.

    Raises:
        TypeError: there are none.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{role}: expected a tensor of logits or an output with .logits, got {type(output).__name__}")
    return logits


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter or buffer is; None if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def rows_of(logits: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits `[..., C]` and target `[...]` as rows: `[rows, C]`, `[rows]`, and which rows count (target is not -100).

    Raises:
        ValueError: target is not one class index a row.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if target is None:
        return rows, None, torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if target.shape != logits.shape[:-1] or target.is_floating_point() or target.is_complex():
        raise ValueError(
            f"target: expected class indices of shape {list(logits.shape[:-1])}, "
            f"got {target.dtype} {list(target.shape)}"
        )
    flat = target.reshape(-1).long()
    kept = flat != IGNORED_TARGET
    classes = logits.shape[-1]
    if bool(((flat < 0) | (flat >= classes))[kept].any()):
        raise ValueError(
            f"target: expected class indices from 0 to {classes - 1} or {IGNORED_TARGET}, "
            f"got values from {int(flat.min())} to {int(flat.max())}"
        )
    return rows, flat, kept


def count_of_rows(logits: Tensor, target: Tensor | None) -> Tensor | int:
    """How many rows of logits `[..., C]` count: those whose target is not -100."""
    return (target != IGNORED_TARGET).sum() if target is not None else logits.shape[:-1].numel()


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both are logits `[..., C]` of one shape."""
    if student.shape != teacher.shape or student.dim() < 1:
        raise ValueError(
            "student and teacher: expected logits of one shape [..., classes], "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )


def evaluating(*models: nn.Module) -> AbstractContextManager[None]:
    """eval() inside; afterwards every submodule is back in the mode it was in, even if they were mixed."""
    return _in_mode(False, models)


def training(*models: nn.Module) -> AbstractContextManager[None]:
    """train() inside; afterwards as `evaluating`."""
    return _in_mode(True, models)


@contextmanager
def _in_mode(train: bool, models: tuple[nn.Module, ...]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.train(train)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def find_layer(model: nn.Module, name: str, role: str) -> nn.Module:
    """The submodule of that name; DDP's wrapper does not count.

    Raises:
        ValueError: there is none; the message proposes the nearest names.
    """
    layers = dict(unwrapped(model).named_modules(remove_duplicate=False))
    if name in layers:
        return layers[name]
    near = difflib.get_close_matches(name, list(layers), n=3, cutoff=0.4) or [n for n in layers if n][:8]
    raise ValueError(f"{role} has no layer {name!r}; it has, for example, {', '.join(map(repr, near))}")


@contextmanager
def captured_outputs(model: nn.Module, names: Iterable[str], role: str) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with the outputs of the named layers while the model runs; the hooks are gone on exit.

    A layer that runs more than once in a forward pass gives its last output.

    Raises:
        ValueError: a name is unknown.
        TypeError: (from the forward pass) a layer's output is not a tensor.
    """
    outputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"{role} layer {name!r}: expected a tensor as output, got {type(output).__name__}")
            outputs[name] = output

        return hook

    layers = {name: find_layer(model, name, role) for name in names}
    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
