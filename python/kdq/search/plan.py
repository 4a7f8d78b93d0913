"""Plan: which precision each layer gets, with the measured table it was chosen from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdq.configs import Config, LayerConfigs, config_from_json, config_to_json, normalize, short_name
from kdq.search.budget import Budget
from kdq.search.solve import Limit, solve

FORMAT_VERSION = 1


def precision_name(config: Config | None) -> str:
    """A config as people read it; None is "float"."""
    return "float" if config is None else str(config)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One precision of one layer and what it costs. config None: the layer stays in float.

    `latency_ms` is the time of all the layer's calls in a forward pass; `sensitivity` the increase of the distance.
    """

    config: Config | None
    weight_bits: int
    size_bytes: int
    latency_ms: float
    sensitivity: float


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """A layer: what it is, what was costed, and which of the options the plan takes.

    `names` has more than one entry where a module is shared: it is quantized once and saved under each name.
    """

    names: tuple[str, ...]
    in_features: int
    out_features: int
    rows: int  # of all its inputs in one forward pass
    calls: int
    options: tuple[Option, ...]
    chosen: int

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names: expected at least one, got none")
        if not 0 <= self.chosen < len(self.options):
            raise ValueError(f"chosen: expected an option from 0 to {len(self.options) - 1}, got {self.chosen}")

    @property
    def option(self) -> Option:
        return self.options[self.chosen]

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    def with_config(self, config: Config | None) -> PlannedLayer:
        """The same layer at another costed precision."""
        config = None if config is None else normalize(config)
        for index, option in enumerate(self.options):
            if option.config == config:
                return replace(self, chosen=index)
        raise ValueError(
            f"{self.names[0]!r}: {precision_name(config)} was not costed; "
            f"the plan knows {', '.join(precision_name(o.config) for o in self.options)}"
        )


@dataclass(frozen=True, kw_only=True)
class Plan(LayerConfigs):
    """A mapping of exact layer names to configs, for `quantize_`, `prepare_qat_` and `convert_`.

    Layers that stay in float are in `layers` with config None, and not in the mapping, so that these functions leave
    them. Distances are in the measure that `sensitivity` names: nats a row for "teacher_kl" and "label_loss", the sum
    of the layers' relative weight noise for "weight_sqnr".

    `base_distance` plus the sensitivities of the options taken is the predicted `distance`; `measured_distance` is that
    of the whole quantized model. `latency_ms` is predicted likewise, and `measured_latency_ms` the time of the whole
    model. None where they were not measured: after `replace` and `under`, times also without a budget of them.
    """

    layers: tuple[PlannedLayer, ...]
    fixed_bytes: int
    fixed_ms: float
    base_distance: float
    measured_distance: float | None
    sensitivity: str
    budget: Budget | None = None
    measured_latency_ms: float | None = None

    def __getitem__(self, name: str) -> Config:
        for layer in self.layers:
            if name in layer.names and layer.option.config is not None:
                return layer.option.config
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for layer in self.layers if layer.option.config is not None for name in layer.names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def size_bytes(self) -> int:
        """Bytes of the converted model's tensors, as `kdq.save` writes them; the file's header comes on top."""
        return self.fixed_bytes + sum(layer.option.size_bytes for layer in self.layers)

    @property
    def latency_ms(self) -> float:
        """Predicted milliseconds of a forward pass on the loader's first batch."""
        return self.fixed_ms + math.fsum(layer.option.latency_ms for layer in self.layers)

    @property
    def average_bits(self) -> float:
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.option.weight_bits * layer.weights for layer in self.layers) / weights

    @property
    def distance(self) -> float:
        """The distance that the sum of single-layer increases predicts."""
        return self.base_distance + math.fsum(layer.option.sensitivity for layer in self.layers)

    def replace(self, configs: Mapping[str, Config | None]) -> Plan:
        """The plan with other precisions for some layers (None: float); totals follow from the stored table. The
        budget is no longer enforced.

        Raises:
            ValueError: a layer is unknown, or a precision was not costed.
        """
        known = {name: i for i, layer in enumerate(self.layers) for name in layer.names}
        layers = list(self.layers)
        for name, config in configs.items():
            if name not in known:
                raise ValueError(f"plan: no layer {name!r}; it has {', '.join(map(repr, list(known)[:8]))}")
            layers[known[name]] = layers[known[name]].with_config(config)
        return replace(self, layers=tuple(layers), measured_distance=None, measured_latency_ms=None)

    def under(self, budget: Budget) -> Plan:
        """The plan of least predicted distance under another budget, from the stored table: nothing is measured anew.

        Raises:
            ValueError: no choice meets the budget; the message names the smallest value that can be reached.
        """
        choice = solve(
            [[o.sensitivity for o in layer.options] for layer in self.layers],
            [[o.size_bytes for o in layer.options] for layer in self.layers],
            self._limits(budget),
        )
        layers = tuple(replace(layer, chosen=index) for layer, index in zip(self.layers, choice, strict=True))
        return replace(self, layers=layers, measured_distance=None, measured_latency_ms=None, budget=budget)

    def meets(self, budget: Budget) -> bool:
        """Whether the predicted costs are within the budget."""
        choice = [layer.chosen for layer in self.layers]
        return all(limit.total(choice) <= limit.bound + limit.slack for limit in self._limits(budget))

    def _limits(self, budget: Budget) -> list[Limit]:
        limits = []
        if budget.latency_ms is not None:
            times = [[o.latency_ms for o in layer.options] for layer in self.layers]
            limits.append(Limit("latency_ms", times, budget.latency_ms, self.fixed_ms))
        if budget.size_bytes is not None:
            sizes = [[o.size_bytes for o in layer.options] for layer in self.layers]
            limits.append(Limit("size_bytes", sizes, budget.size_bytes, self.fixed_bytes))
        if budget.average_bits is not None:
            weights = sum(layer.weights for layer in self.layers)
            bits = [[o.weight_bits * layer.weights / weights for o in layer.options] for layer in self.layers]
            limits.append(Limit("average_bits", bits, budget.average_bits))
        return limits

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps; `from_json` gives an equal plan."""
        data = asdict(self)
        for layer, described in zip(self.layers, data["layers"], strict=True):
            for option, cell in zip(layer.options, described["options"], strict=True):
                cell["config"] = None if option.config is None else config_to_json(option.config)
        return {"version": FORMAT_VERSION, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is missing, unknown or not valid.
        """
        try:
            fields = dict(data)
            version = fields.pop("version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version!r}, this kdq reads {FORMAT_VERSION}")
            fields["layers"] = tuple(_layer_from_json(layer) for layer in fields["layers"])
            fields["budget"] = None if fields["budget"] is None else Budget(**fields["budget"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"plan: not valid: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads what `save` wrote, or somebody edited.

        Raises:
            ValueError: it is not a plan.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def __rich__(self) -> Table:
        measured = "" if self.measured_distance is None else f", measured {self.measured_distance:.4g}"
        table = Table("layer", "in", "out", "rows", "calls", "precision", "bytes", "ms", "sensitivity")
        table.title = (
            f"{self.sensitivity}: {self.distance:.4g} predicted{measured}; {self.average_bits:.2f} bits a weight"
        )
        for layer in self.layers:
            option = layer.option
            shape = (layer.in_features, layer.out_features, layer.rows, layer.calls)
            costs = (f"{option.size_bytes:,}", f"{option.latency_ms:.4f}", f"{option.sensitivity:.3g}")
            table.add_row(", ".join(layer.names), *map(str, shape), short_name(option.config), *costs)
        table.add_section()
        table.add_row("the rest", "", "", "", "", "", f"{self.fixed_bytes:,}", f"{self.fixed_ms:.4f}", "")
        table.add_row("total", "", "", "", "", "", f"{self.size_bytes:,}", f"{self.latency_ms:.4f}", "", style="bold")
        if self.measured_latency_ms is not None:
            table.add_row("measured", "", "", "", "", "", "", f"{self.measured_latency_ms:.4f}", "")
        return table

    def __str__(self) -> str:
        console = Console(width=130)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _layer_from_json(data: Mapping[str, Any]) -> PlannedLayer:
    def option(cell: Mapping[str, Any]) -> Option:
        config = cell["config"]
        return Option(**{**cell, "config": None if config is None else config_from_json(config)})

    return PlannedLayer(**{**data, "names": tuple(data["names"]), "options": tuple(map(option, data["options"]))})
