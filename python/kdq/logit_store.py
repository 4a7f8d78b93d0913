"""Logits on disk by key, in append-only files: what `kdq.teacher_cache` keeps.

A folder holds `cache.json` (what the records are) and one `*.logits` file for each process that writes. A record is a
header (magic, bytes of the payload, CRC-32 of it, key) and a payload. Nobody waits for anybody: each process appends to
its own file and reads all. A record that a killed process left torn at the end of its file is not read, and nothing is
ever appended behind it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADER = struct.Struct("<4sII16s")
MAGIC = b"KDQ1"
KEY_BYTES = 16
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Place:
    """Where a payload lies."""

    path: Path
    offset: int
    size: int
    crc: int


class LogitStore:
    """Payloads by 16-byte keys in a folder.

    Args:
        folder: made if it is not there.
        facts: what describes all records; a folder made with others is refused.

    Raises:
        ValueError: the folder's facts are others.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.facts = dict(facts)
        self.places: dict[bytes, Place] = {}
        self.read_to: dict[Path, int] = {}
        self.token = secrets.token_hex(6)
        folder.mkdir(parents=True, exist_ok=True)
        self._agree()
        self.refresh()

    def _agree(self) -> None:
        """Writes the facts, or compares them with those of whoever was first."""
        path = self.folder / "cache.json"
        draft = self.folder / f"cache-{self.token}.tmp"
        draft.write_text(json.dumps(self.facts, indent=2) + "\n")
        try:
            os.link(draft, path)  # fails if it is there: one of two that start together is the first
        except FileExistsError:
            found = json.loads(path.read_text())
            for name in self.facts.keys() | found.keys():
                if self.facts.get(name) != found.get(name):
                    raise ValueError(
                        f"folder: {self.folder} was made with another {name}: expected {self.facts.get(name)!r}, "
                        f"got {found.get(name)!r}; take another folder"
                    ) from None
        finally:
            draft.unlink()

    def refresh(self) -> None:
        """Learns of records that were appended since, by this process or another."""
        for path in sorted(self.folder.glob("*.logits")):
            offset, end = self.read_to.get(path, 0), path.stat().st_size
            if end - offset < HEADER.size:
                continue
            with path.open("rb") as file:
                while end - offset >= HEADER.size:
                    file.seek(offset)
                    magic, size, crc, key = HEADER.unpack(file.read(HEADER.size))
                    start = offset + HEADER.size
                    if magic != MAGIC or start + size > end:
                        break  # torn, or still being written
                    self.places[key] = Place(path, start, size, crc)
                    offset = start + size
            self.read_to[path] = offset

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The payloads of those keys that there are. One whose checksum is wrong counts as not there."""
        wanted = set(keys)
        if not wanted <= self.places.keys():
            self.refresh()
        by_file: dict[Path, list[tuple[int, bytes]]] = defaultdict(list)
        for key in wanted & self.places.keys():
            by_file[self.places[key].path].append((self.places[key].offset, key))
        found: dict[bytes, bytes] = {}
        for path, records in by_file.items():
            with path.open("rb") as file:
                for offset, key in sorted(records):
                    file.seek(offset)
                    payload = file.read(self.places[key].size)
                    if zlib.crc32(payload) == self.places[key].crc:
                        found[key] = payload
                    else:
                        del self.places[key]
        return found

    def append(self, records: Mapping[bytes, bytes]) -> None:
        """Adds records to this process's file."""
        path = self.folder / f"{os.getpid()}-{self.token}.logits"  # a forked or pickled copy has another pid
        data = b"".join(
            HEADER.pack(MAGIC, len(payload), zlib.crc32(payload), key) + payload for key, payload in records.items()
        )
        try:
            with path.open("ab") as file:
                file.write(data)
        except OSError:
            self.token = secrets.token_hex(6)  # a record may be torn: nothing may come behind it
            raise
        self.refresh()


@dataclass(frozen=True)
class LogitCodec:
    """Logits `[n, ..., C]` as bytes: all in one dtype, or the largest k of each row and what the others sum up to.

    With top_k, the rest of the probability is spread evenly over the other classes: a row that comes back has its k
    largest logits, the same logsumexp, and one value everywhere else.
    """

    dtype: str
    top_k: int | None

    def encode(self, logits: Tensor) -> list[bytes]:
        """One payload a sample: its number of axes, its shape, its values.

        Raises:
            ValueError: a finite logit is too large for the dtype.
        """
        logits = logits.detach().float().cpu()
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            values, indices = logits.topk(self.top_k, -1)
            rest = logits.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
            parts = [_as_bytes(self._stored(values)), _as_bytes(indices.int()), _as_bytes(rest)]
        else:
            parts = [_as_bytes(self._stored(logits))]
        shape = logits.shape[1:]
        head = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
        rows = [part.reshape(len(logits), -1).numpy() for part in parts]
        return [head + b"".join(part[i].tobytes() for part in rows) for i in range(len(logits))]

    def _stored(self, values: Tensor) -> Tensor:
        stored = values.to(DTYPES[self.dtype])
        if bool((stored.isinf() & values.isfinite()).any()):
            raise ValueError(
                f"dtype: {self.dtype} cannot hold logits as large as {float(values.abs().max()):.3g}; use bfloat16 or "
                "float32"
            )
        return stored

    def decode(self, payloads: list[bytes]) -> Tensor:
        """float32 `[n, ..., C]` of payloads that have one shape."""
        axes = payloads[0][0]
        head = struct.calcsize(f"<B{axes}I")
        shape = struct.unpack_from(f"<{axes}I", payloads[0], 1)
        if any(p[:head] != payloads[0][:head] or len(p) != len(payloads[0]) for p in payloads):
            raise ValueError("batch: the teacher's logits of its samples are stored with different shapes")
        size, classes = DTYPES[self.dtype].itemsize, shape[-1]
        leading, rows = (len(payloads), *shape[:-1]), math.prod(shape[:-1])
        data = bytearray(b"".join(p[head:] for p in payloads))
        everything = torch.frombuffer(data, dtype=torch.uint8).reshape(len(payloads), -1)
        if self.top_k is None or self.top_k >= classes:
            return _from_bytes(everything, DTYPES[self.dtype]).float().reshape(*leading, classes)
        k = self.top_k
        values, indices, rest = everything.split([rows * k * size, rows * k * 4, rows * 4], 1)
        rest_logit = _from_bytes(rest, torch.float32).reshape(*leading, 1) - math.log(classes - k)
        positions = _from_bytes(indices, torch.int32).reshape(*leading, k).long()
        kept = _from_bytes(values, DTYPES[self.dtype]).float().reshape(*leading, k)
        return rest_logit.repeat(*[1] * len(shape), classes).scatter(-1, positions, kept)


def _as_bytes(tensor: Tensor) -> Tensor:
    """uint8, the last axis as many times longer as an element has bytes."""
    return tensor.contiguous().view(torch.uint8)


def _from_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.contiguous().view(dtype)
