"""The language demo's model: a small causal transformer over bytes, with a cache of keys and values for decoding.

Written so that all of it quantizes as it stands: queries, keys and values are one nn.Linear, attention itself is
`scaled_dot_product_attention`, kdq's own where nothing is trained, the GELU follows its layer in an nn.Sequential (so
that it moves into the kernel), and a norm stands before every linear layer: few-bit grids and above all signs want
inputs that are centred. (That is a norm more in each half of a block than usual, the SubLN of Wang et al.: BitNet:
Scaling 1-bit Transformers for Large Language Models, 2023.) Embeddings and head are not tied, as they are rounded on
different grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdq.layers.attention import attention

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: blocks, features, heads, and the longest sequence in bytes."""

    blocks: int = 4
    width: int = 192
    heads: int = 6
    context: int = 128

    def __post_init__(self) -> None:
        if min(self.blocks, self.width, self.heads, self.context) < 1 or self.width % self.heads:
            raise ValueError(f"width: expected positive sizes, width a multiple of heads, got {self}")


class Cache:
    """The keys and values of the positions that a model has seen, so that the next one costs one row.

    `keys` and `values` `[batch, heads, context, width / heads]`, one a block, of which the first `length` are filled.
    """

    def __init__(
        self, shape: Shape, batch: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        size = (batch, shape.heads, shape.context, shape.width // shape.heads)
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.blocks)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.blocks)]
        self.length = 0

    @classmethod
    def of(cls, model: LanguageModel) -> Cache:
        """An empty one, of the model's dtype and on its device."""
        like = model.norm.weight
        return cls(model.shape, dtype=like.dtype, device=like.device)

    def extended(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new positions behind those seen; all keys and values up to them."""
        end = self.length + key.shape[2]
        self.keys[block][:, :, self.length : end] = key
        self.values[block][:, :, self.length : end] = value
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]


class Attention(nn.Module):
    """Causal self-attention; `qkv` is one linear layer."""

    def __init__(self, shape: Shape, block: int) -> None:
        super().__init__()
        self.heads, self.block = shape.heads, block
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.norm = nn.LayerNorm(shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, bias: Tensor, cache: Cache | None = None) -> Tensor:
        """x `[batch, rows, width]`; bias is added to the attention's logits, `[1, heads, rows, positions seen]`."""
        batch, rows, width = x.shape
        qkv = self.qkv(x).view(batch, rows, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        if cache is not None:
            key, value = cache.extended(self.block, key, value)
        mixed, _ = attention(query, key, value, bias, dropout=0.0, is_causal=False, need_weights=False)
        y: Tensor = self.out(self.norm(mixed.transpose(1, 2).reshape(batch, rows, width)))
        return y


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on the norm of what it adds to."""

    def __init__(self, shape: Shape, block: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape, block)
        self.norm2 = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.LayerNorm(4 * shape.width),
            nn.Linear(4 * shape.width, shape.width),
        )

    def forward(self, x: Tensor, bias: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), bias, cache)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


def distance_bias(shape: Shape) -> Tensor:
    """What attention subtracts for distance, float32 `[1, heads, context, context]`: `slope * (query - key)`, a slope a
    head from near-sighted to far-sighted; -inf for keys that come after the query.

    Press, Smith, Lewis: Train Short, Test Long: Attention with Linear Biases, 2022. Nothing has to be learned before
    near bytes count more than far ones. Slopes are a geometric sequence as there, from 2 to 1/256: the steepest is
    steeper, as bytes are shorter than words.
    """
    slopes = 2.0 ** torch.linspace(1, -8, shape.heads)
    position = torch.arange(shape.context)
    distance = (position[:, None] - position).float()
    bias = torch.where(distance < 0, -torch.inf, -slopes[:, None, None] * distance)
    return bias[None]  # with fewer than four axes, scaled_dot_product_attention leaves its fast path


class LanguageModel(nn.Module):
    """Logits of the next byte at every position."""

    bias: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token = nn.Embedding(BYTES, shape.width)
        self.blocks = nn.ModuleList([Block(shape, block) for block in range(shape.blocks)])
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES)
        self.register_buffer("bias", distance_bias(shape), persistent=False)
        for module in self.modules():  # as GPT-2: small weights, so that the residual stream starts quiet
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for residual in self.blocks:
            for layer in (residual.get_submodule("attention.out"), residual.get_submodule("mlp.3")):
                nn.init.normal_(layer.get_parameter("weight"), std=0.02 / (2 * shape.blocks) ** 0.5)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids int64 `[batch, rows]`, the bytes that follow what the cache has seen -> logits `[batch, rows, 256]`.

        Raises:
            ValueError: the sequence would be longer than the context.
        """
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.shape.context:
            raise ValueError(f"ids: expected at most {self.shape.context} positions in all, got {end}")
        x, bias = self.token(ids), self.bias[:, :, start:end, :end]
        for block in self.blocks:
            x = block(x, bias, cache)
        if cache is not None:
            cache.length = end
        logits: Tensor = self.head(self.norm(x))
        return logits


@torch.inference_mode()
def complete(model: LanguageModel, prompt: bytes, count: int) -> bytes:
    """The `count` bytes that follow the prompt, each the likeliest, decoded one at a time.

    Raises:
        ValueError: prompt is empty, or the two together are longer than the context.
    """
    if not prompt:
        raise ValueError("prompt: expected at least one byte, got none")
    cache = Cache.of(model)
    ids = torch.tensor([list(prompt)], device=model.bias.device)
    written = bytearray()
    while len(written) < count:
        ids = model(ids, cache)[:, -1:].argmax(-1)
        written.append(int(ids))
    return bytes(written)
