"""Checkpoints of a training: all that its rest depends on, in one file; a killed training ends as it would have.

Ranks that train together have one file, which rank 0 writes and all read; it does not depend on their number, but that
the random numbers of a rank go on only if there are as many.

A training's parts (models, optimizer, random numbers ...) have `state_dict` and `load_state_dict`; a `Checkpoint`
writes them together and puts them back.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim import Optimizer

from kdq.distributed import distribute_as, to_save
from kdq.ranks import gather_objects, is_main, own_of


class Stateful(Protocol):
    """What a checkpoint holds. States are tensors, numbers, strings and containers of them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Checkpoint:
    """The parts of one training in a file.

    Args:
        path: of the file.
        about: what makes the training this one, in JSON's types; a file of another one is refused.
        parts: by name; they are put back in this order.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
        self.path = Path(path)
        self.about = dict(about)
        self.parts = parts

    def exists(self) -> bool:
        """Raises ValueError if some ranks see the file and others do not."""
        found = set(gather_objects(self.path.exists()))
        if len(found) > 1:
            raise ValueError(f"checkpoint: some ranks see {self.path}, others do not; choose a path on a shared disk")
        return found.pop()

    def save(self) -> None:
        """Writes the file anew. Whoever is killed meanwhile leaves the one before."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if not is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda path: torch.save({"about": self.about, "parts": states}, path))

    def load(self) -> None:
        """Puts every part back. Nothing is unpickled but tensors and plain containers.

        Raises:
            ValueError: the file is damaged, or of another training; nothing was put back.
            RuntimeError: a state does not fit its part.
        """
        saved = self._read()
        for name, ours in self.about.items():
            if saved["about"].get(name) != ours:
                raise ValueError(
                    f"checkpoint: {self.path} is of a training with {name} = {saved['about'].get(name)!r}, this one "
                    f"has {ours!r}; choose another path, or delete the file to begin anew"
                )
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        torch.clear_autocast_cache()  # an autocast around it all would go on with the weights of before

    def _read(self) -> dict[str, Any]:
        try:
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises what its zip reader, unpickler and storage do
            raise ValueError(f"checkpoint: {self.path} is damaged; delete it to begin anew: {error}") from error
        if (
            not isinstance(saved, dict)
            or saved.keys() != {"about", "parts"}
            or saved["parts"].keys() != self.parts.keys()
        ):
            raise ValueError(f"checkpoint: {self.path} is not a checkpoint of such a training; choose another path")
        return saved


class OfEachRank:
    """A part that is different on every rank. Where there are more ranks than when it was saved, states come again."""

    def __init__(self, part: Stateful) -> None:
        self.part = part

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": gather_objects(self.part.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.part.load_state_dict(own_of(state["ranks"]))


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """An optimizer's state by the names (by id) of its parameters, whole where they are sharded: it fits an optimizer
    of the same parameters however they are sharded and grouped."""
    packed = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    groups = [{**group, "params": [order[i] for i in group["params"]]} for group in packed["param_groups"]]
    return {"state": {order[i]: to_save(state) for i, state in packed["state"].items()}, "param_groups": groups}


def load_optimizer_state(optimizer: Optimizer, names: Mapping[int, str], state: Mapping[str, Any]) -> None:
    """The inverse of `optimizer_state`.

    Raises:
        RuntimeError: the state is of an optimizer of other parameters.
    """
    saved = {name: group for group in state["param_groups"] for name in group["params"]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [names[id(p)] for p in parameters]
    if sorted(order) != sorted(saved):
        raise RuntimeError("state: the optimizer that it is of had other parameters")
    packed = optimizer.state_dict()
    groups = [{**saved[order[group["params"][0]]], "params": group["params"]} for group in packed["param_groups"]]
    each = {
        i: {key: distribute_as(parameters[i], value) for key, value in state["state"][name].items()}
        for i, name in enumerate(order)
        if name in state["state"]
    }
    optimizer.load_state_dict({"state": each, "param_groups": groups})


class RandomState:
    """The random numbers to come: torch's (of the CPU and of all CUDA devices), NumPy's, `random`'s, and those of the
    `generator` attributes of some objects and of loaders' samplers, which decide about the order."""

    def __init__(self, *owners: object) -> None:
        self.owners = owners

    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002 users' transforms use it
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "numpy": (name, np.asarray(keys).tolist(), *rest),
            "random": random.getstate(),
            "generators": [generator.get_state() for generator in generators_of(*self.owners)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises:
        RuntimeError: there were other generators.
        """
        generators = list(generators_of(*self.owners))
        if len(generators) != len(state["generators"]):
            raise RuntimeError(
                f"the loaders had {len(state['generators'])} generators when the checkpoint was written, now they have "
                f"{len(generators)}"
            )
        for generator, own in zip(generators, state["generators"], strict=True):
            generator.set_state(own)
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        random.setstate(state["random"])


def generators_of(*owners: object) -> Iterator[torch.Generator]:
    """The `generator` attributes of the owners and, if they are loaders, of their samplers."""
    for owner in owners:
        batch_sampler = getattr(owner, "batch_sampler", None)
        for holder in (owner, getattr(owner, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                yield generator


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Whoever is killed meanwhile leaves the file as it was, or whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def description(value: object) -> str:
    """Its repr without addresses: the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
