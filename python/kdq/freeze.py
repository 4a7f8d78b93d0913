"""freeze_, unfreeze_: parts of a model that stay what they are while the rest trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def freeze_(model: nn.Module) -> None:
    """Nothing in the module trains from now on, in place, and its batch norms keep their statistics.

    Parameters stop to require gradients, the learned scales of training twins among them (an activation scale that has
    seen no batch yet still starts from the first). Batch norms, and instance norms that keep statistics, stay in eval
    mode even where `train()` is called on the model, as `Distiller.fit` does: a hook sees to it, which deepcopies and
    pickles with the model and is not a part of its state dict. Dropout stays what it is. `unfreeze_` undoes all of it.

    Args:
        model: a whole model or a part of one, as `student.get_submodule("block1")`.
    """
    for module in model.modules():
        freeze_own(module)


def unfreeze_(model: nn.Module) -> None:
    """Everything in the module trains again: parameters of floating point require gradients, batch norms follow
    `train()` and `eval()`, from the next call of these on."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for number in _hooks(module):
            del module._forward_pre_hooks[number]


def freeze_own(module: nn.Module) -> None:
    """As `freeze_`, but for what its submodules hold."""
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    if isinstance(module, _NormBase) and module.track_running_stats and not _hooks(module):
        module.eval()
        module.register_forward_pre_hook(_stay_in_eval_mode)


def _stay_in_eval_mode(norm: nn.Module, _args: Any) -> None:
    norm.eval()


def _hooks(module: nn.Module) -> list[int]:
    """Numbers of the hooks that `freeze_own` has set."""
    return [number for number, hook in module._forward_pre_hooks.items() if hook is _stay_in_eval_mode]
