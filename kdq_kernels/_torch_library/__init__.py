"""Loads libkdq_torch and completes `torch.ops.kdq` with what lives in Python: shape inference and autograd.

The operators themselves are registered in C++ (csrc/bindings/torch_*.cpp), so they also run where there is no Python.
This file loads them; each family's file here registers the rest. Autograd is that of the operators that train only, so
that inference operators keep their short call path.
"""

from __future__ import annotations

from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1]  # where the build puts them, beside _C
LIBRARY = FOLDER / "libkdq_torch.so"
CUDA_LIBRARY = FOLDER / "libkdq_torch_cuda.so"  # built where torch has CUDA and nvcc is found
OLDEST_TORCH = (2, 10)


def load() -> None:
    """Makes `torch.ops.kdq` available.

    Raises:
        ImportError: torch is too old, or the library is missing or cannot be loaded.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise ImportError(f"kdq_kernels needs torch 2.10 or newer, found {torch.__version__}")
    if not LIBRARY.exists():
        raise ImportError(
            f"kdq_kernels was built without its torch operators ({LIBRARY.name} is missing): install torch, then "
            "rebuild with 'pip install --no-build-isolation .'"
        )
    _load_library(LIBRARY)
    if has_cuda_operators():
        _load_library(CUDA_LIBRARY)


def has_cuda_operators() -> bool:
    """Whether this build has operators for CUDA tensors, and torch can have such tensors."""
    return torch.version.cuda is not None and CUDA_LIBRARY.exists()


def check_device(device: torch.device) -> None:
    """Raises RuntimeError where this build has no kernels for a device."""
    if device.type == "cuda" and not has_cuda_operators():
        raise RuntimeError(
            f"device: this build of kdq_kernels has no operators for CUDA tensors ({CUDA_LIBRARY.name} is missing); "
            "rebuild with KDQ_CUDA=ON 'pip install --no-build-isolation .', which needs nvcc and a torch with CUDA"
        )


def check_gpu(device: torch.device) -> None:
    """Raises where kernels cannot run on a device that should be a GPU.

    Raises:
        ValueError: it is no GPU by its name.
        RuntimeError: this build has no operators for it, or torch does not find it.
    """
    if device.type != "cuda":
        raise ValueError(f"device: expected cuda or cuda:N, got {device}")
    check_device(device)
    count = torch.cuda.device_count()
    if count <= (device.index or 0):
        raise RuntimeError(f"device: torch finds {count} CUDA GPUs, so there is no {device}")


def _load_library(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"kdq_kernels: {library.name} cannot be loaded into torch {torch.__version__} ({error}); rebuild with "
            "'pip install --no-build-isolation .'"
        ) from error


load()

from kdq_kernels._torch_library import (  # noqa: E402, F401  what they complete is there only now
    attention,
    binary,
    bitplanes,
    calls,
    codebook,
    distillation,
    fake_quant,
    int8,
)
