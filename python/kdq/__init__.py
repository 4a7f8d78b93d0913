"""kdq: distil a teacher into a low-bit student, and run it on integer and binary kernels."""

from kdq.configs import Binary, Int8Dynamic, Int8Static, Int8WeightOnly, LowBit
from kdq.distill import Distiller, Hint, SoftTargets
from kdq.io import load, save
from kdq.layers import BinaryLinear, Int8Linear, LowBitLinear
from kdq.quantize import ConversionReport, convert_, prepare_qat_, quantize_
from kdq.reporting import Report, report
from kdq.search import Budget, Plan, Precision, search_precision

__all__ = [
    "Binary",
    "BinaryLinear",
    "Budget",
    "ConversionReport",
    "Distiller",
    "Hint",
    "Int8Dynamic",
    "Int8Linear",
    "Int8Static",
    "Int8WeightOnly",
    "LowBit",
    "LowBitLinear",
    "Plan",
    "Precision",
    "Report",
    "SoftTargets",
    "convert_",
    "load",
    "prepare_qat_",
    "quantize_",
    "report",
    "save",
    "search_precision",
]
