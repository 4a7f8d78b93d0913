"""Warnings where a Binary layer sees inputs that are never negative: their signs are all equal, and so is what it puts
out.

`quantize_` sees no data, and looks at the model's structure; a training twin looks at its first batch.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kdq.fuse import plain_sequential
from kdq.layers.base import fused_activation

NEVER_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softmax)
INSIDE = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))  # folders of code not the user's
# Behind these, what was never negative is not either.
KEEP_SIGNS = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def warn_behind_relu(model: nn.Module, names: Iterable[str]) -> None:
    """Gives a UserWarning for each of the named layers that has a ReLU or the like right before it, as far as
    nn.Sequentials tell."""
    for name in names:
        before = next((m for m in _backwards(model, name) if not isinstance(m, KEEP_SIGNS)), None)
        if isinstance(before, NEVER_NEGATIVE) or (before is not None and fused_activation(before) == "relu"):
            _warn(name, f"stands behind a {type(before).__name__}")


def warn_of_first_batch(name: str, x: Tensor) -> None:
    """Gives a UserWarning if a layer's first inputs have no negative value."""
    if x.numel() and x.detach().amin() >= 0:
        _warn(name, "got a first batch without a negative value")


def _warn(name: str, found: str) -> None:
    warnings.warn(
        f"{name!r} is a Binary layer and {found}: it sees signs alone, which are then all equal, and puts out the same "
        "for every input; put a batch or layer norm right before it, or give it another config",
        UserWarning,
        stacklevel=_levels_to_user(),
    )


def _levels_to_user() -> int:
    """For `warnings.warn` in the function that asks: the nearest line that is neither kdq's nor torch's. That is the
    call of `quantize_`, or of a first batch the one of the model or of `fit`."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    return level


def _backwards(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that run before the named one, from the nearest on, while it stands in nn.Sequentials."""
    while name:
        name, _, key = name.rpartition(".")
        parent = model.get_submodule(name)
        if not plain_sequential(parent):
            return
        children = list(parent._modules)
        for earlier in reversed(children[: children.index(key)]):
            yield from _last_first(parent.get_submodule(earlier))


def _last_first(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential) and plain_sequential(module):
        for child in reversed(module):
            yield from _last_first(child)
    else:
        yield module
