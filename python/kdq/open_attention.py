"""open_attention_: nn.MultiheadAttention as a module of plain linear layers, which everything else then takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from kdq.distributed import check_plain
from kdq.fuse import has_own_code
from kdq.layers.attention import MultiheadAttention, why_not_attention
from kdq.planning import FilterFn
from kdq.ptq.tool_report import ToolReport
from kdq.transformer import run_layers_of_transformers

PARAMETERS = {
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
    *("bias_k", "bias_v"),
}


def open_attention_(model: nn.Module, filter_fn: FilterFn | None = None) -> ToolReport:
    """Replaces every nn.MultiheadAttention of a model, in place, by a `kdq.layers.MultiheadAttention`, which computes
    the same from linear layers.

    nn.MultiheadAttention holds its input projections as parameters and reads the weight of its `out_proj`, so that
    `quantize_`, `prepare_qat_`, `search_precision` and all others leave it in float: a third of the weights of an
    nn.TransformerEncoder. Call this first, on the float model, and on the teacher too where layers of both are
    compared or copied; make the optimizer after it.

        kdq.open_attention_(model)
        kdq.quantize_(model, kdq.Int8Dynamic())  # takes self_attn.q_proj, k_proj, v_proj and out_proj as well

    The model computes the same to float rounding, and still loads state dicts of what it was; `load` opens a model by
    itself as its file says. torch's transformer layers run layer by layer from now on, without their fused path and
    its nested tensors of padded batches. Left are subclasses, modules with hooks or parametrizations, and those with
    add_bias_kv or add_zero_attn. Code outside that reads `in_proj_weight` of the module will not find it.

    Args:
        filter_fn: `filter_fn(module, name)`; only attention for which it is true is replaced.

    Returns:
        What was replaced by which layers, and what was left and why: every nn.MultiheadAttention.

    Raises:
        ValueError: the model itself is an nn.MultiheadAttention, or wrapped by DDP or FSDP2, or filter_fn is true at
            some of the names of one module alone. The model is as it was.
    """
    check_plain(model)
    places = attention_of(model)
    tied = _tied(model)
    left: dict[str, str] = {}
    for name, module in places.items():
        reason = why_not_open(module)
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn is false"
        if reason is None and tied & {id(module.in_proj_weight), id(module.in_proj_bias)}:
            reason = "another module shares its in_proj_weight or in_proj_bias, which would be split"
        if reason is not None:
            left[name] = reason
    chosen = [name for name in places if name not in left]
    _check_places(places, chosen)
    replace_attention_(model, chosen)
    run_layers_of_transformers(model)
    return ToolReport({name: _what(model.get_submodule(name)) for name in chosen}, left)


def attention_of(model: nn.Module) -> dict[str, Any]:
    """Every nn.MultiheadAttention, subclasses included, under each of its names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, nn.MultiheadAttention)}


def why_not_open(module: Any) -> str | None:
    """The reason why an nn.MultiheadAttention is left; None if it can be opened."""
    if any(parametrize.is_parametrized(part) for part in (module, module.out_proj)):
        return "a parameter of it is parametrized; remove the parametrization first"
    if any(has_own_code(part) or part._state_dict_hooks for part in (module, module.out_proj)):
        return "it has hooks or a forward of its own, which the new module would lack; remove them first"
    if set(module._modules) != {"out_proj"} or module._buffers or not set(module._parameters) <= PARAMETERS:
        return "it has layers, parameters or buffers beside those of nn.MultiheadAttention, which would be lost"
    return why_not_attention(module)


def replace_attention_(model: nn.Module, names: Iterable[str]) -> None:
    """Builds what takes the place of each named module, then puts all in. One under several names is built once."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    built = {id(module): MultiheadAttention(module) for module in modules.values()}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, built[id(module)])


def _tied(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules have."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {parameter for parameter, count in owners.items() if count > 1}


def _check_places(places: Mapping[str, nn.Module], chosen: Iterable[str]) -> None:
    """Raises ValueError if the model itself is chosen, or a module at some of its names alone, which is by filter_fn:
    all other reasons are the module's own."""
    if "" in chosen:
        raise ValueError(
            "model: the model itself is an nn.MultiheadAttention, which cannot be replaced in place; make a "
            "kdq.layers.MultiheadAttention of it"
        )
    ids = {id(places[name]): name for name in chosen}
    for name, module in places.items():
        if name not in chosen and id(module) in ids:
            raise ValueError(
                f"filter_fn: {ids[id(module)]!r} and {name!r} are one module, but it is true of the first alone"
            )


def _what(module: nn.Module) -> str:
    layers = [f"{name} ({m.in_features} -> {m.out_features})" for name, m in module.named_children()]
    return f"linear layers {', '.join(layers)}"
