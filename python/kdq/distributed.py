"""Training on several processes with PyTorch's own engine: what ranks must agree on beyond what DDP and FSDP2 do.

    student = DistributedDataParallel(student)  # or fully_shard(student, ignored_params=learned_scales(student))
    Distiller(teacher, student, losses).fit(loader, epochs=20)  # each rank with its own part of the data

A `Distiller` whose student is wrapped so computes on all ranks together what one process would on their batches
together. Everything else asks `together`. Collectives run in the default process group, which must be the wrapper's.
docs/distributed.md tells what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

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


@contextmanager
def scope_of(model: nn.Module) -> Iterator[None]:
    """`together` for a model that DDP or FSDP2 keeps the same on all ranks, `alone` for any other."""
    with together() if is_spread(model) else alone():
        yield


def pooling() -> bool:
    """Whether other ranks take part in what is computed now."""
    return _together.get() is True and world_size() > 1


def check_first_batch() -> None:
    """Raises RuntimeError where a grid is about to start from a batch and nobody said whose batches count."""
    if world_size() > 1 and _together.get() is None:
        raise RuntimeError(
            "the activation grid would start from this rank's batch alone: run the first batch on all ranks within "
            "kdq.distributed.together(), as a Distiller does for a DDP or FSDP2 student, or, for a model that is this "
            "rank's own, within kdq.distributed.alone()"
        )


# ---- wrapped models --------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DDP; any other as it is."""
    return cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to the model or a part of it."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # its import takes a second, that only sharded training pays

    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_spread(model: nn.Module) -> bool:
    """Whether DDP or FSDP2 keeps the model the same on all ranks."""
    return isinstance(model, DistributedDataParallel) or is_sharded(model)


def check_spread(model: nn.Module) -> None:
    """Raises ValueError if DDP or FSDP2 keep the model the same on some ranks only."""
    ranks = world_size()
    if isinstance(model, DistributedDataParallel):
        ranks = dist.get_world_size(cast(Any, model).process_group)
    elif is_sharded(model):
        reshard(model)
        ranks = next((cast(Any, p).device_mesh.size() for p in split_by_kind(model.parameters())[1]), ranks)
    if ranks != world_size():
        raise ValueError(
            f"model: expected DDP or FSDP2 over all {world_size()} ranks of the default process group, got {ranks}"
        )


def check_plain(model: nn.Module) -> None:
    """Raises ValueError if DDP or FSDP2 is around the model: its layers cannot be exchanged or saved as they are."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model: it is wrapped in DistributedDataParallel; pass model.module")
    if is_sharded(model):
        raise ValueError(
            "model: it is sharded by fully_shard; load distiller.state_dict()['student'], which is complete on rank 0, "
            "into a plain model prepared in the same way, and pass that"
        )


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 has gathered, so that `model.parameters()` are those that the optimizer knows."""
    if is_sharded(model):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def printed(model: nn.Module) -> str:
    """What `str` gives for the model as it was before `fully_shard`, which renames its classes."""
    text = str(model)
    if is_sharded(model):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                text = text.replace(f"{type(module).__name__}(", f"{class_name(module)}(")
    return text


def class_name(module: nn.Module) -> str:
    """As it was before `fully_shard`."""
    name = type(module).__name__
    return name.removeprefix("FSDP") if is_sharded(module) else name


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all ranks ask; any other as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


@torch.no_grad()
def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def needed(here: bool, model: nn.Module) -> bool:
    """Whether a model has to run because this rank needs it, or, as it is sharded, because another does."""
    if not is_sharded(model):
        return here
    with together():
        return bool(gather_numbers([here], next(model.parameters()).device).any())


def learned_scales(model: nn.Module) -> set[nn.Parameter]:
    """The learned scales and zero points of a model's training twins, for `fully_shard(..., ignored_params=...)`.

    FSDP2 cannot shard what has no axis, and would round scales to its `param_dtype`. They stay whole and float32 on all
    ranks, some `out_features + 2` numbers a layer; a `Distiller` averages their gradients.
    """
    from kdq.layers.qat import QATLinear  # which uses this module

    twins = [module for module in model.modules() if isinstance(module, QATLinear)]
    shardable = {id(p) for twin in twins for p in (twin._parameters.get("weight"), twin._parameters.get("bias"))}
    return {p for twin in twins for p in twin.parameters() if id(p) not in shardable}


def run_as_forward(model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """compute(), which runs the unwrapped model any number of times, as the one forward pass that DDP allows before a
    backward pass; DDP so finds the parameters that none of them used. Without DDP just compute()."""
    if not isinstance(model, DistributedDataParallel):
        return compute()
    inner = model.module
    model.module = _Computation(inner, compute)
    try:
        return cast(Tensor, model(None))
    finally:
        model.module = inner


class _Computation(nn.Module):
    def __init__(self, inner: nn.Module, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.buffers_of_inner = inner.named_buffers

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Those that DDP gives all ranks before a forward pass."""
        return self.buffers_of_inner(*args, **kwargs)

    def forward(self, _: None) -> Tensor:
        return self.compute()


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


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What trains in a model sharded by FSDP2, but was left whole: FSDP2 does not average its gradient."""
    if not is_sharded(model):
        return []
    reshard(model)
    return split_by_kind(p for p in model.parameters() if p.requires_grad)[0]


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


def split_by_kind(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Plain parameters and sharded ones: torch's operators on lists of tensors take no mixture."""
    if world_size() == 1 and not (dist.is_available() and dist.is_initialized()):
        return list(parameters), []
    from torch.distributed.tensor import DTensor

    plain: list[nn.Parameter] = []
    sharded: list[nn.Parameter] = []
    for parameter in parameters:
        (sharded if isinstance(parameter, DTensor) else plain).append(parameter)
    return plain, sharded


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """For optimizers: one group of plain and one of sharded parameters, where there are."""
    return [{"params": group} for group in split_by_kind(parameters) if group]


def clip_gradients_(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """`torch.nn.utils.clip_grad_norm_`, on plain and sharded parameters together; returns the norm."""
    norms = []
    for group in split_by_kind(parameters):
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(whole(norm))
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in split_by_kind(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return float(total)


# ---- state -----------------------------------------------------------------------------------------------------------


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The whole state under the plain model's names; of a sharded model, whose ranks all call it, on rank 0 only."""
    if not is_sharded(model):
        return unwrapped(model).state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """The inverse of `full_state_dict`; if the model is sharded, what rank 0 gives counts."""
    if not is_sharded(model):
        unwrapped(model).load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def to_save(value: Any) -> Any:
    """A tensor, or a dict of such, as a checkpoint keeps it: a sharded one whole, on the CPU of rank 0, and empty on
    the others, which take part."""
    if isinstance(value, dict):
        return {name: to_save(entry) for name, entry in value.items()}
    if not hasattr(value, "full_tensor"):
        return value
    tensor = value.full_tensor()
    return tensor.cpu() if is_main() else tensor.new_empty(0, device="cpu")


def distribute_as(like: Tensor, value: Any) -> Any:
    """This rank's shard of a whole tensor, if `like` is sharded and of its shape; anything else as it is."""
    if not hasattr(like, "device_mesh") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh
    return distribute_tensor(value.to(like.device), mesh, cast(Any, like).placements, src_data_rank=None)
