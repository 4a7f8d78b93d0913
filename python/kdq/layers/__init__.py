"""Quantized layers: for inference on the kernels, and their twins for training (`kdq.layers.qat`); and attention that
consists of layers."""

from kdq.layers.attention import MultiheadAttention
from kdq.layers.binary_linear import BinaryLinear
from kdq.layers.binary_threshold_linear import BinaryThresholdLinear
from kdq.layers.codebook_linear import CodebookLinear
from kdq.layers.codebook_qat import CodebookQATLinear
from kdq.layers.conv2d import BinaryConv2d, Int8Conv2d, LowBitConv2d
from kdq.layers.embedding import QATEmbedding, QuantizedEmbedding
from kdq.layers.int8_linear import Int8Linear
from kdq.layers.low_bit_linear import LowBitLinear
from kdq.layers.pruned import PrunedLinear
from kdq.layers.qat import (
    BinaryQATConv2d,
    BinaryQATLinear,
    Int8QATConv2d,
    Int8QATLinear,
    LowBitQATConv2d,
    LowBitQATLinear,
)
from kdq.layers.qat_methods import DoReFaQATConv2d, DoReFaQATLinear, PACTQATConv2d, PACTQATLinear
from kdq.layers.switchable import SwitchableLinear, SwitchableNorm

__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryQATConv2d",
    "BinaryQATLinear",
    "BinaryThresholdLinear",
    "CodebookLinear",
    "CodebookQATLinear",
    "DoReFaQATConv2d",
    "DoReFaQATLinear",
    "Int8Conv2d",
    "Int8Linear",
    "Int8QATConv2d",
    "Int8QATLinear",
    "LowBitConv2d",
    "LowBitLinear",
    "LowBitQATConv2d",
    "LowBitQATLinear",
    "MultiheadAttention",
    "PACTQATConv2d",
    "PACTQATLinear",
    "PrunedLinear",
    "QATEmbedding",
    "QuantizedEmbedding",
    "SwitchableLinear",
    "SwitchableNorm",
]
