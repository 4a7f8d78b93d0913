"""Training on several processes with PyTorch's own engine: models in DistributedDataParallel or sharded by FSDP2.

    student = DistributedDataParallel(student)  # or fully_shard(student, ignored_params=learned_scales(student))
    Distiller(teacher, student, losses).fit(loader, epochs=20)  # each rank with its own part of the data

A `Distiller` whose student is wrapped so computes on all ranks together what one process would on their batches
together. Everything else asks `together`. docs/distributed.md tells more, and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdq.ranks import alone, gather_numbers, is_alone, is_main, together, world_size

__all__ = ["alone", "learned_scales", "parameter_groups", "together"]  # the others are kdq's own


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


@contextmanager
def scope_of(model: nn.Module) -> Iterator[None]:
    """`together` for a model that DDP or FSDP2 keeps the same on all ranks, `alone` for any other."""
    with together() if is_spread(model) else alone():
        yield


def check_spread(model: nn.Module) -> None:
    """Raises ValueError if there are several processes, and DDP or FSDP2 do not keep the model the same on all of them,
    but for one that is this process's own by `alone`."""
    check_said(model)
    ranks = world_size()
    if isinstance(model, DistributedDataParallel):
        ranks = dist.get_world_size(cast(Any, model).process_group)
    elif is_sharded(model):
        reshard(model)
        ranks = next((cast(Any, p).device_mesh.size() for p in split_by_kind(model.parameters())[1]), ranks)
    if ranks != world_size():
        raise ValueError(
            f"student: expected DDP or FSDP2 over all {world_size()} ranks of the default process group, got {ranks}"
        )


def check_said(model: nn.Module) -> None:
    """The first half of `check_spread`."""
    if not is_spread(model) and not is_alone():
        raise ValueError(
            f"student: there are {world_size()} processes, but neither DDP nor FSDP2 is around it, so that each would "
            "train its own; wrap it before the Distiller gets it, or, if that is meant, work within "
            "kdq.distributed.alone()"
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


def learned_scales(model: nn.Module) -> set[nn.Parameter]:
    """The learned scales and zero points of a model's training twins, for `fully_shard(..., ignored_params=...)`.

    FSDP2 cannot shard what has no axis, and would round scales to its `param_dtype`. They stay whole and float32 on all
    ranks, some `out_features + 2` numbers a layer; a `Distiller` averages their gradients.
    """
    from kdq.layers.qat import TrainingTwin  # which uses this module

    twins = [module for module in model.modules() if isinstance(module, TrainingTwin)]
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


def needed(here: bool, model: nn.Module) -> bool:
    """Whether a model has to run because this rank needs it, or, as it is sharded, because another does."""
    if not is_sharded(model):
        return here
    with together():
        return bool(gather_numbers([here], next(model.parameters()).device).any())


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


# ---- sharded tensors -------------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all ranks ask; any other as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


@torch.no_grad()
def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


# ---- parameters ------------------------------------------------------------------------------------------------------


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What trains in a model sharded by FSDP2, but was left whole: FSDP2 does not average its gradient."""
    if not is_sharded(model):
        return []
    reshard(model)
    return split_by_kind(p for p in model.parameters() if p.requires_grad)[0]


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
