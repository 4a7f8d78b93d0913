"""The kernels on torch tensors: thin, typed faces of `torch.ops.kdq.*`.

x is float32, bfloat16 or float16, of any strides; scales are float32. All tensors of a call are on one device, the CPU
or, where the build has those operators, a CUDA GPU. Wrong shapes, dtypes or values raise `ValueError` naming the
argument, what came and what was expected; values in a GPU's memory are not looked at, as that would wait for it. All
functions work under `torch.compile(fullgraph=True)` and stay `kdq.*` nodes in `torch.export`.

One module for each family of kernels; `kdq_kernels/_torch_library` has a family's shape inference and autograd by the
same name.
"""

from __future__ import annotations

from kdq_kernels import _torch_library as _torch_library  # first: registers torch.ops.kdq, which the families look up
from kdq_kernels.ops.attention import scaled_dot_product_attention
from kdq_kernels.ops.binary import (
    binary_conv2d,
    binary_linear,
    binary_matmul,
    binary_threshold,
    pack_signs,
    unpack_signs,
)
from kdq_kernels.ops.bitplanes import bitplane_linear, bitplane_matmul, pack_bitplanes, unpack_bitplanes
from kdq_kernels.ops.codebook import codebook_linear, pack_indices, unpack_indices
from kdq_kernels.ops.distillation import distillation_loss
from kdq_kernels.ops.fake_quant import (
    binarize_rows,
    dequantize,
    fake_quantize,
    fake_quantize_rows,
    quantize,
    quantize_rows,
)
from kdq_kernels.ops.int8 import (
    int8_conv2d,
    int8_linear,
    int8_linear_chain,
    int8_matmul,
    int8_weight_only_linear,
    pack_int8_weight,
    unpack_int8_weight,
)

__all__ = [
    "binarize_rows",
    "binary_conv2d",
    "binary_linear",
    "binary_matmul",
    "binary_threshold",
    "bitplane_linear",
    "bitplane_matmul",
    "codebook_linear",
    "dequantize",
    "distillation_loss",
    "fake_quantize",
    "fake_quantize_rows",
    "int8_conv2d",
    "int8_linear",
    "int8_linear_chain",
    "int8_matmul",
    "int8_weight_only_linear",
    "pack_bitplanes",
    "pack_indices",
    "pack_int8_weight",
    "pack_signs",
    "quantize",
    "quantize_rows",
    "scaled_dot_product_attention",
    "unpack_bitplanes",
    "unpack_indices",
    "unpack_int8_weight",
    "unpack_signs",
]
