"""Where the demos and benchmarks run: on the CPU, or on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

import kdq_kernels as kk
from kdq_kernels import _torch_library

Model = TypeVar("Model", bound=nn.Module)


def place_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: it is neither cpu nor a GPU's name.
        RuntimeError: this build has no operators for the GPU, or torch does not find it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type != "cpu":
        _torch_library.check_gpu(device)
    return device


def described(device: torch.device) -> str:
    """The demos' captions: what runs a model there."""
    if device.type == "cpu":
        return f"one thread, {kk.cpu_isa()} kernels"
    return str(torch.cuda.get_device_name(device))


def changed_copy(model: Model, change: Callable[[nn.Module], object], device: torch.device) -> Model:
    """A copy after a `change` that is made on the CPU, as by `prepare_qat_` and `convert_`."""
    copied = copy.deepcopy(model).cpu()
    change(copied)
    return copied.to(device)
