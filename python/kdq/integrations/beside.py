"""What the loops of other libraries share: checks of a distiller, and the state of what trains beside its student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdq.checkpoint import generators_of
from kdq.distill import Distiller


def check_trainable(distiller: Distiller) -> None:
    """Raises ValueError if the teacher trains, RuntimeError if the adapters do not exist yet."""
    if distiller.train_teacher:
        raise ValueError(
            "distiller: the loop of another library trains and saves one model and keeps the teacher as it is; "
            "train_teacher needs Distiller.fit"
        )
    list(distiller.parameters())


def state_beside_student(distiller: Distiller) -> dict[str, Any]:
    """Adapters, losses that are modules, and random generators, for a checkpoint that has the student elsewhere."""
    own = distiller.state_dict()
    own.pop("student")
    return {"own": own, "generators": [generator.get_state() for generator in generators_of(distiller)]}


def load_state_beside_student(distiller: Distiller, state: Mapping[str, Any]) -> None:
    """The inverse.

    Raises:
        RuntimeError: the state is of a distiller with other adapters, losses or generators.
    """
    generators = list(generators_of(distiller))
    if len(generators) != len(state["generators"]):
        raise RuntimeError(f"state: expected {len(generators)} random generators, got {len(state['generators'])}")
    distiller.load_state_dict({"student": distiller.student.state_dict(), **state["own"]})
    for generator, own in zip(generators, state["generators"], strict=True):
        generator.set_state(own)
