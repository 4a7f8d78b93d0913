"""transfer_: a student's layers start from a teacher's, to be finetuned or frozen.

    prepare_qat_(student, LowBit(weight_bits=4, act_bits=4))
    transfer_(teacher, student, 3, freeze=True)  # the first three layers; or {"stem": "stem", "block1": "layer1"}

Names are paired first, then every copy is planned and checked, and only then is the student touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdq.freeze import freeze_, freeze_own
from kdq.layers.base import InferenceProduct
from kdq.layers.qat import QATConv2d, QATLinear, QATProduct
from kdq.layers.switchable import SwitchableLinear, SwitchableNorm
from kdq.observe import find_layer
from kdq.ptq.tool_report import ToolReport
from kdq.quantize import training_twin

WHOLE = (QATProduct, SwitchableNorm, InferenceProduct)  # what they hold inside has no meaning alone


def transfer_(
    teacher: nn.Module, student: nn.Module, layers: Mapping[str, str] | int, *, freeze: bool = False
) -> ToolReport:
    """Copies layers of a teacher into a student, in place and all or nothing.

    Yosinski, Clune, Bengio, Lipson: How transferable are features in deep neural networks?, 2014: their AnB is
    `transfer_(a, student, n, freeze=True)`, and AnB+ is the same without freeze.

    Parameters and statistics are copied into the student's own tensors, so that an optimizer made before still holds
    them; batch norms go along with all that they have measured. Of a training twin (after `prepare_qat_`, or
    `prepare_switchable_`) the float weight and bias are copied. If the teacher's layer is such a twin too, at the same
    precision, so are its learned scales, and both compute the same. Otherwise the weight's scales are fitted to the new
    weight, and those of the activations start from the next batch. The teacher stays as it is.

    Args:
        teacher: in float or with training twins.
        student: the same, before `convert_`.
        layers: {"student layer": "teacher layer"}, names as in `named_modules()`. A name may stand for a block: what
            the two blocks hold under the same names is copied. Or a number n: the first n layers with weights of 2 axes
            or more (linear, convolution, embedding), in the order of `named_modules()`, with the norms between and in
            front of them; a norm behind the n-th is not among them.
        freeze: what was copied does not train from now on, learned scales and statistics included (see `freeze_`).

    Returns:
        What of the student was changed, and what was left and why: every module that holds weights.

    Raises:
        TypeError: layers is neither a mapping nor an integer.
        ValueError: there is no such layer; a layer that was named itself, or is among the first n, does not fit by kind
            or shape, has weights that are not finite or shares them with one that is left, or is on kernels already; or
            nothing in a block fits. The student is as it was.
    """
    if isinstance(layers, Mapping):
        pairs, left = _named(teacher, student, layers)
    elif isinstance(layers, int) and not isinstance(layers, bool):
        pairs, left = _first(teacher, student, layers)
    else:
        raise TypeError(f'layers: expected {{"student layer": "teacher layer", ...}} or a number, got {layers!r}')
    _check_shared(pairs, student)
    for pair in pairs.values():
        pair.carry_out(freeze)
    frozen = ", frozen" if freeze else ""
    return ToolReport({name: f"from {pair.source}{frozen}" for name, pair in pairs.items()}, left)


@dataclass(frozen=True)
class _Pair:
    """A module of the student and what it gets: values by the names of its parameters and buffers."""

    module: nn.Module
    source: str
    values: dict[str, Tensor]

    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(the student's, the value that it gets)."""
        own = _tensors(self.module)
        return ((own[name], value) for name, value in self.values.items())

    @torch.no_grad()
    def carry_out(self, freeze: bool) -> None:
        for own, value in self.tensors():
            own.copy_(value)
        if freeze and isinstance(self.module, WHOLE):
            freeze_(self.module)
        elif freeze:
            freeze_own(self.module)


# ---- which module gets which -----------------------------------------------------------------------------------------


def _units(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules that hold parameters or buffers themselves, by name; a training twin is one with all it holds."""
    whole = isinstance(module, WHOLE) or parametrize.is_parametrized(module)
    if whole or _tensors(module):
        yield name, module
    if not whole:
        for key, child in module.named_children():
            yield from _units(child, _join(name, key))


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name and inner else name or inner


def _named(
    teacher: nn.Module, student: nn.Module, layers: Mapping[str, str]
) -> tuple[dict[str, _Pair], dict[str, str]]:
    """The pairs of a mapping, and why everything else is left."""
    if not layers:
        raise ValueError('layers: expected {"student layer": "teacher layer", ...}, got an empty mapping')
    pairs: dict[str, _Pair] = {}
    left = {name: "layers does not name it" for name, _ in _units(student)}
    for ours, theirs in layers.items():
        inside, given = _units_of(student, ours, "student"), _units_of(teacher, theirs, "teacher")
        reasons = {}
        for inner, module in inside.items():
            name, source = _join(ours, inner), _join(theirs, inner)
            if name in pairs:
                raise ValueError(f"layers: student layer {name!r} would get two of the teacher's")
            try:
                pairs[name] = _pair(module, given.get(inner), source)
                del left[name]
            except ValueError as error:
                if inner == "":
                    raise ValueError(f"{ours!r} from {theirs!r}: {error}") from error
                left[name] = reasons[name] = str(error)
        if len(reasons) == len(inside):
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it holds no weights"
            raise ValueError(f"{ours!r} from {theirs!r}: nothing to transfer: {why}")
    return pairs, left


def _units_of(model: nn.Module, name: str, role: str) -> dict[str, nn.Module]:
    return dict(_units(find_layer(model, name, role)))


def _first(teacher: nn.Module, student: nn.Module, count: int) -> tuple[dict[str, _Pair], dict[str, str]]:
    """The pairs up to the layer of that number, and why everything behind it is left."""
    ours, theirs = _up_to(student, count, "student"), _up_to(teacher, count, "teacher")
    if len(ours) != len(theirs):
        raise ValueError(
            f"layers: the first {count} with what is between them are {', '.join(map(repr, ours))} in the student and "
            f"{', '.join(map(repr, theirs))} in the teacher: name the pairs instead"
        )
    pairs = {}
    for (name, module), (source, other) in zip(ours.items(), theirs.items(), strict=True):
        try:
            pairs[name] = _pair(module, other, source)
        except ValueError as error:
            raise ValueError(f"{name!r} from {source!r}: {error}") from error
    left = {name: f"behind the first {count} layers" for name, _ in _units(student) if name not in pairs}
    return pairs, left


def _up_to(model: nn.Module, count: int, role: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    layers = 0
    for name, module in _units(model):
        found[name] = module
        layers += isinstance(module, InferenceProduct) or any(p.dim() >= 2 for p in _tensors(module).values())
        if layers == count > 0:
            return found
    raise ValueError(f"layers: expected a number from 1 to {layers}, as the {role} has layers, got {count}")


# ---- what a module gets ----------------------------------------------------------------------------------------------


def _pair(ours: nn.Module, theirs: nn.Module | None, source: str) -> _Pair:
    """The copy of one module, checked.

    Raises:
        ValueError: the two do not fit.
    """
    if theirs is None:
        raise ValueError(f"the teacher has no weights at {source!r}")
    for role, module in (("student", ours), ("teacher", theirs)):
        if isinstance(module, InferenceProduct):
            raise ValueError(f"the {role}'s {type(module).__name__} is on kernels already; transfer before convert_")
        if parametrize.is_parametrized(module):
            raise ValueError(f"the {role}'s is parametrized; remove the parametrization first")
    given, note = _given(ours, theirs)
    own = _tensors(ours)
    for name in {**own, **given}:
        shapes = [list(t[name].shape) if name in t else "none" for t in (own, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the student and {shapes[1]} in the teacher")
    values = {name: given[name].detach().to(own[name].device, own[name].dtype, copy=True) for name in own}
    for name, value in values.items():
        if isinstance(own[name], nn.Parameter) and not torch.isfinite(value).all():
            raise ValueError(f"the teacher's {name} contains NaN or inf in the student's {value.dtype}")
    return _Pair(ours, f"{source!r}{note}", values)


def _given(ours: nn.Module, theirs: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The teacher's tensors by their names in the student's module, and a note for the report."""
    kinds = (nn.Linear, QATLinear), (nn.Conv2d, QATConv2d)
    if any(isinstance(ours, kind) and isinstance(theirs, kind) for kind in kinds):
        if not isinstance(ours, QATProduct):
            return {name: t for name, t in _tensors(theirs).items() if name in ("weight", "bias")}, ""
        if _kind(ours) == _kind(theirs):
            return _tensors(theirs), " with its scales"
        return _fitted(ours, theirs), ", scales fitted anew"
    if isinstance(ours, SwitchableNorm) and type(theirs) is type(ours.variant()):
        return _tensors(SwitchableNorm(theirs, ours.precisions)), " for every precision"
    if _kind(ours) != _kind(theirs):
        raise ValueError(f"it is {type(ours).__name__} in the student and {type(theirs).__name__} in the teacher")
    return _tensors(theirs), ""


def _kind(module: Any) -> tuple[Any, ...]:
    """Equal for modules whose tensors mean the same."""
    if isinstance(module, SwitchableLinear | SwitchableNorm):
        return type(module), module.precisions
    return type(module), module.config if isinstance(module, QATProduct) else None


def _fitted(ours: Any, theirs: Any) -> dict[str, Tensor]:
    """The tensors of a twin like ours that starts from their weight and bias."""
    layer: Any = ours.geometry_type.of(theirs).float_layer(bias=theirs.bias is not None, device="meta")
    layer.weight = nn.Parameter(theirs.weight.detach().to(ours.weight.device, ours.weight.dtype))
    if theirs.bias is not None:
        layer.bias = nn.Parameter(theirs.bias.detach())
    if isinstance(ours, SwitchableLinear):
        return _tensors(SwitchableLinear(layer, {config: training_twin(layer, config) for config in ours.precisions}))
    return _tensors(training_twin(layer, ours.config))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and those buffers that are saved; of a module inside which others count for themselves, its own."""
    inside = isinstance(module, WHOLE)
    buffers = {n: b for n, b in module.named_buffers(recurse=inside) if n not in module._non_persistent_buffers_set}
    return {**dict(module.named_parameters(recurse=inside)), **buffers}


def _check_shared(pairs: Mapping[str, _Pair], student: nn.Module) -> None:
    """Raises ValueError where a tensor would get two values, or one that a layer which is left would get with it."""
    values: dict[int, tuple[str, Tensor]] = {}
    for name, pair in pairs.items():
        for own, value in pair.tensors():
            other, before = values.setdefault(id(own), (name, value))
            if not torch.equal(before, value):
                raise ValueError(f"layers: {name!r} and {other!r} share a tensor and would get two different ones")
    for name, module in _units(student):
        shared = [values[id(t)][0] for t in _tensors(module).values() if id(t) in values]
        if name not in pairs and shared:
            raise ValueError(f"layers: {name!r} is left, but shares a tensor with {shared[0]!r}; name both or neither")
