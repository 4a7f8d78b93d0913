"""Contenders for fake-quant: torch's operators and the compiled composition of plain ops.

The limit is the copy bandwidth: x is read, y is written. With a fresh output the page faults of new memory may cost
more than the kernel; writing into an output that is used again is a family of its own, since of torch's ways only the
compiled one can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import kdq_kernels as kk
from kdq.bench.case import Case, Contender
from kdq.bench.compiled import compiled
from kdq.bench.limits import copying
from kdq.bench.target import Target

QMIN, QMAX, SCALE = -128, 127, 0.02
QUICK_SIZES = [(1024, 64)]
MILLION, SIXTEEN, SIXTY_FOUR = (1024, 1024), (1024, 16384), (4096, 16384)  # elements
AXES = {"per tensor": None, "axis 0": 0, "last axis": 1}
LARGEST_COMPILED = 1 << 24  # on a CPU larger ones take torch.compile's contender no further
learnable_tensor = torch.ops.aten._fake_quantize_learnable_per_tensor_affine
learnable_channel = torch.ops.aten._fake_quantize_learnable_per_channel_affine


@dataclass(frozen=True)
class Grid:
    """The scales of a symmetric grid for x [rows, columns]: one, or one a channel of the axis."""

    scale: Tensor
    axis: int | None

    @staticmethod
    def of(x: Tensor, axis: int | None, generator: torch.Generator) -> Grid:
        if axis is None:
            return Grid(torch.tensor([SCALE], device=x.device), None)
        return Grid(torch.rand(x.shape[axis], generator=generator, device=x.device) * SCALE + SCALE, axis)

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.scale, dtype=torch.int32)

    def against(self, x: Tensor) -> Tensor:
        """The scales, shaped to broadcast against x."""
        return self.scale[:, None] if self.axis == 0 else self.scale


def composed(x: Tensor, scale: Tensor) -> Tensor:
    """Symmetric fake-quant from plain torch ops. scale broadcasts against x."""
    return (torch.clamp(torch.round(x.float() * (1 / scale)), QMIN, QMAX) * scale).to(x.dtype)


def composed_into(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    return out.copy_(composed(x, scale))


def inputs(target: Target) -> Iterator[tuple[str, Tensor, Grid]]:
    """Shape, x and its grid of each case: float32 at each size, then half precision."""
    generator = target.generator(4)
    sizes = QUICK_SIZES if target.quick else [MILLION, SIXTEEN, SIXTY_FOUR]
    for dtype, size in [
        *((torch.float32, size) for size in sizes),
        *((dtype, sizes[0] if target.quick else SIXTEEN) for dtype in (torch.bfloat16, torch.float16)),
    ]:
        x = torch.randn(size, generator=generator, device=target.device).to(dtype)
        for kind, axis in AXES.items():
            name = f"{size[0]}x{size[1]} {str(dtype).removeprefix('torch.')} {kind}"
            yield name, x, Grid.of(x, axis, generator)


def fake_quantize_cases(target: Target) -> Iterator[Case]:
    """Forward, into fresh memory."""
    for shape, x, grid in inputs(target):
        contenders = [Contender("kdq fake_quantize", ours(x, grid, None), "ours"), *torch_operators(x, grid)]
        if not target.quick and (target.gpu or x.numel() <= LARGEST_COMPILED):
            run = partial(compiled(composed), x, grid.against(x))
            contenders.append(Contender("torch.compile", run, "peer", compiled_tolerance(x, target)))
        yield case("fake_quantize", shape, x, grid, contenders)


def fake_quantize_out_cases(target: Target) -> Iterator[Case]:
    """Forward, into the same memory again and again."""
    for shape, x, grid in inputs(target):
        contenders = [
            Contender("kdq fake_quantize, out", ours(x, grid, torch.empty_like(x)), "ours"),
            Contender("torch copy_", partial(torch.empty_like(x).copy_, x), "context", 1.0),  # the same bytes
        ]
        if not target.quick:
            run = partial(compiled(composed_into), x, grid.against(x), torch.empty_like(x))
            contenders.append(Contender("torch.compile, out", run, "peer", compiled_tolerance(x, target)))
        yield case("fake_quantize_out", shape, x, grid, contenders)


def case(family: str, shape: str, x: Tensor, grid: Grid, contenders: list[Contender]) -> Case:
    limits = [copying(2.0 * x.element_size() * x.numel())]
    return Case(family, shape, limits, composed(x, grid.against(x)), contenders)


def tolerance(x: Tensor) -> float:
    """In half precision some peers round twice."""
    return 1e-6 if x.dtype == torch.float32 else 1e-2


def compiled_tolerance(x: Tensor, target: Target) -> float:
    """On a GPU 1 / scale may be rounded otherwise, and a value on an edge then gets the next integer."""
    return max(tolerance(x), 1e-3 if target.gpu else 0.0)


def ours(x: Tensor, grid: Grid, out: Tensor | None) -> Callable[[], Tensor]:
    return lambda: kk.fake_quantize(x, grid.scale, quant_min=QMIN, quant_max=QMAX, axis=grid.axis, out=out)


def torch_operators(x: Tensor, grid: Grid) -> list[Contender]:
    scale, zero = grid.scale, grid.zero_point
    if grid.axis is None:
        plain = partial(torch.fake_quantize_per_tensor_affine, x, SCALE, 0, QMIN, QMAX)
        learnable = partial(learnable_tensor, x, scale, zero.float(), QMIN, QMAX)
        name = "per_tensor"
    else:
        plain = partial(torch.fake_quantize_per_channel_affine, x, scale, zero, grid.axis, QMIN, QMAX)
        learnable = partial(learnable_channel, x, scale, zero.float(), grid.axis, QMIN, QMAX)
        name = "per_channel"
    return [
        Contender(f"torch {name}", plain, "peer", tolerance(x)),
        Contender(f"torch learnable {name}", learnable, "peer", tolerance(x)),
    ]
