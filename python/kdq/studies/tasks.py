"""The tasks that the studies run on: small ones whose data every installation has.

Each has a teacher that has seen more than the student: labels are scarce where one compresses, and what the teacher
knows beyond them is what can be handed on.
"""

from __future__ import annotations

import functools
import itertools
import string
import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Data:
    """One seed's split. x `[n, ...]`, y int64 `[n]`. The first `labelled` rows of train are the student's own labelled
    data; the teacher has the labels of all."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    labelled: int

    def few(self) -> tuple[Tensor, Tensor]:
        """What the student has labels for."""
        return self.train_x[: self.labelled], self.train_y[: self.labelled]

    def many(self) -> tuple[Tensor, Tensor]:
        """All training data; without its labels, the student may have it too."""
        return self.train_x, self.train_y


@dataclass(frozen=True)
class Task:
    """Data and models.

    Attributes:
        split: the data of a seed.
        teacher, student, deep: untrained models, from torch's global generator; `deep` is a student whose five layers
            differ in size, so that a plan can choose among them: narrow, wide, narrow.
        batch: rows of a batch.
        teacher_epochs, student_epochs: passes that train the two in float; over all data and over the labelled.
    """

    name: str
    description: str
    split: Callable[[int], Data]
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    deep: Callable[[], nn.Module]
    batch: int
    teacher_epochs: int
    student_epochs: int

    def quick(self) -> Task:
        """Little training, to see that everything works."""
        return replace(self, teacher_epochs=1, student_epochs=1)


def mlp(inputs: nn.Module, widths: list[int], dropout: float = 0.0) -> nn.Sequential:
    """`inputs`, then linear layers with batch norm before each (it centres what a 1-bit layer takes the sign of) and
    ReLU between them."""
    layers: list[nn.Module] = [inputs]
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU(), nn.Dropout(dropout)] if i else []
        layers += [nn.BatchNorm1d(before), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def shuffled(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]


# ---- handwritten digits ----------------------------------------------------------------------------------------------


def split_digits(seed: int) -> Data:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = shuffled(torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target).long(), seed)
    return Data(x[:1200], y[:1200], x[1200:], y[1200:], labelled=100)


DIGITS = Task(
    name="digits",
    description=(
        "scikit-learn's handwritten digits, 8x8 pixels, 10 classes: 1200 for training, 597 for testing. Teacher "
        "64-256-256-10 on all 1200 labels, student 64-32-32-10 with 100 of them."
    ),
    split=split_digits,
    teacher=lambda: mlp(nn.Identity(), [64, 256, 256, 10], dropout=0.2),
    student=lambda: mlp(nn.Identity(), [64, 32, 32, 10]),
    deep=lambda: mlp(nn.Identity(), [64, 24, 128, 128, 24, 10]),
    batch=50,
    teacher_epochs=30,
    student_epochs=100,
)

# ---- the next character of a Python program --------------------------------------------------------------------------

CONTEXT = 8  # characters before the one to guess
ALPHABET = string.printable  # anything else is one more class
CLASSES = len(ALPHABET) + 1
TEST_SHARE = 8  # one file in so many is for testing


@functools.cache
def library_text() -> tuple[Tensor, Tensor]:
    """Python's own standard library as classes, uint8: training files, held-out files. A file's name decides."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    codes = torch.full((256,), len(ALPHABET), dtype=torch.uint8)
    codes[torch.tensor([ord(c) for c in ALPHABET])] = torch.arange(len(ALPHABET), dtype=torch.uint8)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for path in sorted(folder.glob("*.py")):
        content = bytearray(path.read_bytes())
        if len(content) > CONTEXT:
            text = codes[torch.frombuffer(content, dtype=torch.uint8).long()]
            parts[zlib.crc32(path.name.encode()) % TEST_SHARE == 0].append(text)
    return torch.cat(parts[0]), torch.cat(parts[1])


def windows(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x int64 `[count, CONTEXT]` and the class that follows each, int64 `[count]`, from random places."""
    start = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    taken = text[start + torch.arange(CONTEXT + 1)].long()
    return taken[:, :CONTEXT].contiguous(), taken[:, CONTEXT].contiguous()


def split_text(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    training, held_out = library_text()
    x, y = windows(training, 60_000, generator)
    test_x, test_y = windows(held_out, 8_000, generator)
    return Data(x, y, test_x, test_y, labelled=2_000)


def embedding(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(CLASSES, width), nn.Flatten())


TEXT = Task(
    name="text",
    description=(
        f"The next character of a program: {CONTEXT} characters of context out of Python's standard library, "
        f"{CLASSES} classes; test files are held out. Teacher (embedding of 24)-192-384-384-{CLASSES} on 60,000 "
        f"places, student (embedding of 16)-128-96-96-{CLASSES} with the labels of 2,000 of them."
    ),
    split=split_text,
    teacher=lambda: mlp(embedding(24), [CONTEXT * 24, 384, 384, CLASSES], dropout=0.1),
    student=lambda: mlp(embedding(16), [CONTEXT * 16, 96, 96, CLASSES]),
    deep=lambda: mlp(embedding(16), [CONTEXT * 16, 48, 256, 256, 48, CLASSES]),
    batch=100,
    teacher_epochs=4,
    student_epochs=30,
)

TASKS = {task.name: task for task in (DIGITS, TEXT)}
