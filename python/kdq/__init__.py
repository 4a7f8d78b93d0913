"""kdq: distil a teacher into a low-bit student, and run it on integer and binary kernels."""

from kdq.configs import Binary, Int8Dynamic, Int8Static, Int8WeightOnly, LowBit
from kdq.io import load, save
from kdq.layers import BinaryLinear, Int8Linear, LowBitLinear
from kdq.quantize import ConversionReport, convert_, prepare_qat_, quantize_

__all__ = [
    "Binary",
    "BinaryLinear",
    "ConversionReport",
    "Int8Dynamic",
    "Int8Linear",
    "Int8Static",
    "Int8WeightOnly",
    "LowBit",
    "LowBitLinear",
    "convert_",
    "load",
    "prepare_qat_",
    "quantize_",
    "save",
]
