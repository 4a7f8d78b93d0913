"""Convolutions on the integer and binary kernels: the same weights as in the linear layers, packed by position.

Saved are rows `[out_channels, in_channels * KH * KW]` in torch's order; the kernels read the channels of a position
side by side.
"""

from __future__ import annotations

from torch import Tensor

from kdq.layers.base import InferenceConv2d, PackedProduct
from kdq.layers.binary_linear import BinaryProduct
from kdq.layers.int8_linear import Int8Product
from kdq.layers.low_bit_linear import LowBitProduct


class Int8Conv2d(InferenceConv2d, Int8Product):
    """A 2d convolution of int8 weights and activations, by `Int8Dynamic` (one scale an image) or `Int8Static`.

    Its buffers are those of `Int8Product`, with K = in_channels * KH * KW. Padding is exact: zero is a value of both
    grids.
    """


class LowBitConv2d(InferenceConv2d, LowBitProduct):
    """A 2d convolution of few-bit integers, by `LowBit`; its buffers are those of `LowBitProduct`, with
    K = in_channels * KH * KW."""


class BinaryConv2d(InferenceConv2d, BinaryProduct, PackedProduct):
    """`conv2d(sign(x), sign(w)) * weight_scale + bias` (XNOR-Net, Rastegari et al. 2016), without the paper's scales of
    the activations. Padding is no sign, but zero: a padded position contributes nothing.

    Its buffers are those of `BinaryProduct`, with K = in_channels * KH * KW: saved bits have no gaps, those that the
    kernels read begin a word at each position.
    """

    read = "packed"

    def pack_weight(self) -> Tensor:
        return self.geometry.sign_bits(self.signs())
