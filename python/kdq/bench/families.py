"""All benchmark families by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kdq.bench.attention import attention_cases
from kdq.bench.binary import binary_linear_cases, binary_matmul_cases, binary_threshold_cases
from kdq.bench.bitplanes import bitplane_linear_cases
from kdq.bench.case import Case
from kdq.bench.codebook import codebook_cases
from kdq.bench.conv2d import binary_conv2d_cases, int8_conv2d_cases
from kdq.bench.distillation import distillation_loss_cases
from kdq.bench.fake_quant import fake_quantize_cases, fake_quantize_out_cases
from kdq.bench.fake_quant_gradients import fake_quantize_backward_cases, fake_quantize_training_cases
from kdq.bench.int8 import int8_linear_cases, int8_matmul_cases
from kdq.bench.low_bit import low_bit_linear_cases
from kdq.bench.models import model_cases
from kdq.bench.target import Target
from kdq.bench.training import training_step_cases
from kdq.bench.weight_only import weight_only_cases

FAMILIES: dict[str, Callable[[Target], Iterable[Case]]] = {
    "int8_matmul": int8_matmul_cases,
    "int8_linear": int8_linear_cases,
    "int8_weight_only_linear": weight_only_cases,
    "low_bit_linear": low_bit_linear_cases,
    "bitplane_linear": bitplane_linear_cases,
    "codebook_linear": codebook_cases,
    "int8_conv2d": int8_conv2d_cases,
    "attention": attention_cases,
    "binary_matmul": binary_matmul_cases,
    "binary_linear": binary_linear_cases,
    "binary_threshold": binary_threshold_cases,
    "binary_conv2d": binary_conv2d_cases,
    "fake_quantize": fake_quantize_cases,
    "fake_quantize_out": fake_quantize_out_cases,
    "fake_quantize_backward": fake_quantize_backward_cases,
    "fake_quantize_training": fake_quantize_training_cases,
    "distillation_loss": distillation_loss_cases,
    "training_step": training_step_cases,
    "model": model_cases,
}
