"""Loads libkdq_torch and completes `torch.ops.kdq` with what lives in Python: shape inference and autograd.

The operators themselves are registered in C++ (csrc/bindings/torch_*.cpp), so they also run where there is no Python.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq_kernels import _C

LIBRARY = Path(__file__).parent / "libkdq_torch.so"
CUDA_LIBRARY = Path(__file__).parent / "libkdq_torch_cuda.so"  # built where torch has CUDA and nvcc is found
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


Function = TypeVar("Function", bound=Callable[..., Any])


def fake(name: str) -> Callable[[Function], Function]:
    """Registers the decorated function as the shape inference of `torch.ops.kdq.<name>`."""
    return torch.library.register_fake(f"kdq::{name}")


# ---- fake_quant ------------------------------------------------------------------------------------------------------


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape and strides of the real operator's result: those of x if it is dense in memory, else contiguous."""
    return torch.empty_like(x, dtype=dtype)


@fake("fake_quantize")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return dense_like(x if group_size is None else x.contiguous(), x.dtype)


@fake("fake_quantize.out")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
    *,
    out: Tensor,
) -> None:
    return None


@fake("fake_quantize_backward")
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dense = x.contiguous() if group_size is not None else dense_like(x, x.dtype)
    grad_x = dense_like(dense, x.dtype) if grad.stride() == dense.stride() else x.new_empty(x.shape)
    grad_scale = scale.new_empty(scale.shape, dtype=torch.float32)
    return grad_x, grad_scale, torch.empty_like(grad_scale)


@fake("fake_quantize_backward_")
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    grad_scale = scale.new_empty(scale.shape, dtype=torch.float32)
    return grad_scale, torch.empty_like(grad_scale)


@fake("quantize")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    if quant_min >= -128 and quant_max <= 127:
        dtype = torch.int8
    elif quant_min >= 0 and quant_max <= 255:
        dtype = torch.uint8
    else:
        dtype = torch.int32
    return dense_like(x if group_size is None else x.contiguous(), dtype)


@fake("dequantize")
def _(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return dense_like(q if group_size is None else q.contiguous(), torch.float32)


@fake("quantize_rows")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@fake("fake_quantize_rows")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fake("binarize_rows")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@fake("binarize_rows_backward")
def _(grad_signs: Tensor | None, grad_mean: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fake("binarize_rows_backward_")
def _(grad: Tensor, x: Tensor, scaled: bool) -> None:
    return None


# ---- int8 ------------------------------------------------------------------------------------------------------------


@fake("pack_int8_weight")
def _(w: Tensor, bits: int = 8) -> Tensor:
    if w.device.type == "cuda":  # the CUDA kernels read row-major int8
        return w.new_empty(w.shape)
    n, k = w.shape
    if isinstance(n, int) and isinstance(k, int):
        row_bytes: Any = -(-_C.int8_packed_bytes(n, k, bits) // n) if n else k
    else:
        row_bytes = torch.library.get_ctx().new_dynamic_size()
    return w.new_empty((n, row_bytes), dtype=torch.uint8)


@fake("unpack_int8_weight")
def _(packed: Tensor) -> Tensor:
    if packed.device.type == "cuda":
        return packed.new_empty(packed.shape)
    k = torch.library.get_ctx().new_dynamic_size()  # only the blob itself knows K
    return packed.new_empty((packed.shape[0], k), dtype=torch.int8)


@fake("int8_matmul")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@fake("int8_linear")
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_quant_max: int = 255,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@fake("int8_linear_chain")
def _(
    x: Tensor,
    packed: list[Tensor],
    weight_scale: list[Tensor],
    bias: list[Tensor | None],
    input_scale: list[Tensor | None],
    input_zero_point: list[Tensor | None],
    input_quant_max: list[int],
    activation: list[str],
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed[-1].shape[0]))


@fake("int8_weight_only_linear")
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def convolved(x: Tensor, n: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Shape and memory format of a convolution's result."""
    sides = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty((x.shape[0], n, *sides), dtype=x.dtype, device=x.device, memory_format=memory_format)


@fake("int8_conv2d")
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_quant_max: int = 255,
    activation: str | None = None,
) -> Tensor:
    return convolved(x, packed.shape[0], kernel_size, stride, padding, dilation)


# ---- binary ----------------------------------------------------------------------------------------------------------


@fake("pack_signs")
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], (x.shape[-1] + 63) // 64), dtype=torch.int64)


@fake("unpack_signs")
def _(bits: Tensor, k: int) -> Tensor:
    return bits.new_empty((*bits.shape[:-1], k), dtype=torch.float32)


@fake("binary_matmul")
def _(a_bits: Tensor, b_bits: Tensor, k: int) -> Tensor:
    return a_bits.new_empty((a_bits.shape[0], b_bits.shape[0]), dtype=torch.int32)


@fake("binary_linear")
def _(x: Tensor, weight_bits: Tensor, weight_scale: Tensor, bias: Tensor | None = None, k: int | None = None) -> Tensor:
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return x.new_empty((*x.shape[:-1], weight_bits.shape[0]), dtype=dtype)


@fake("binary_conv2d")
def _(
    x: Tensor,
    weight_bits: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    n, *kernel_size, _ = weight_bits.shape
    return convolved(x, n, kernel_size, stride, padding, dilation)


@fake("binary_threshold")
def _(x: Tensor, weight_bits: Tensor, threshold: Tensor, k: int | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], (weight_bits.shape[0] + 63) // 64), dtype=torch.int64)


@fake("pack_bitplanes")
def _(q: Tensor, bits: int, form: str) -> Tensor:
    return q.new_empty((bits, *q.shape[:-1], (q.shape[-1] + 63) // 64), dtype=torch.int64)


@fake("unpack_bitplanes")
def _(planes: Tensor, k: int, form: str) -> Tensor:
    dtype = torch.uint8 if form == "unsigned" else torch.int8
    return planes.new_empty((*planes.shape[1:-1], k), dtype=dtype)


@fake("bitplane_matmul")
def _(a_planes: Tensor, b_planes: Tensor, k: int, a_form: str, b_form: str) -> Tensor:
    return a_planes.new_empty((a_planes.shape[1], b_planes.shape[1]), dtype=torch.int32)


@fake("bitplane_linear")
def _(
    x: Tensor,
    weight_planes: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    input_quant_max: int,
    weight_form: str,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_planes.shape[1]))


# ---- codebook --------------------------------------------------------------------------------------------------------


@fake("pack_indices")
def _(indices: Tensor, bits: int) -> Tensor:
    n, k = indices.shape
    per_word = 32 // bits
    return indices.new_empty(((n + 15) // 16, (k + per_word - 1) // per_word, 16), dtype=torch.int32)


@fake("unpack_indices")
def _(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    return packed.new_empty((n, k), dtype=torch.uint8)


@fake("codebook_linear")
def _(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


# ---- attention -------------------------------------------------------------------------------------------------------


@fake("scaled_dot_product_attention")
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


def attention_by_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """On GPUs by torch's own kernels, which are made for these units. They take a mask or the causal one, not both."""
    added = attn_mask is not None and attn_mask.is_floating_point()
    mask = attn_mask.to(query.dtype) if attn_mask is not None and added else attn_mask
    if mask is not None and is_causal:
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        mask = mask.masked_fill(later, -torch.inf) if added else mask & ~later
    grouped = query.shape[1] != key.shape[1]
    y = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal and mask is None, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2).contiguous().transpose(1, 2)


torch.library.impl("kdq::scaled_dot_product_attention", "CUDA", attention_by_torch)


# ---- distillation ----------------------------------------------------------------------------------------------------


@fake("distillation_loss")
def _(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    rows = student.shape[:-1].numel()
    return student.new_empty((), dtype=torch.float32), student.new_empty((rows, 5), dtype=torch.float32)


@fake("distillation_loss_backward")
def _(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    statistics: Tensor,
    temperature: float,
    alpha: float,
) -> Tensor:
    return student.new_empty(student.shape)


# ---- autograd: of the operators that train only, so that inference operators keep their short call path --------------


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.axis, ctx.group_size = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, scale, zero_point = ctx.saved_tensors
    grad_x, grad_scale, grad_zero_point = torch.ops.kdq.fake_quantize_backward(
        grad, x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.axis, ctx.group_size
    )
    learned = zero_point is not None and zero_point.is_floating_point()
    return grad_x, grad_scale, grad_zero_point if learned else None, None, None, None, None


def _fake_quantize_rows_backward(ctx: Any, grad: Tensor) -> Tensor:
    """Straight through: with a scale from the row's own maximum nothing is clipped."""
    return grad


def _save_binarize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0])


def _binarize_backward(ctx: Any, grad_signs: Tensor | None, grad_mean: Tensor | None) -> Tensor | None:
    if grad_signs is None and grad_mean is None:
        return None
    (x,) = ctx.saved_tensors
    return torch.ops.kdq.binarize_rows_backward(grad_signs, grad_mean, x)


def _save_distillation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, target, ctx.temperature, ctx.alpha = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, target, output[1])


def _distillation_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """The student's gradient; the teacher is a constant."""
    if grad is None:
        return None, None, None, None, None
    student, teacher, target, statistics = ctx.saved_tensors
    grad_student = torch.ops.kdq.distillation_loss_backward(
        grad, student, teacher, target, statistics, ctx.temperature, ctx.alpha
    )
    return grad_student, None, None, None, None


torch.library.register_autograd("kdq::fake_quantize", _fake_quantize_backward, setup_context=_save_fake_quantize)
torch.library.register_autograd("kdq::fake_quantize_rows", _fake_quantize_rows_backward)
torch.library.register_autograd("kdq::binarize_rows", _binarize_backward, setup_context=_save_binarize)
torch.library.register_autograd("kdq::distillation_loss", _distillation_backward, setup_context=_save_distillation)
