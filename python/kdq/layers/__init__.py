"""Quantized layers: for inference on the kernels, and their twins for training (`kdq.layers.qat`)."""

from kdq.layers.binary_linear import BinaryLinear
from kdq.layers.binary_threshold_linear import BinaryThresholdLinear
from kdq.layers.codebook_linear import CodebookLinear
from kdq.layers.codebook_qat import CodebookQATLinear
from kdq.layers.embedding import QATEmbedding, QuantizedEmbedding
from kdq.layers.int8_linear import Int8Linear
from kdq.layers.low_bit_linear import LowBitLinear
from kdq.layers.pruned import PrunedLinear
from kdq.layers.qat import BinaryQATLinear, Int8QATLinear, LowBitQATLinear
from kdq.layers.qat_methods import DoReFaQATLinear, PACTQATLinear
from kdq.layers.switchable import SwitchableLinear, SwitchableNorm

__all__ = [
    "BinaryLinear",
    "BinaryQATLinear",
    "BinaryThresholdLinear",
    "CodebookLinear",
    "CodebookQATLinear",
    "DoReFaQATLinear",
    "Int8Linear",
    "Int8QATLinear",
    "LowBitLinear",
    "LowBitQATLinear",
    "PACTQATLinear",
    "PrunedLinear",
    "QATEmbedding",
    "QuantizedEmbedding",
    "SwitchableLinear",
    "SwitchableNorm",
]
