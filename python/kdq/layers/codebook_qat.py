"""CodebookQATLinear: the training twin of CodebookLinear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.clustering import shared_weights
from kdq.configs import Codebook
from kdq.layers.codebook_linear import CodebookLinear
from kdq.layers.qat import QATLinear


class CodebookQATLinear(QATLinear):
    """Weights that share centroids, which are finetuned (trained quantization, in Han, Mao, Dally: Deep Compression,
    2016).

    The clusters are found when the twin is made and stay; a centroid's gradient is the sum of its weights' gradients.
    There is no float weight: `centroids` (float32) and `bias` are the parameters. A centroid that is 0 because the
    weight had exact zeros, as pruning leaves them, is not among them, so that pruned weights stay 0.
    """

    indices: Tensor

    def __init__(self, linear: nn.Linear, config: Codebook) -> None:
        super().__init__(linear)
        del self.weight
        self.config = config
        weight = linear.weight.detach().float()
        codebook, indices = shared_weights(weight, config.weight_bits)
        self.has_zero = bool((weight == 0).any())
        self.centroids = nn.Parameter(codebook[int(self.has_zero) :].clone())
        self.register_buffer("indices", indices)

    def codebook(self) -> Tensor:
        """float32 `[2**weight_bits]`, differentiable in the centroids."""
        return F.pad(self.centroids, (int(self.has_zero), 0))

    def shared_weight(self) -> Tensor:
        """float32 `[N, K]`, differentiable in the centroids."""
        return self.codebook().index_select(0, self.indices.flatten().int()).view(self.indices.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.shared_weight().to(x.dtype), self.bias)

    def to_inference(self) -> CodebookLinear:
        codebook = self.codebook().detach()
        if not torch.isfinite(codebook).all():
            raise ValueError("its centroids contain NaN or inf")
        return CodebookLinear.from_indices(self.indices, codebook, self.bias, self.config)

    def to_float(self) -> nn.Linear:
        """A plain nn.Linear with the shared weights, and the bias itself."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.shared_weight().detach())
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"
