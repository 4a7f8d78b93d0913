"""kdq: distil a teacher into a low-bit student, and run it on integer and binary kernels."""

from kdq.configs import Binary, Int8Dynamic, Int8Static, Int8WeightOnly, LowBit
from kdq.distill import Distiller, Hint, SoftTargets
from kdq.io import load, save
from kdq.layers import BinaryLinear, Int8Linear, LowBitLinear
from kdq.layers.qat_methods import pact_penalty
from kdq.observers import KLHistogram, MeanSquaredError, MinMax, MovingAverage, Percentile
from kdq.ptq import (
    ToolReport,
    correct_bias_,
    equalize_,
    fold_batch_norm_,
    reconstruct_,
    reestimate_batch_norm_,
    smooth_,
)
from kdq.quantize import ConversionReport, convert_, prepare_qat_, quantize_
from kdq.reporting import Report, report

__all__ = [
    "Binary",
    "BinaryLinear",
    "ConversionReport",
    "Distiller",
    "Hint",
    "Int8Dynamic",
    "Int8Linear",
    "Int8Static",
    "Int8WeightOnly",
    "KLHistogram",
    "LowBit",
    "LowBitLinear",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "Report",
    "SoftTargets",
    "ToolReport",
    "convert_",
    "correct_bias_",
    "equalize_",
    "fold_batch_norm_",
    "load",
    "pact_penalty",
    "prepare_qat_",
    "quantize_",
    "reconstruct_",
    "reestimate_batch_norm_",
    "report",
    "save",
    "smooth_",
]
