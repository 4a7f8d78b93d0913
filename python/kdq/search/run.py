"""search_precision: measure what each layer's precision costs and what it saves, and choose the best plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from kdq.configs import Binary, Config, Int8Dynamic, LowBit, normalize
from kdq.layers.switchable import SwitchableLinear
from kdq.observe import Batch, evaluating, parse_batch
from kdq.reporting import ROUNDS
from kdq.search.budget import Budget
from kdq.search.cost import (
    circumstances,
    input_rows,
    keep_timing,
    kept_timing,
    layer_bytes,
    measure,
    tensor_bytes,
    weight_bits,
    whole_ms,
)
from kdq.search.plan import Option, Plan, PlannedLayer
from kdq.search.precision import BuiltLayers, Precision, SwitchableLayers, all_at, unfused
from kdq.search.sensitivity import SENSITIVITIES, Distance, Sensitivity, Table, finite, increases, weight_noise
from kdq.switch import float_copy, precisions

CANDIDATES: tuple[Config | None, ...] = (
    Int8Dynamic(),
    LowBit(weight_bits=4, act_bits=8),
    LowBit(weight_bits=2, act_bits=8),
    Binary(),
)


def search_precision(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: Iterable[Any],
    *,
    budget: Budget,
    candidates: Sequence[Config | None] | None = None,
    sensitivity: Sensitivity = "teacher_kl",
    refine: int = 0,
    rounds: int = ROUNDS,
    precision: Precision | None = None,
    times: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Chooses a precision for every linear layer: the least distance to the teacher that the budget allows.

    One layer at a time is set to each candidate while the others stay in float (a switchable student has no float form:
    at its widest precision); the increases of the distance are taken to add up, and an integer programme chooses (as in
    Dong et al.: HAWQ-V2, 2020, with measured increases in place of Hessian traces). At few bits they do not quite add
    up: `refine` measures them again around the plan chosen.

    The student ends as it was. All of the loader's batches are kept in memory. Without a latency budget the result is
    deterministic; times are those of this machine, at this number of threads, on the loader's first batch. With one,
    the whole model is timed at the plan in the end: the plan tells what was predicted and what was measured.

    Args:
        student: a float model, in any mode; measured in eval mode. Or a switchable one, after `prepare_switchable_`
            and training: its layers are measured at the precisions that it has, and its costs are those of the layers
            that it would be converted to.
        teacher: outputs logits of the same shape; may be None unless sensitivity is "teacher_kl".
        loader: batches (tensors, `(inputs, target)` tuples or dicts). They calibrate the activations' scales too.
        budget: what the converted model may cost.
        candidates: configs to choose from; None among them allows a layer to stay in float. Without any, int8, 4, 2
            and 1 bits (`CANDIDATES`), or a switchable student's precisions.
        sensitivity: "teacher_kl": increase of KL(teacher || student); "label_loss": increase of the cross-entropy, both
            in nats a row; "weight_sqnr": noise power of the rounded weight over its power, which sees no data.
        refine: how many times to measure again around the best plan so far, with all other layers at their chosen
            precision, and to solve again; it starts from the uniform plans too. The plan whose measured distance is
            least is kept.
        rounds: of timing; the medians count.
        precision: how to set a layer's precision, for models that can do it by themselves; None builds the layers.
        times: a JSON file for the layers' times, written when they are measured, and read instead if it exists: a
            search that was broken off, or one with another budget, stands on the same ones. Its folder is made. For one
            model and machine: the layers' shapes, the rows that they get, the kernels' instruction set and the number
            of threads are compared.
        progress: whether to show a bar.

    Raises:
        ValueError: the loader is empty, labels are missing, no layer can be quantized, the outputs do not match, a
            distance is NaN or infinite, the times are of other layers, rows, candidates, kernels or threads, or no plan
            meets the budget (the message names the smallest value reachable).
        TypeError: a candidate or a batch is of an unknown kind.
    """
    switchable = precision is None and any(isinstance(module, SwitchableLinear) for module in student.modules())
    if candidates is None:
        candidates = precisions(student) if switchable else CANDIDATES
    if switchable and None in candidates:
        raise ValueError("candidates: a switchable student has no float form; leave None out")
    options = _checked(candidates, sensitivity, refine, rounds)
    batches = list(loader)
    if not batches:
        raise ValueError("loader: expected at least one batch, got none")
    parsed = [parse_batch(batch, student) for batch in batches]
    models = [student] if teacher is None else [student, teacher]
    with evaluating(*models), torch.no_grad(), unfused(student), Progress(disable=not progress, transient=True) as bar:
        distance = None
        if sensitivity != "weight_sqnr":
            distance = Distance(student, teacher, parsed, "kl" if sensitivity == "teacher_kl" else "label")
            finite(distance(), "the student as it is")  # before layers are built: it shows outputs that do not match
        costed = float_copy(student).eval() if switchable else student
        with unfused(costed):
            built = BuiltLayers(costed, batches) if precision is None else precision
            if switchable:
                precision = SwitchableLayers(student)
            file = None if times is None else Path(times)
            search = _Search(costed, built, precision or built, options, budget, sensitivity, parsed[0], rounds, file)
        if distance is None:
            table = weight_noise(costed, built, search.names, options)
            plan = search.plan(table, 0.0, None)
        else:
            task = bar.add_task("sensitivities", total=(refine + 1) * len(search.names) * len(options))
            plan = search.by_distance(distance, refine, lambda: bar.advance(task))
        if budget.latency_ms is None:
            return plan
        with unfused(costed), all_at(built, {layer.names[0]: layer.option.config for layer in plan.layers}):
            return replace(plan, measured_latency_ms=whole_ms(costed, parsed[0], rounds))


def _checked(
    candidates: Sequence[Config | None], sensitivity: str, refine: int, rounds: int
) -> tuple[Config | None, ...]:
    if sensitivity not in SENSITIVITIES:
        raise ValueError(f"sensitivity: expected one of {', '.join(SENSITIVITIES)}, got {sensitivity!r}")
    if not candidates:
        raise ValueError("candidates: expected at least one config, got none")
    if refine < 0 or rounds < 1:
        raise ValueError(f"refine, rounds: expected at least 0 and 1, got {refine} and {rounds}")
    if refine and sensitivity == "weight_sqnr":
        raise ValueError('refine: the noise of weights adds up exactly, "weight_sqnr" leaves nothing to refine')
    return tuple(dict.fromkeys(None if c is None else normalize(c) for c in candidates))


class _Search:
    """What stays the same while plans are tried: layers, costs and budget."""

    def __init__(
        self,
        costed: nn.Module,
        built: Precision,
        precision: Precision,
        candidates: tuple[Config | None, ...],
        budget: Budget,
        sensitivity: Sensitivity,
        batch: Batch,
        rounds: int,
        times: Path | None,
    ) -> None:
        self.precision, self.candidates, self.budget, self.sensitivity = precision, candidates, budget, sensitivity
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.linears = {name: linear for name, linear in built.layers.items() if name in precision.layers}
        for linear in self.linears.values():
            same = tuple(n for n, other in self.linears.items() if other is linear)
            self.aliases[same[0]] = same
        self.names = list(self.aliases)
        with all_at(built, dict.fromkeys(self.names)):
            rows = input_rows(costed, self.names, batch)
        of = circumstances(self.linears, rows)
        if times is not None:
            times.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written shows before it is measured
        timing = None if times is None else kept_timing(times, candidates, of)
        if timing is None:
            timing = measure(costed, built, self.names, candidates, batch, rounds)
            if times is not None:
                keep_timing(times, timing, of)
        self.fixed_ms = timing.fixed
        in_float = sum(len(self.aliases[n]) * layer_bytes(self.linears[n], None) for n in self.names)
        self.fixed_bytes = tensor_bytes(costed) - in_float
        self.layers = [
            PlannedLayer(
                names=self.aliases[name],
                in_features=self.linears[name].in_features,
                out_features=self.linears[name].out_features,
                rows=sum(rows[name]),
                calls=len(rows[name]),
                options=tuple(self._option(name, config, timing.layers[config][name]) for config in candidates),
                chosen=0,
            )
            for name in self.names
        ]

    def _option(self, name: str, config: Config | None, latency_ms: float) -> Option:
        linear = self.linears[name]
        return Option(
            config=config,
            weight_bits=weight_bits(linear, config),
            size_bytes=len(self.aliases[name]) * layer_bytes(linear, config),
            latency_ms=latency_ms,
            sensitivity=0.0,
        )

    def plan(self, table: Table, base: float, measured: float | None) -> Plan:
        """The best plan by the table of sensitivities."""
        layers = [
            replace(layer, options=tuple(replace(o, sensitivity=table[name][o.config]) for o in layer.options))
            for name, layer in zip(self.names, self.layers, strict=True)
        ]
        costed = Plan(
            layers=tuple(layers),
            fixed_bytes=self.fixed_bytes,
            fixed_ms=self.fixed_ms,
            base_distance=base,
            measured_distance=None,
            sensitivity=self.sensitivity,
        )
        return replace(costed.under(self.budget), measured_distance=measured)

    def by_distance(self, distance: Distance, refine: int, step: Callable[[], Any]) -> Plan:
        """Solves with the increases around the float model (a switchable one at its widest precision). Then `refine`
        times around the best plan so far, to which uniform plans within the budget belong: whoever measures must not
        do worse than who does not choose at all."""
        table, base = self._around(dict.fromkeys(self.names, self.precision.base), distance, step)
        best = self._measure(self.plan(table, base, None), distance)
        if refine:
            uniform = [best.replace(dict.fromkeys(self.names, config)) for config in self.candidates]
            best = min([best, *(self._measure(p, distance) for p in uniform if p.meets(self.budget))], key=_measured)
        for _ in range(refine):
            around = {layer.names[0]: layer.option.config for layer in best.layers}
            table, base = self._around(around, distance, step)
            plan = self._measure(self.plan(table, base, None), distance)
            if _measured(plan) >= _measured(best):
                break
            best = plan
        return best

    def _around(
        self, around: Mapping[str, Config | None], distance: Distance, step: Callable[[], Any]
    ) -> tuple[Table, float]:
        """The increases of single layers about a plan, and its distance."""
        with all_at(self.precision, around):
            base = finite(distance(), "the student")
            return increases(distance, self.precision, self.names, self.candidates, around, base, step), base

    def _measure(self, plan: Plan, distance: Distance) -> Plan:
        """The plan with its measured distance."""
        with all_at(self.precision, {layer.names[0]: layer.option.config for layer in plan.layers}):
            return replace(plan, measured_distance=finite(distance(), "the student at the plan's precisions"))


def _measured(plan: Plan) -> float:
    assert plan.measured_distance is not None
    return plan.measured_distance
