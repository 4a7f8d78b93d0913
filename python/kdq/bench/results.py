"""A run's results as JSON, and putting newly measured families in the place of older ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdq.bench.runner import Measurement
from kdq.bench.scaling import Point

SAME = ("device", "cpu", "cpu_features", "isa", "torch", "version", "compiler", "peers")  # what results must share


def as_lines(value: Any, depth: int = 0) -> str:
    """JSON with one record, or one fact about the machine, a line, so that one can read what changed."""
    if isinstance(value, dict) and depth < 2:
        inner = [f"{json.dumps(key)}: {as_lines(item, depth + 1)}" for key, item in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inner = [json.dumps(record, separators=(",", ":")) for record in value]
        opening, closing = "[", "]"
    else:
        return json.dumps(value)
    indent = "\n" + " " * depth
    return opening + ",".join(f"{indent} {line}" for line in inner) + indent + closing


@dataclass(frozen=True)
class Results:
    """Everything that a run of `kdq bench` found."""

    machine: dict[str, Any]
    measurements: Sequence[Measurement]
    scaling: Sequence[Point]

    def save(self, path: Path) -> None:
        content = {"machine": self.machine, "measurements": [m.to_dict() for m in self.measurements]}
        content["scaling"] = [p.to_dict() for p in self.scaling]
        path.write_text(as_lines(content) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """The inverse of `save`. Files from before there were others are of a CPU."""
        content = json.loads(path.read_text())
        machine = {"device": "cpu", "failures": [], **content["machine"]}
        measurements = [Measurement(**m) for m in content["measurements"]]
        return cls(machine, measurements, [Point(**p) for p in content["scaling"]])

    def updated(self, newer: Results) -> Results:
        """These results, with each family and number of threads that the newer ones have taken from them.

        Raises:
            ValueError: they are from another machine, or another version of something.
        """
        for key in SAME:
            if self.machine[key] != newer.machine[key]:
                raise ValueError(
                    f"update: the file's {key} is {self.machine[key]!r}, this run's {newer.machine[key]!r}"
                )
        taken = {(m.family, m.threads) for m in newer.measurements}
        merged: list[Measurement] = []
        for m in self.measurements:
            if (m.family, m.threads) not in taken:
                merged.append(m)
            elif not any((n.family, n.threads) == (m.family, m.threads) for n in merged):
                merged += [n for n in newer.measurements if (n.family, n.threads) == (m.family, m.threads)]
        limits = [p for p in self.machine["limits"] if (p["family"], p["threads"]) not in taken]
        again = {family for family, _ in taken} | {f["family"] for f in newer.machine["failures"]}
        failures = [f for f in self.machine["failures"] if f["family"] not in again]
        machine = {
            **newer.machine,
            "limits": [*limits, *newer.machine["limits"]],
            "failures": [*failures, *newer.machine["failures"]],
        }
        return replace(self, machine=machine, measurements=merged, scaling=newer.scaling or self.scaling)
