"""Setting one layer of a model to one precision for a while: what measuring sensitivities and latencies stands on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, cast

from torch import nn

from kdq.calibrate import observe_inputs
from kdq.configs import Config
from kdq.layers.base import InferenceLayer
from kdq.layers.switchable import SwitchableLinear
from kdq.observers import DEFAULT_OBSERVER, ObserverState
from kdq.quantize import inference_layer, quantizable_layers
from kdq.switch import keeping_precision, precisions, set_precision_


class Precision(Protocol):
    """What the search needs of a model: its layers, and a way to set one to a precision and back.

    A model whose layers can switch by themselves (`set_precision_`) implements it without building layers anew.
    """

    layers: Mapping[str, nn.Linear]
    """name -> the float layer (its shape, dtype and weight). A shared one is there under each name."""

    base: Config | None
    """What all other layers compute at when one of them is measured first; None is float."""

    def at(self, name: str, config: Config | None) -> AbstractContextManager[Any]:
        """Inside, the layer computes as `config` says (None: in float); on exit it is as it was on entry. They nest."""
        ...


class BuiltLayers:
    """`Precision` of a float model: layers are built as `quantize_` builds them, once each, and put in and out.

    Raises:
        ValueError: no layer of the model can be quantized, or as `quantize_` does.
    """

    def __init__(self, model: nn.Module, batches: list[Any]) -> None:
        self.model = model
        self.base: Config | None = None
        self.layers: Mapping[str, nn.Linear] = quantizable_layers(model)
        if not self.layers:
            raise ValueError("student: it has no linear layer that quantize_ would replace (its report says why)")
        self.observers: dict[str, ObserverState] = observe_inputs(model, self.layers, batches, DEFAULT_OBSERVER)
        self.built: dict[tuple[int, Config], InferenceLayer] = {}

    @contextmanager
    def at(self, name: str, config: Config | None) -> Iterator[None]:
        new = self.layers[name] if config is None else self._layer(name, config)
        places = [self._place(n) for n, module in self.layers.items() if module is self.layers[name]]
        before = [getattr(parent, child) for parent, child in places]
        try:
            for parent, child in places:
                setattr(parent, child, new)
            yield
        finally:
            for (parent, child), old in zip(places, before, strict=True):
                setattr(parent, child, old)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        parent, _, child = name.rpartition(".")
        return self.model.get_submodule(parent), child

    def _layer(self, name: str, config: Config) -> InferenceLayer:
        linear = self.layers[name]
        key = (id(linear), config)
        if key not in self.built:
            try:
                self.built[key] = inference_layer(linear, config, self.observers[name]).eval()
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"{name}: {error}") from error
        return self.built[key]


class SwitchableLayers:
    """`Precision` of a model after `prepare_switchable_`: nothing is built, its own precisions are set.

    It cannot compute in float: layers are measured among others at the widest precision.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base: Config | None = precisions(model)[0]
        modules = model.named_modules(remove_duplicate=False)
        # They have what the search asks of an nn.Linear: the sides, weight and bias.
        self.layers = cast("Mapping[str, nn.Linear]", {n: m for n, m in modules if isinstance(m, SwitchableLinear)})

    @contextmanager
    def at(self, name: str, config: Config | None) -> Iterator[None]:
        assert config is not None  # search_precision refuses it as a candidate
        with keeping_precision(self.model):
            set_precision_(self.model, {name: config})
            yield


@contextmanager
def all_at(precision: Precision, configs: Mapping[str, Config | None]) -> Iterator[None]:
    """Several layers at once."""
    with ExitStack() as stack:
        for name, config in configs.items():
            stack.enter_context(precision.at(name, config))
        yield


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """nn.TransformerEncoderLayer calls its linear layers inside, as it does once `quantize_` has replaced them."""
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    flags = [layer.activation_relu_or_gelu for layer in layers]
    try:
        for layer in layers:
            layer.activation_relu_or_gelu = 0
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer.activation_relu_or_gelu = flag
