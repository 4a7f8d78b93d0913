"""The short way from Python to `torch.ops.kdq`, for operators whose kernel may take less time than the call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from kdq_kernels import _C

# Returning one tensor, and called once or more a layer.
_NAMES = (
    "binary_conv2d",
    "binary_linear",
    "binary_matmul",
    "binary_threshold",
    "bitplane_linear",
    "codebook_linear",
    "int8_conv2d",
    "int8_linear",
    "int8_linear_chain",
    "int8_matmul",
    "int8_weight_only_linear",
    "scaled_dot_product_attention",
)


def are_direct() -> bool:
    """Whether calls go straight to torch's dispatcher: the module for it serves the version of torch that was installed
    when it was built."""
    return _C.build_info()["torch_calls"] == torch.__version__


def operators() -> Any:
    """The operators by name, to be called by position: directly, or as `torch.ops` has them under Dynamo, which traces
    Python but cannot look into a native function."""
    return _OVERLOADS if is_dynamo_compiling() else _CALLS


def _direct_calls() -> SimpleNamespace:
    if not are_direct():
        return _OVERLOADS
    try:
        from kdq_kernels import _calls
    except ImportError as error:
        raise ImportError(
            f"kdq_kernels: the module of direct calls cannot be loaded into torch {torch.__version__} ({error}); "
            "rebuild with 'pip install --no-build-isolation .' (KDQ_TORCH_CALLS=OFF before it: without that module)"
        ) from error
    return SimpleNamespace(**{name: _calls.bind(front, f"kdq::{name}") for name, front in vars(_OVERLOADS).items()})


_OVERLOADS = SimpleNamespace(**{name: getattr(torch.ops.kdq, name).default for name in _NAMES})
_CALLS = _direct_calls()
