"""CachedTeacher: a teacher whose logits are computed once a sample and then read from disk."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdq import distributed
from kdq.logit_store import DTYPES, KEY_BYTES, LogitCodec, LogitStore
from kdq.observe import evaluating, logits_of

LEAST_HIT_RATE = 0.1


class CachedTeacher(nn.Module):
    """Takes the teacher's place in a `Distiller`, and asks it only for samples that the folder does not know.

    A sample is known by the bytes of its inputs, so that shuffling, batch sizes and epochs do not matter; every tensor
    argument whose first axis has the length of the batch is split by samples, anything else is part of each sample. The
    teacher runs in eval mode, where the output for a sample must depend on that sample alone. What comes back is what
    was stored, also the first time: the same numbers in every epoch.

    Several processes and runs may share a folder: each writes what it asked, and reads what all have written. A teacher
    that is sharded by `fully_shard` is asked by all ranks at once, as soon as one of them needs it.

    It is of no use where the inputs change every epoch (augmentation, padding to the longest of a batch): then a
    UserWarning says so, once, and nothing more is stored. `Distiller.fit` knows when an epoch repeats another: fewer
    than 10 % known are too few. In any other loop it takes the number of samples to tell: more than twice as many
    unknown ones cannot be. `DistillationTrainer`, `DistillationModule` and `DistillationCallback` look it up (but where
    the entries of a data set are whole batches), a loop of your own gives it as `samples`. It has no features: feature
    losses need the teacher itself.

    Args:
        teacher: its outputs are logits `[N, ..., C]` or have `.logits`.
        folder: made if it is not there; some bytes a logit, append-only. Delete it to begin anew.
        top_k: keep only the k largest logits of each row and the logsumexp of the others, spread evenly.
        dtype: of the stored logits: float16, bfloat16 or float32.
        samples: `len(dataset)`, of training and validation together; only loops of your own need it.

    Attributes:
        hits, misses: samples that were known, or not, since this object was made.
        storing: whether misses are stored.

    Raises:
        ValueError: the folder was made with another teacher, top_k or dtype, an argument is out of range, or a module
            of the teacher makes the output of a sample depend on its batch: a batch norm that keeps no running
            statistics, or one that `eval()` leaves in training mode.
    """

    def __init__(
        self,
        teacher: nn.Module,
        folder: str | os.PathLike[str],
        top_k: int | None = None,
        dtype: torch.dtype = torch.float16,
        samples: int | None = None,
    ) -> None:
        super().__init__()
        names = {value: name for name, value in DTYPES.items()}
        if dtype not in names:
            raise ValueError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k: expected an integer, at least 1, or None, got {top_k!r}")
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            raise ValueError(f"samples: expected an integer, at least 1, or None, got {samples!r}")
        check_rows_are_independent(teacher)
        self.teacher = teacher
        self.codec = LogitCodec(names[dtype], top_k)
        self.fingerprint = fingerprint(teacher)
        facts = {"version": 1, "teacher": self.fingerprint, "top_k": top_k, "dtype": names[dtype]}
        self.store = LogitStore(Path(folder), facts)
        self.samples = samples
        self._expected = None if samples is None else (0, samples)  # since how many misses, and how many samples
        self.hits = self.misses = 0
        self.storing = True
        self._whole_epochs = 0  # of a fit, that went through this object
        self._stamp = _stamp(teacher)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's logits, float32 `[N, ..., C]`, without a gradient.

        Raises:
            TypeError: an argument is neither a tensor nor a plain value.
            ValueError: there is no batch, or the teacher gives no logits a sample.
            RuntimeError: the teacher's weights have changed.
        """
        self._check_unchanged()
        keys, device = sample_keys(args, kwargs)
        known = self.store.get(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        self._check_expected()
        if distributed.needed(bool(missing), self.teacher):
            payloads = self.codec.encode(self._ask(missing or [0], len(keys), args, kwargs))[: len(missing)]
            fresh = dict(zip((keys[i] for i in missing), payloads, strict=True))
            if self.storing and fresh:
                self.store.append(fresh)
            known.update(fresh)
        return self.codec.decode([known[key] for key in keys]).to(device)

    def _ask(self, rows: list[int], batch: int, args: Any, kwargs: Any) -> Tensor:
        """The teacher's logits of some samples of a batch."""
        index = torch.tensor(rows)

        def chosen(value: Any) -> Any:
            return value[index.to(value.device)] if _is_per_sample(value, batch) else value

        args, kwargs = tuple(map(chosen, args)), {name: chosen(value) for name, value in kwargs.items()}
        with torch.no_grad(), evaluating(self.teacher):
            logits = logits_of(self.teacher(*args, **kwargs), "teacher")
        if logits.dim() < 2 or len(logits) != len(rows):
            raise ValueError(f"teacher: expected logits [{len(rows)}, ..., C], got {list(logits.shape)}")
        return logits

    @contextmanager
    def epoch(self, whole: bool, repeats: bool) -> Iterator[None]:
        """Around an epoch of training: one that repeats another should find its samples known.

        Whoever takes a training up may have another folder than before, or none: there has to be a whole epoch that
        went through this object.

        Args:
            whole: False: only what is left of the epoch.
            repeats: there was an epoch on the same data before.
        """
        hits, misses = self.hits, self.misses
        yield
        hits, misses = self.hits - hits, self.misses - misses
        if repeats and self._whole_epochs and hits < LEAST_HIT_RATE * (hits + misses):
            self._stop_storing(f"{hits} of {hits + misses} samples of a repeated epoch were known")
        self._whole_epochs += whole

    def expect(self, samples: int | None) -> None:
        """From now on there will be so many different samples; None: nobody knows. What the user said counts more."""
        if self.samples is None:
            self._expected = None if samples is None else (self.misses, samples)

    def _check_expected(self) -> None:
        if self._expected is not None:
            since, samples = self._expected
            if self.misses - since > 2 * samples:
                self._stop_storing(f"{self.misses - since} samples were unknown, where there are {samples}")

    def _stop_storing(self, found: str) -> None:
        """With a warning, the first time."""
        if self.storing:
            self.storing = False
            warnings.warn(
                f"CachedTeacher: {found}: the inputs seem to change every epoch (augmentation, padding to the longest "
                "of a batch), so nothing more is stored",
                UserWarning,
                stacklevel=2,
            )

    def _check_unchanged(self) -> None:
        stamp = _stamp(self.teacher)
        if stamp == self._stamp:
            return
        if fingerprint(self.teacher) != self.fingerprint:
            raise RuntimeError(
                "teacher: its weights have changed since the CachedTeacher was made; what is stored is no longer its"
            )
        self._stamp = stamp  # it was copied or moved


def expect_samples(teacher: nn.Module, datasets: Iterable[Any]) -> None:
    """Tells all CachedTeachers within how many samples they will see, if every data set knows its length; no data sets:
    that this is not known any more."""
    datasets = list(datasets)
    known = datasets and all(isinstance(data, Sized) for data in datasets)
    samples = sum(map(len, datasets)) if known else None
    for module in teacher.modules():
        if isinstance(module, CachedTeacher):
            module.expect(samples)


def check_rows_are_independent(teacher: nn.Module) -> None:
    """Raises ValueError if a module makes the output of a sample depend on the others of its batch, as far as modules
    show that."""
    with evaluating(teacher):
        for name, module in teacher.named_modules():
            where = f"teacher: {type(module).__name__} {name!r}" if name else f"teacher: {type(module).__name__}"
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"{where} keeps no running statistics, so that the output of a sample depends on its batch: a "
                    "CachedTeacher needs track_running_stats=True; or take the teacher itself"
                )
            if module.training:
                raise ValueError(
                    f"{where} stays in training mode after eval(), so that the output of a sample may depend on its "
                    "batch or on chance; take the teacher itself"
                )


def sample_keys(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[bytes], torch.device]:
    """A hash of each sample's inputs, and the device of the first tensor.

    Raises:
        TypeError: an argument is neither a tensor nor None, bool, int, float or str.
        ValueError: there is no tensor with samples.
    """
    named = [(str(i), value) for i, value in enumerate(args)] + sorted(kwargs.items())
    tensors = [value for _, value in named if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors or len(tensors[0]) == 0:
        raise ValueError("batch: a CachedTeacher needs a tensor [N, ...] with at least one sample")
    batch = len(tensors[0])
    common = hashlib.blake2b(digest_size=KEY_BYTES)
    rows = []
    for name, value in named:
        if isinstance(value, Tensor):
            per_sample = _is_per_sample(value, batch)
            common.update(repr((name, value.dtype, list(value.shape[per_sample:]), per_sample)).encode())
            data = tensor_bytes(value)
            if per_sample:
                rows.append(data.reshape(batch, -1).numpy())
            else:
                common.update(data.numpy().tobytes())
        elif value is None or isinstance(value, bool | int | float | str):
            common.update(repr((name, value)).encode())
        else:
            raise TypeError(f"argument {name}: expected a tensor or a plain value, got {type(value).__name__}")
    keys = []
    for i in range(batch):
        key = common.copy()
        for row in rows:
            key.update(row[i].tobytes())
        keys.append(key.digest())
    return keys, tensors[0].device


def _is_per_sample(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch


def tensor_bytes(tensor: Tensor) -> Tensor:
    """uint8 `[bytes]` on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's structure (as it prints) and state, whole if it is sharded."""
    digest = hashlib.sha256(distributed.printed(model).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            value = distributed.whole(value)
            digest.update(repr((value.dtype, list(value.shape))).encode())
            digest.update(tensor_bytes(value).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _stamp(model: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Changes whenever a weight is written to (but through `.data`), turned to another dtype or moved; cheap, where the
    fingerprint reads them all."""
    distributed.reshard(model)
    tensors = [distributed.own_part(t) for t in (*model.parameters(), *model.buffers())]
    return tuple((id(t), t.data_ptr(), t.dtype, -1 if t.is_inference() else t._version) for t in tensors)
