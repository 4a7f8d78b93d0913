"""kdq_kernels: integer, binary and fake-quant kernels for PyTorch and NumPy.

`import kdq_kernels` needs NumPy alone. The tensor functions (`fake_quantize`, `int8_linear`, ...) import torch when
first touched and register `torch.ops.kdq.*`; the same functions on NumPy arrays are in `kdq_kernels.numpy`.

The instruction set is chosen once: the best that the CPU and the operating system run, or the one that the environment
variable `KDQ_ISA` names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    from kdq_kernels import _C
except ImportError as error:
    raise ImportError(
        f"kdq_kernels: the native module is missing or cannot be loaded ({error}); build it with "
        "'pip install --no-build-isolation .' from the source folder"
    ) from error
from kdq_kernels.cpu import available_isas, bitplane_pairs, build_info, cpu_isa, machine_peak, machine_peaks, set_isa

if TYPE_CHECKING:
    from kdq_kernels.ops import (
        binarize_rows,
        binary_conv2d,
        binary_linear,
        binary_matmul,
        binary_threshold,
        bitplane_linear,
        bitplane_matmul,
        codebook_linear,
        dequantize,
        distillation_loss,
        fake_quantize,
        fake_quantize_rows,
        int8_conv2d,
        int8_linear,
        int8_linear_chain,
        int8_matmul,
        int8_weight_only_linear,
        pack_bitplanes,
        pack_indices,
        pack_int8_weight,
        pack_signs,
        quantize,
        quantize_rows,
        scaled_dot_product_attention,
        unpack_bitplanes,
        unpack_indices,
        unpack_int8_weight,
        unpack_signs,
    )

__version__: str = _C.build_info()["version"]

__all__ = [
    "available_isas",
    "binarize_rows",
    "binary_conv2d",
    "binary_linear",
    "binary_matmul",
    "binary_threshold",
    "bitplane_linear",
    "bitplane_matmul",
    "bitplane_pairs",
    "build_info",
    "codebook_linear",
    "cpu_isa",
    "dequantize",
    "distillation_loss",
    "fake_quantize",
    "fake_quantize_rows",
    "int8_conv2d",
    "int8_linear",
    "int8_linear_chain",
    "int8_matmul",
    "int8_weight_only_linear",
    "machine_peak",
    "machine_peaks",
    "pack_bitplanes",
    "pack_indices",
    "pack_int8_weight",
    "pack_signs",
    "quantize",
    "quantize_rows",
    "scaled_dot_product_attention",
    "set_isa",
    "unpack_bitplanes",
    "unpack_indices",
    "unpack_int8_weight",
    "unpack_signs",
]

cpu_isa()  # a KDQ_ISA that cannot run here is an error now, not at the first kernel


def __getattr__(name: str) -> Any:
    """Loads the tensor functions, and with them torch, at first use."""
    if name not in __all__:
        raise AttributeError(f"module 'kdq_kernels' has no attribute {name!r}")
    function = getattr(importlib.import_module("kdq_kernels.ops"), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
