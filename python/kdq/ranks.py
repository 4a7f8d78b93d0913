"""What processes that train together share: numbers, rows, gradients; and whether they do.

`kdq.distributed` applies it to models in DDP and FSDP2. Collectives run in the default process group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

_together: ContextVar[bool | None] = ContextVar("together", default=None)


# ---- who computes together -------------------------------------------------------------------------------------------


def world_size() -> int:
    """1 where torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process draws progress bars and writes files: rank 0, or one that computes alone."""
    return not pooling() or dist.get_rank() == 0


@contextmanager
def together() -> Iterator[None]:
    """All ranks run what is inside, each on its own part of the data: grids that start from the first batch, observers
    and losses that relate samples take in what all ranks see, and are the same on all of them.

        with kdq.distributed.together():
            kdq.quantize_(model, kdq.Int8Static(), calibration=my_part)

    A `Distiller` with a DDP or FSDP2 student does so by itself. What is inside has collectives: a rank that does not
    take part lets the others wait.
    """
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """This process runs what is inside by itself, on a model of its own, whatever other ranks do."""
    token = _together.set(False)
    try:
        yield
    finally:
        _together.reset(token)


def pooling() -> bool:
    """Whether other ranks take part in what is computed now."""
    return _together.get() is True and world_size() > 1


def is_alone() -> bool:
    """Whether there is one process, or this one said so."""
    return world_size() == 1 or _together.get() is False


def check_first_batch() -> None:
    """Raises RuntimeError where a grid is about to start from a batch and nobody said whose batches count."""
    if world_size() > 1 and _together.get() is None:
        raise RuntimeError(
            "the activation grid would start from this rank's batch alone: run the first batch on all ranks within "
            "kdq.distributed.together(), as a Distiller does for a DDP or FSDP2 student, or, for a model that is this "
            "rank's own, within kdq.distributed.alone()"
        )


# ---- numbers and rows of all ranks -----------------------------------------------------------------------------------


def gather_numbers(values: Sequence[float], device: torch.device | None) -> Tensor:
    """float64 `[ranks, n]` on the CPU, the same on all ranks, `[1, n]` if this one computes alone."""
    if not pooling():
        return torch.tensor([list(values)], dtype=torch.float64)
    own = torch.tensor(values, dtype=torch.float64, device=device)
    every = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(every, own)
    return torch.stack(every).cpu()


def sum_over_ranks(values: Sequence[float], device: torch.device | None) -> list[float]:
    """Each value's sum, in the ranks' order: the same to the bit on all of them."""
    sums: list[float] = gather_numbers(values, device).sum(0).tolist()
    return sums


def pooled_range(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest element of all ranks' x; (inf, -inf) if there is none."""
    ends = (float(x.min()), -float(x.max())) if x.numel() else (torch.inf, torch.inf)
    low, negated_high = gather_numbers(ends, x.device).amin(0).tolist()
    return low, -negated_high


def share_of_rows(count: Tensor | int, device: torch.device) -> Tensor | float:
    """The factor that turns a mean over this rank's `count` rows into its part of the mean over all ranks' rows, which
    is then the mean over the ranks: `count * ranks / (sum of counts)`."""
    if not pooling():
        return 1.0
    own = torch.as_tensor(count, dtype=torch.float64, device=device)
    total = own.clone()
    dist.all_reduce(total)
    return own * world_size() / total.clamp_min(1)


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows `[n, ...]` of all ranks in their order, n may differ, and at which this rank's begin.

    Differentiable: a rank gets the gradients that all ranks have for its rows, added.
    """
    if not pooling():
        return rows, 0
    counts = gather_numbers([len(rows)], rows.device)[:, 0].long().tolist()
    gathered: Tensor = _GatherRows.apply(rows, counts)
    return gathered, sum(counts[: dist.get_rank()])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded)
        ctx.counts = counts
        return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()], None


def gather_objects(value: Any) -> list[Any]:
    """What all ranks have, in their order; for objects that pickle."""
    if not pooling():
        return [value]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, value)
    return every


def own_of(values: Sequence[Any]) -> Any:
    """This rank's, of what `gather_objects` gave; where there are more ranks than then, it starts again."""
    return values[dist.get_rank() % len(values) if pooling() else 0]


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Gives all ranks what rank 0 has."""
    if pooling():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


# ---- epochs ----------------------------------------------------------------------------------------------------------


def batches_in_step(loader: Iterable[Any], device: torch.device | None) -> Iterator[Any]:
    """The loader's batches.

    Raises:
        ValueError: (on all ranks) one has no more batches while another has.
    """
    if not pooling():
        yield from loader
        return
    end = object()
    batches, count = iter(loader), 0
    while True:
        batch = next(batches, end)
        ended = gather_numbers([batch is end], device)[:, 0].bool()
        if ended.any() and not ended.all():
            ranks = ", ".join(map(str, ended.nonzero()[:, 0].tolist()))
            raise ValueError(
                f"loader: rank {ranks} had no more batches after {count}, others had: every rank needs the same number "
                "of batches, as with torch.utils.data.DistributedSampler"
            )
        if batch is end:
            return
        yield batch
        count += 1


def start_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tells the epoch to the loader's sampler, if it is one that shuffles by it, as DistributedSampler."""
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


# ---- gradients -------------------------------------------------------------------------------------------------------


def average_after_backward(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Has the gradients of parameters that neither DDP nor FSDP2 knows averaged over the ranks, at the end of the
    loss's backward pass."""
    if pooling() and parameters and loss.requires_grad:
        engine: Any = Variable._execution_engine
        loss.register_hook(lambda _: engine.queue_callback(lambda: average_gradients_(parameters)))


@torch.no_grad()
def average_gradients_(parameters: Sequence[nn.Parameter]) -> None:
    """The mean over all ranks, in place. None counts 0, and stays None where all ranks have it."""
    with together():
        device = parameters[0].device
        used = gather_numbers([p.grad is not None for p in parameters], device).any(0).tolist()
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter, is_used in zip(parameters, used, strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat.div_(world_size())
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
