"""Looking at models from outside: inputs and labels out of a batch, logits and layer outputs out of a model.

Distillation and reports share it, so that both accept the same batches and the same models.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.distributed import unwrapped

TARGET_KEYS = ("labels", "label", "label_ids", "target", "targets", "shift_labels")
IGNORED_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """The arguments of a model's forward, and the class indices of its rows if the batch has them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor | None

    def logits(self, model: nn.Module, role: str) -> Tensor:
        """Runs the model; `role` names it in error messages.

        Logits of tokens `[N, time, C]` that an attention mask excludes and no target speaks for are left out:
        `[rows, C]`.
        """
        logits = logits_of(model(*self.args, **self.kwargs), role)
        decodes = "decoder_input_ids" in self.kwargs
        mask = self.kwargs.get("decoder_attention_mask" if decodes else "attention_mask")
        if self.target is None and isinstance(mask, Tensor) and mask.dim() > 1 and mask.shape == logits.shape[:-1]:
            return logits[mask.bool()]
        return logits


def check_repeatable(loader: Iterable[Any], need: str, argument: str = "loader") -> None:
    """Raises ValueError if the loader is an iterator, which is used up when it has been gone through; a sized one may
    rewind itself."""
    if isinstance(loader, Iterator) and not isinstance(loader, Sized):
        raise ValueError(
            f"{argument}: {need}, but an iterator ({type(loader).__name__}) can be used only once; give a DataLoader, "
            "a list, or an object whose __iter__ begins anew"
        )


def parse_batch(batch: Any, model: nn.Module) -> Batch:
    """Takes a loader's batch apart, and brings its tensors to the model's device.

    - A tensor x, or a tuple or list `(x,)`, `(x, target)`, `(x1, x2, ..., target)`: the last is the target, or None.
      An x that is a tuple or list itself has several arguments of the model, one that is a dict keyword arguments.
    - A dict (BatchEncoding, ModelOutput): the target is under "labels", "label", "label_ids", "target" or "targets";
      its other entries are keyword arguments of the model. For transformers' causal language models targets are
      shifted as these do: the one of position t is the label of t + 1. Those under "shift_labels" are so already.

    Raises:
        TypeError: anything else.
    """
    device = device_of(model)
    if isinstance(batch, Mapping):
        inputs = {key: move(value, device) for key, value in batch.items() if key not in TARGET_KEYS}
        found = [key for key in TARGET_KEYS if batch.get(key) is not None]
        if len(found) > 1:
            raise TypeError(f"batch: expected one of the keys {', '.join(TARGET_KEYS)}, got {', '.join(found)}")
        target = _checked_target(batch[found[0]], device) if found else None
        if target is not None and target.dim() > 1 and found != ["shift_labels"] and predicts_next_token(model):
            target = F.pad(target[..., 1:], (0, 1), value=IGNORED_TARGET)
        return Batch((), inputs, target)
    if isinstance(batch, Tensor):
        return Batch((move(batch, device),), {}, None)
    if not isinstance(batch, tuple | list) or not batch:
        what = f"an empty {type(batch).__name__}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"batch: expected a tensor, (x,), (x, target), (x1, x2, ..., target) or a dict, got {what}")
    *inputs_, last = batch if len(batch) > 1 else (*batch, None)
    target = _checked_target(last, device)
    if len(inputs_) == 1 and isinstance(inputs_[0], Mapping):
        return Batch((), {key: move(value, device) for key, value in inputs_[0].items()}, target)
    if len(inputs_) == 1 and type(inputs_[0]) in (tuple, list):
        inputs_ = inputs_[0]
    return Batch(tuple(move(value, device) for value in inputs_), {}, target)


def _checked_target(target: Any, device: torch.device | None) -> Tensor | None:
    if target is not None and not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor of class indices or None, got {type(target).__name__}")
    return None if target is None else move(target, device)


def predicts_next_token(model: nn.Module) -> bool:
    """Whether labels given to the model are to be shifted: it is a causal language model of transformers."""
    for wrapper in ("module", "_orig_mod"):  # of DistributedDataParallel, of torch.compile
        model = getattr(model, wrapper, model)
    bases = {base.__name__ for base in type(model).__mro__}
    if "PreTrainedModel" not in bases:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known  # as Trainer does

    return not bases.isdisjoint(known.values()) or any(name.endswith("ForCausalLM") for name in bases)


def move(value: Any, device: torch.device | None) -> Any:
    """Tensors, also those in containers, to the device; anything else as it is."""
    if device is None:
        return value
    if callable(getattr(value, "to", None)):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: move(entry, device) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(move(entry, device) for entry in value)
    return value


def logits_of(output: Any, role: str) -> Tensor:
    """The logits of a model's output: the tensor itself, its `logits` attribute or entry, or a tuple's first entry.

    Raises:
        TypeError: there are none.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        first = output[0] if isinstance(output, tuple | list) and output else None
        logits = getattr(output, "logits", first)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise TypeError(
            f"{role}: expected a tensor of logits, an output with .logits, or a tuple that starts with them, "
            f"got {type(output).__name__}"
        )
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
