"""The shapes M, N, K of the matrix products: rows, output channels, input channels."""

from __future__ import annotations

from kdq.bench.target import Target

Shape = tuple[int, int, int]

QUICK: list[Shape] = [(16, 64, 64)]
GPU_QUICK: list[Shape] = [*QUICK, (17, 72, 40)]  # with few rows some peers are left out
INT8: list[Shape] = [
    (1, 64, 64),
    (1, 1000, 2048),
    (1, 4096, 4096),
    (1, 11008, 4096),
    (8, 4096, 4096),
    (8, 11008, 4096),
    (16, 768, 768),
    (64, 1024, 1024),
    (100, 300, 500),
    (128, 768, 768),
    (128, 3072, 768),
    (128, 768, 3072),
    (197, 384, 384),
    (512, 512, 512),
    (512, 4096, 4096),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    # Shapes that no block size divides.
    (3, 77, 1000),
    (5, 5, 5),
    (33, 1000, 64),
    (37, 129, 257),
    (1000, 10, 784),
]
WEIGHT_ONLY: list[Shape] = [
    (1, 1000, 2048),
    (1, 4096, 4096),
    (1, 11008, 4096),
    (4, 11008, 4096),
    (8, 4096, 4096),
    (37, 129, 257),
    (128, 768, 768),
    (1024, 1024, 1024),
]
LOW_BIT: list[Shape] = [
    (1, 1000, 2048),
    (1, 4096, 4096),
    (1, 11008, 4096),
    (4, 4096, 4096),
    (16, 4096, 4096),
    (128, 768, 768),
]
BIT_PLANES: list[Shape] = [
    (16, 768, 768),
    (128, 768, 768),
    (128, 3072, 768),
    (128, 4096, 4096),
    (1024, 1024, 1024),
]
BINARY: list[Shape] = [
    (1, 4096, 4096),
    (16, 768, 768),
    (37, 129, 257),
    (128, 768, 768),
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
]
# Llama 3 8B: attention's output, its three inputs, one and both of the first two of the feed-forward, its last. N, K.
LLAMA = [(4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
ROWS = [1, 16, 128, 512, 4096]
CUBES: list[Shape] = [(4096, 4096, 4096), (8192, 8192, 8192)]


def on_gpu(shapes: list[Shape]) -> list[Shape]:
    """Those of a CPU, the layers of a language model, and what is large enough for every GPU."""
    layers = [(m, n, k) for n, k in LLAMA for m in ROWS]
    return list(dict.fromkeys([*shapes, *layers, *CUBES]))


def products(target: Target, cpu: list[Shape]) -> list[Shape]:
    if target.quick:
        return GPU_QUICK if target.gpu else QUICK
    return on_gpu(cpu) if target.gpu else cpu


def name(shape: Shape) -> str:
    """`16x768x768`."""
    return "x".join(map(str, shape))
