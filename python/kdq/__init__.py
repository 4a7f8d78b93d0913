"""kdq: distil a teacher into a low-bit student, and run it on integer and binary kernels."""

from kdq.configs import Binary, Int8Dynamic, Int8Static, Int8WeightOnly, LowBit
from kdq.distill import Distiller, Hint, SoftTargets
from kdq.io import load, save
from kdq.layers import BinaryLinear, Int8Linear, LowBitLinear
from kdq.quantize import ConversionReport, convert_, prepare_qat_, prepare_switchable_, quantize_
from kdq.reporting import Report, report
from kdq.switch import extract, precision_of, precisions, set_precision_
from kdq.switchable_distill import SwitchableDistiller

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
    "LowBit",
    "LowBitLinear",
    "Report",
    "SoftTargets",
    "SwitchableDistiller",
    "convert_",
    "extract",
    "load",
    "precision_of",
    "precisions",
    "prepare_qat_",
    "prepare_switchable_",
    "quantize_",
    "report",
    "save",
    "set_precision_",
]
