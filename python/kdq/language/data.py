"""The language demo's text: the source files of Python's own standard library, which every installation has.

A file's name decides whether it is for training or held out, so that no file is in both.
"""

from __future__ import annotations

import functools
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 10  # one file in so many
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Text:
    """All files of each part one after the other, uint8 `[bytes]`, and how many files that are."""

    training: Tensor
    held_out: Tensor
    training_files: int
    held_out_files: int


@functools.cache
def library_text() -> Text:
    """The standard library without its tests, tables and tools (`LEFT_OUT`)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(name.parts):
            parts[zlib.crc32(name.as_posix().encode()) % HELD_OUT == 0].append(path.read_bytes())
    training, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return Text(training, held_out, len(parts[0]), len(parts[1]))


def windows(text: Tensor, start: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """ids int64 `[n, length]` from each start `[n]`, and the byte that follows each, of the same shape."""
    taken = text[start[:, None] + torch.arange(length + 1)].long()
    return taken[:, :-1].contiguous(), taken[:, 1:].contiguous()


class Batches:
    """A loader over `steps` batches of random windows; whoever has the seed sees the same ones."""

    def __init__(self, text: Tensor, length: int, batch: int, steps: int, seed: int) -> None:
        self.text, self.length = text, length
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(text) - length, (steps, batch), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in self.starts:
            yield windows(self.text, start, self.length)


def spread_windows(text: Tensor, length: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` windows at even distances over the text, which do not overlap where it is long enough."""
    return windows(text, torch.linspace(0, len(text) - length - 1, count).long(), length)
