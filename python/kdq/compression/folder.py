"""What a run has on disk: a record of each finished phase, checkpoints of the one under way, all written atomically.

A phase is known by its name and by a fingerprint of everything that its result follows from, the fingerprints of the
phases before it among it. Whoever runs again with the same inputs finds the phase done; with a changed budget, say, the
phases that do not depend on it are still done, and the later ones are run anew.

Files of a phase have its fingerprint in their names. Where it comes with another one, what a finished phase left is
deleted. What a phase left that did not end stays, and counts again when its fingerprint comes back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdq.checkpoint import write_atomically

RECORD = "run.json"
SUFFIXES = (".pt", ".json")


def fingerprint(**inputs: Any) -> str:
    """A hash of JSON-like values; the same for the same values in any process."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


class RunFolder:
    """The folder of a run.

    Raises:
        ValueError: the folder has files, but no record of a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.record: dict[str, Any] = {}
        if (path / RECORD).exists():
            try:
                self.record = json.loads((path / RECORD).read_text())
            except ValueError as error:
                raise ValueError(f"folder: {path / RECORD} is not a record of a run: {error}") from error
        elif any(file.name != f"{RECORD}.partial" for file in path.iterdir()):
            raise ValueError(f"folder: {path} has files, but none of an earlier run; choose an empty or a new one")
        else:
            self._save_record()

    def is_done(self, phase: str, print_: str) -> bool:
        """Whether the phase was finished with this fingerprint. If it was with another, that is forgotten."""
        found = self.record.get(phase)
        if found is None or found["fingerprint"] == print_:
            return found is not None and bool(found["done"])
        left = [self.file(phase, suffix) for suffix in SUFFIXES] if found["done"] else []
        self.record.pop(phase)
        self._save_record()
        for file in left:
            file.unlink(missing_ok=True)
        return False

    def result(self, phase: str) -> dict[str, Any]:
        """What `finish` was given."""
        return self.record[phase]["result"]

    def finish(self, phase: str, print_: str, result: Mapping[str, Any] | None = None) -> None:
        """Records the phase as done, with a result that JSON can hold."""
        self.record[phase] = {"fingerprint": print_, "done": True, "result": dict(result or {})}
        self._save_record()

    def file(self, phase: str, suffix: str) -> Path:
        """Of a phase that has begun."""
        assert suffix in SUFFIXES
        return self.path / f"{phase}-{self.record[phase]['fingerprint'][:8]}{suffix}"

    def state_file(self, phase: str) -> Path:
        return self.file(phase, ".pt")

    def save_state(self, phase: str, state: Mapping[str, Any]) -> None:
        """Tensors, numbers and containers of them: a model's state dict, an optimizer's."""
        write_atomically(self.state_file(phase), lambda path: torch.save(dict(state), path))

    def load_state(self, phase: str) -> dict[str, Any] | None:
        """None where there is none. Nothing is unpickled but tensors and plain containers.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.state_file(phase)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # torch.load raises what its zip reader, unpickler and storage do
            raise ValueError(
                f"folder: the checkpoint {path} is damaged; delete it to redo the phase: {error}"
            ) from error
        return state

    def begin(self, phase: str, print_: str) -> None:
        """Records that the phase is under way with this fingerprint, so that its checkpoints count for it only."""
        self.record[phase] = {"fingerprint": print_, "done": False, "result": {}}
        self._save_record()

    def _save_record(self) -> None:
        text = json.dumps(self.record, indent=1) + "\n"
        write_atomically(self.path / RECORD, lambda path: path.write_text(text))
