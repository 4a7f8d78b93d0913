"""CodebookLinear: weights that are indices of a few centroids, looked up by the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.clustering import shared_weights
from kdq.configs import Codebook
from kdq.layers.base import InferenceLinear


class CodebookLinear(InferenceLinear):
    """A linear layer that computes from its compressed weights (Han, Mao, Dally: Deep Compression, 2016).

    Buffers: `packed` int32 `[ceil(N / 16), ceil(K / (32 // weight_bits)), 16]` (`kdq_kernels.pack_indices`: the same on
    every machine, so that it is both what is saved and what the kernels read), `codebook` float32 `[2**weight_bits]`,
    `bias` float32 `[N]` or None. Activations stay in floating point.
    """

    computes_activation = True
    packed: Tensor
    codebook: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: Codebook,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, config=config, activation=activation)
        indices = torch.zeros(out_features, in_features, dtype=torch.uint8)
        self.register_buffer("packed", kk.pack_indices(indices, config.weight_bits))
        self.register_buffer("codebook", torch.zeros(2**config.weight_bits))

    @classmethod
    def from_float(
        cls, linear: nn.Linear, config: Codebook | None = None, *, activation: str | None = None
    ) -> CodebookLinear:
        """The shared weights of an nn.Linear (`kdq.clustering.shared_weights`); config None: `Codebook()`."""
        config = Codebook() if config is None else config
        codebook, indices = shared_weights(linear.weight.detach().float(), config.weight_bits)
        return cls.from_indices(indices, codebook, linear.bias, config, activation=activation)

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        codebook: Tensor,
        bias: Tensor | None,
        config: Codebook,
        *,
        activation: str | None = None,
    ) -> CodebookLinear:
        """indices uint8 `[N, K]`, codebook float32 `[2**weight_bits]`, bias `[N]` or None."""
        n, k = indices.shape
        layer = cls(k, n, bias is not None, config=config, activation=activation)
        layer.packed = kk.pack_indices(indices, config.weight_bits)
        layer.codebook = codebook.detach().float().clone()
        if bias is not None:
            layer.bias = bias.detach().float().clone()
        return layer

    def indices(self) -> Tensor:
        """uint8 `[N, K]`."""
        return kk.unpack_indices(self.packed, self.config.weight_bits, self.out_features, self.in_features)

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        own: dict[str, Any] = self._buffers  # see InferenceProduct.kernel
        return kk.codebook_linear(
            x, own["packed"], own["codebook"], self.out_features, own["bias"], activation=activation
        )

    def dequantized_weight(self) -> Tensor:
        return self.codebook[self.indices().int()]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"
