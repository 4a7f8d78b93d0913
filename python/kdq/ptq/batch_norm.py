"""Batch norm and quantization: folding it into the linear layers beside it, and measuring its statistics again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from kdq.calibrate import run_batches
from kdq.ptq.chains import Named, Rewrites, chains, names_of, used_twice, why_not_float
from kdq.ptq.tool_report import ToolReport

BEFORE: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm1d: nn.Linear, nn.BatchNorm2d: nn.Conv2d}


def fold_batch_norm_(model: nn.Module) -> ToolReport:
    """Folds batch norms, as they act in eval mode, into the layer before or after them; each becomes an nn.Identity, so
    that names hold.

    BatchNorm1d right after an nn.Linear and BatchNorm2d right after an nn.Conv2d scale that layer's output channels;
    a BatchNorm1d that has no linear layer before it, but one after, goes into that one's columns and bias. Neighbours
    are those of nn.Sequential. The float model computes the same to rounding.

    Helps: the norm costs no pass over memory any more, and what it multiplies is quantized with the weights, whose
    scales are per output channel. Does not help a model that goes on training, which loses its normalization; and
    folding in front may make the ranges of columns differ (see `equalize_`). Sequences `[batch, channels, length]`
    normalize another axis than an nn.Linear puts out: do not fold these.

    Raises:
        ValueError: a folded weight would be NaN or infinite, as with statistics that are. Nothing was changed.
    """
    twice = used_twice(model)
    rewrites = Rewrites()
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    folded: list[str] = []
    in_chains: set[int] = set()
    for chain in chains(model):
        chain = [(name, module) for name, module in chain if type(module) is not nn.Identity]
        for at, (name, norm) in enumerate(chain):
            if type(norm) not in BEFORE:
                continue
            in_chains.add(id(norm))
            before = next((c for c in reversed(chain[:at]) if c[0] not in folded), None)
            after = chain[at + 1] if at + 1 < len(chain) else None
            reason = _fold(norm, before, after, twice, rewrites, changed, name)
            if reason is None:
                folded.append(name)
            else:
                left[name] = reason
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in in_chains:
            known = type(module) in BEFORE
            left[name] = "it is not in a plain nn.Sequential" if known else f"{type(module).__name__} is not folded"
    rewrites.carry_out(names_of(model))
    for name in folded:
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, nn.Identity().train(model.get_submodule(name).training))
    return ToolReport(changed, left)


def _fold(
    norm: Any,
    before: Named | None,
    after: Named | None,
    twice: set[int],
    rewrites: Rewrites,
    changed: dict[str, str],
    name: str,
) -> str | None:
    """Plans one fold; returns the reason if there is none to do."""
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if id(norm) in twice:
        return "it is used elsewhere in the model"
    factor, offset = _affine(norm)
    kind = BEFORE[type(norm)]
    why_before = "nothing" if before is None else why_not_float(before[1], (kind,), twice)
    if before is not None and why_before is None:
        weight, bias = rewrites.of(before[1])
        if len(weight) != len(factor):
            return f"it has {len(factor)} channels, {before[0]!r} before it puts out {len(weight)}"
        rewrites.scale_outputs(before[1], factor)
        weight, bias = rewrites.of(before[1])
        rewrites.set(before[1], weight, offset if bias is None else bias + offset)
        changed[name] = f"into {before[0]}, before it"
        return None
    why_after = "nothing" if after is None else why_not_float(after[1], (nn.Linear,), twice)
    if type(norm) is nn.BatchNorm1d and after is not None and why_after is None:
        weight, bias = rewrites.of(after[1])
        if weight.shape[1] != len(factor):
            return f"it has {len(factor)} channels, {after[0]!r} after it takes {weight.shape[1]}"
        shift = weight @ offset
        rewrites.set(after[1], weight * factor, shift if bias is None else bias + shift)
        changed[name] = f"into {after[0]}, after it"
        return None
    if type(norm) is nn.BatchNorm2d:
        return f"no layer before it to fold it into: {why_before}"
    return f"no layer to fold it into: before it, {why_before}; after it, {why_after}"


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(factor, offset), float64: what the norm does to a channel in eval mode."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.detach().double()


def reestimate_batch_norm_(model: nn.Module, loader: Iterable[Any]) -> ToolReport:
    """Measures the running statistics of all batch norms anew: their cumulative average over the loader's batches.

    Everything else is in eval mode meanwhile, and modes and momenta are as before afterwards.

    Helps where quantization, or training with fake quantization and a moving average that lags behind, has shifted what
    the norms see: with few bits markedly. The average is the one that Wu and Johnson call PreciseBN ("Rethinking
    'Batch' in BatchNorm", 2021). Batches should be shuffled, of one size and not small: what differs between batches'
    means does not enter the variance. Does nothing for layer norms, and norms that were folded are gone.

    Raises:
        ValueError: the loader is empty, or a batch has but one value a channel. Nothing was changed.
    """
    norms: dict[str, Any] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.running_mean is None:
            left[name] = "it keeps no running statistics"
        else:
            norms[name] = module
    saved = {name: ({k: v.clone() for k, v in norm.named_buffers()}, norm.momentum) for name, norm in norms.items()}
    handles = [norm.register_forward_pre_hook(_train) for norm in norms.values()]
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        run_batches(model, loader, "loader")
        for name, norm in norms.items():
            if norm.num_batches_tracked == 0:
                left[name] = "no batch came through it"
                _restore(norm, saved[name][0])
    except BaseException:
        for name, norm in norms.items():
            _restore(norm, saved[name][0])
        raise
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.momentum = saved[name][1]
    return ToolReport({name: "statistics measured anew" for name in norms if name not in left}, left)


def _train(norm: nn.Module, _args: Any) -> None:
    """A hook before a norm's forward: `run_batches` has put it in eval mode with all else."""
    norm.train()


def _restore(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in norm.named_buffers():
        buffer.copy_(buffers[name])
