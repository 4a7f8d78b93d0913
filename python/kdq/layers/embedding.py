"""QuantizedEmbedding: a table of few-bit rows, of which only those that are read become floats; and its training twin.

Of a config the table takes the bits of the weights: 8 with a row's `max|w| / 127` as its scale (`Int8Dynamic`,
`Int8Static`, `Int8WeightOnly`), 1 to 8 with learned or searched scales (`LowBit`), signs times the row's mean magnitude
(`Binary`). What it is read by are indices, so that there are no activations to round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kdq_kernels as kk
from kdq.configs import Codebook, Config, Int8WeightOnly, LowBit, bits_of
from kdq.grids import low_bit_weight_integers, low_bit_weight_scale, weight_range
from kdq.layers.base import InferenceLayer
from kdq.layers.low_bit_linear import pack_bits, unpack_bits
from kdq.layers.qat import TrainingTwin
from kdq.layers.qat_product import gradient_factor, learned_scale


class QuantizedEmbedding(InferenceLayer):
    """An embedding whose rows are kept in few bits and unpacked as they are read.

    Buffers: `weight` uint8 `[num_embeddings, ceil(embedding_dim * bits / 8)]` (`pack_bits`), `weight_scale` float32
    `[num_embeddings]`; where values do not cross bytes, also `byte_values` float32 `[256, 8 / bits]`, what a byte
    stands for, which is not saved.

    Attributes:
        dtype: of the result; that of the float weight, and changed as a weight's by `.to(dtype)`.
        padding_idx: kept for `to_float`; the row is read as any other.
    """

    weight: Tensor
    weight_scale: Tensor
    byte_values: Tensor | None

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, config: Config
    ) -> None:
        super().__init__()
        _check_config(config)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.config = config
        self.bits = bits_of(config)[0]
        self.dtype = torch.float32
        row_bytes = (embedding_dim * self.bits + 7) // 8
        self.register_buffer("weight", torch.zeros(num_embeddings, row_bytes, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(num_embeddings))
        every_byte = torch.arange(256, dtype=torch.uint8)[:, None]
        values = unpack_bits(every_byte, self.bits, 8 // self.bits).float() if self.bits in (1, 2, 4) else None
        self.register_buffer("byte_values", values, persistent=False)

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding, config: Config | None = None, *, weight_scale: Tensor | None = None
    ) -> QuantizedEmbedding:
        """Quantizes an nn.Embedding.

        Args:
            config: None means `Int8WeightOnly()`.
            weight_scale: float32 `[num_embeddings]`, for `LowBit` of 2 bits and more; None: searched for the least
                squared error of each row.

        Raises:
            ValueError: the config is DoReFa's, which has no scale of its own, or the embedding does more than read
                rows.
        """
        config = Int8WeightOnly() if config is None else config
        if reason := why_not_embedding(embedding):
            raise ValueError(f"embedding: {reason}")
        table = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, config=config)
        weight = embedding.weight.detach().float()
        if table.bits == 1:
            table.weight_scale = kk.binarize_rows(weight)[1]
            integers = low_bit_weight_integers(weight, table.weight_scale, 1)
        elif isinstance(config, LowBit):
            scale = low_bit_weight_scale(weight, table.bits) if weight_scale is None else weight_scale.detach().float()
            table.weight_scale = scale
            integers = low_bit_weight_integers(weight, scale, table.bits)
        else:
            integers, table.weight_scale = kk.quantize_rows(weight)
        table.weight = pack_bits(integers, table.bits)
        table.dtype = embedding.weight.dtype
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """ids int32 or int64 `[...]` -> `[..., embedding_dim]`.

        Raises:
            TypeError: ids are not integers.
            IndexError: an index is not in `[0, num_embeddings)`.
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
        flat = ids.reshape(-1)
        own: dict[str, Any] = self._buffers  # see InferenceProduct.kernel
        values = self._unpacked(own["weight"].index_select(0, flat))
        rows = values * own["weight_scale"].index_select(0, flat)[:, None]
        return rows.to(self.dtype).view(*ids.shape, self.embedding_dim)

    def _unpacked(self, rows: Tensor) -> Tensor:
        """The integers of packed rows uint8 `[n, ...]`: `[n, embedding_dim]`, int8 or as float32."""
        if self.bits == 8:
            return rows.view(torch.int8)
        byte_values = self._buffers["byte_values"]
        if byte_values is None:
            return unpack_bits(rows, self.bits, self.embedding_dim)
        return F.embedding(rows.int(), byte_values).flatten(1)[:, : self.embedding_dim]

    def dequantized_weight(self) -> Tensor:
        """float32 `[num_embeddings, embedding_dim]`."""
        return self._unpacked(self.weight) * self.weight_scale[:, None]

    def to_float(self) -> nn.Embedding:
        """A plain nn.Embedding with the dequantized weight."""
        return nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            _weight=self.dequantized_weight().to(self.dtype),
        )

    def arguments(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
        }

    def fits(self, module: nn.Module) -> bool:
        sizes = (getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None))
        return sizes == (self.num_embeddings, self.embedding_dim)

    def described(self) -> str:
        return f"an embedding {self.num_embeddings} -> {self.embedding_dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.config}"


class QATEmbedding(TrainingTwin):
    """The training twin: a float table, rounded as a whole in each forward pass. (The optimizer's step goes over the
    whole table too.)

    Gradients go straight through the rounding; with `LowBit` the rows' scales are learned (LSQ, Esser et al. 2020), and
    signs have XNOR-Net's gradient (Rastegari et al. 2016), both as in the linear layers' twins.
    """

    def __init__(self, embedding: nn.Embedding, config: Config) -> None:
        super().__init__()
        _check_config(config)
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.config = config
        self.bits = bits_of(config)[0]
        self.weight = embedding.weight
        learned = isinstance(config, LowBit) and self.bits > 1
        scale = low_bit_weight_scale(embedding.weight.detach().float(), self.bits) if learned else None
        self.weight_scale = None if scale is None else nn.Parameter(scale)

    def rounded_weight(self) -> Tensor:
        """What the table is after rounding, differentiable in the weight and its scales."""
        if self.bits == 1:
            signs, mean = kk.binarize_rows(self.weight)
            return signs * mean[:, None].to(signs.dtype)
        if self.weight_scale is None:
            return kk.fake_quantize_rows(self.weight)
        low, high = weight_range(self.bits)
        scaled = self.weight_scale * gradient_factor(self.embedding_dim, high)
        scale = self.weight_scale.detach() + (scaled - scaled.detach())  # its value, with LSQ's share of the gradient
        return kk.fake_quantize(self.weight, learned_scale(scale), quant_min=low, quant_max=high, axis=0)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rounded_weight(), self.padding_idx)

    def to_inference(self) -> QuantizedEmbedding:
        scale = None if self.weight_scale is None else learned_scale(self.weight_scale.detach())
        return QuantizedEmbedding.from_float(self.to_float(), self.config, weight_scale=scale)

    def to_float(self) -> nn.Embedding:
        """A plain nn.Embedding that shares the float weight."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding.weight = self.weight
        return embedding

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.config}"


def why_not_embedding(module: nn.Embedding) -> str | None:
    """The reason why an embedding cannot be quantized; None if it can."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} is a subclass of nn.Embedding, whose own code might read the float weight"
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return "max_norm, sparse and scale_grad_by_freq have no quantized form"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}; the kernels take float32, bfloat16 and float16"
    if module.num_embeddings == 0 or module.embedding_dim == 0:
        return "it has no weights"
    return None


def _check_config(config: Config) -> None:
    if isinstance(config, Codebook):
        raise ValueError("config: Codebook has no form for embeddings; use LowBit")
    if isinstance(config, LowBit) and config.method == "dorefa":
        raise ValueError('config: method "dorefa" has no form for embeddings; use "lsq"')
