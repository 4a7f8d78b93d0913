"""Weight sharing: the few centroids that stand for all weights of a layer, by k-means in one dimension.

Han, Mao, Dally: Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
Coding, 2016. Training and inference both take their centroids from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 1000  # k-means in one dimension ends long before


def kmeans(values: Tensor, count: int) -> Tensor:
    """Centroids of `values`, ascending, float32 `[count]`: Lloyd's algorithm until no value changes its cluster.

    It starts from centroids at equal distances between the smallest and the largest value, as the paper recommends:
    large weights are few, matter most, and get centroids near them only so. A centroid without values stays where it
    is. Without values all are 0. Nothing is random.
    """
    if values.numel() == 0:
        return torch.zeros(count)
    ordered = values.detach().flatten().double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    centroids = torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64)
    edges = ordered.new_zeros(0)
    for _ in range(ITERATIONS):
        # Clusters are runs of the ordered values: [edges[i], edges[i + 1]).
        inner = torch.searchsorted(ordered, _boundaries(centroids), right=True)
        before, edges = edges, torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])
        if torch.equal(before, edges):
            break
        sizes = edges.diff()
        centroids = torch.where(sizes > 0, sums[edges].diff() / sizes.clamp_min(1), centroids)
    return centroids.float()


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """The index of each value's nearest centroid (ascending; the lower of two that are as near), int64."""
    return torch.bucketize(values.detach().float().contiguous(), _boundaries(centroids))


def shared_weights(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codebook of a weight, float32 `[2**bits]`, and the index of each of its elements, uint8 like the weight.

    Exact zeros, as pruning leaves them, stay exact: where there are any, centroid 0 is 0 and theirs alone. The other
    centroids are those of `kmeans`, ascending.
    """
    pruned = weight == 0
    zeros = bool(pruned.any())
    centroids = kmeans(weight[~pruned], 2**bits - zeros)
    indices = (nearest(weight, centroids) + zeros).masked_fill(pruned, 0)
    return torch.cat([centroids.new_zeros(int(zeros)), centroids]), indices.to(torch.uint8)


def _boundaries(centroids: Tensor) -> Tensor:
    return (centroids[1:] + centroids[:-1]) / 2
