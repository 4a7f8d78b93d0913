"""CachedTeacher: the teacher's numbers in any order, on a folder that survives, and where it must refuse."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.logit_store import HEADER, LogitCodec
from small_models import randn


class Teacher(nn.Module):
    """Counts the samples that it is asked."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 5)
        self.asked = 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.asked += len(x)
        y: Tensor = self.linear(self.norm(x.flatten(0, -2)).view(x.shape))
        return y if mask is None else y * mask[..., None]


def test_samples_are_known_in_any_order_and_batch_size(tmp_path: Path) -> None:
    teacher, x = Teacher(), randn(10, 6)
    expected = copy.deepcopy(teacher).eval()(x).detach()
    cached = kdq.CachedTeacher(teacher, tmp_path).train()
    first = cached(x)
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-4)
    assert teacher.asked == 10
    assert torch.equal(first, expected.half().float()), "what is stored comes back, also the first time"
    order = torch.tensor([3, 3, 9, 0, 7])
    for again in (cached, kdq.CachedTeacher(Teacher(), tmp_path), pickle.loads(pickle.dumps(cached))):
        asked = again.teacher.asked
        assert torch.equal(again(x[order]), first[order])
        assert torch.equal(again(x[4:5]), first[4:5])
        assert again.teacher.asked == asked
    assert teacher.asked == 10
    mixed = torch.cat([x[2:4], randn(1, 6, seed=5), x[:1]])
    torch.testing.assert_close(cached(mixed)[[0, 1, 3]], first[[2, 3, 0]], rtol=0, atol=0)
    assert teacher.asked == 11
    assert (cached.hits, cached.misses) == (5 + 1 + 3, 10 + 1)


def test_dicts_and_sequences(tmp_path: Path) -> None:
    teacher = Teacher()
    cached = kdq.CachedTeacher(teacher, tmp_path, dtype=torch.float32)
    x, mask = randn(4, 3, 6), torch.ones(4, 3)
    mask[1, 2] = 0
    student = Teacher(seed=1)
    batch = {"x": x, "mask": mask, "labels": torch.zeros(4, 3, dtype=torch.long)}
    losses = [kdq.SoftTargets(alpha=0.5)]
    direct, through = (kdq.Distiller(t, student, losses).loss(batch) for t in (copy.deepcopy(teacher), cached))
    torch.testing.assert_close(through, direct)
    assert torch.equal(cached(x=x, mask=mask)[1, 2], torch.zeros(5))
    asked = teacher.asked
    cached(x=x, mask=torch.ones(4, 3))
    assert teacher.asked == asked + 1, "one sample has another mask"
    cached(x=x[:, :2], mask=mask[:, :2])
    assert teacher.asked == asked + 5, "shorter sequences are other samples"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_top_k_keeps_the_largest_and_the_sum_of_the_rest(dtype: torch.dtype, tmp_path: Path) -> None:
    logits = randn(3, 2, 9) * 4
    codec = LogitCodec(str(dtype).removeprefix("torch."), top_k=4)
    back = codec.decode(codec.encode(logits))
    values, indices = logits.topk(4, -1)
    assert torch.equal(back.gather(-1, indices), values.to(dtype).float())
    rest = torch.ones_like(logits, dtype=torch.bool).scatter(-1, indices, False)
    others = back[rest].reshape(3, 2, 5)
    assert torch.equal(others, others[..., :1].expand(3, 2, 5))
    expected = logits[rest].reshape(3, 2, 5).double().logsumexp(-1)
    torch.testing.assert_close(others.double().logsumexp(-1), expected, rtol=1e-5, atol=1e-5)
    everything = LogitCodec("float32", top_k=20)
    assert torch.equal(everything.decode(everything.encode(logits)), logits)


def only(file: Path) -> None:
    """Removes what later runs wrote beside it."""
    for other in file.parent.glob("*.logits"):
        if other != file:
            other.unlink()


def test_a_torn_record_is_dropped_and_written_anew(tmp_path: Path) -> None:
    x = randn(4, 6)
    first = kdq.CachedTeacher(Teacher(), tmp_path)
    expected = first(x)
    (file,) = tmp_path.glob("*.logits")
    data = file.read_bytes()
    record = len(data) // 4
    for cut in (1, record - 3, record - HEADER.size + 1):  # within the payload, the key, the header
        file.write_bytes(data[: len(data) - cut])
        only(file)
        again = kdq.CachedTeacher(Teacher(), tmp_path)
        assert torch.equal(again(x), expected)
        assert (again.hits, again.misses) == (3, 1)
        assert len(list(tmp_path.glob("*.logits"))) == 2, "nothing is appended behind a torn record"
        assert kdq.CachedTeacher(Teacher(), tmp_path)(x).equal(expected)
    broken = bytearray(data)
    broken[HEADER.size + 8] ^= 1  # a bit of the first payload
    file.write_bytes(bytes(broken))
    only(file)
    again = kdq.CachedTeacher(Teacher(), tmp_path)
    assert torch.equal(again(x), expected)
    assert again.misses == 1


def test_two_runs_share_a_folder_while_both_write(tmp_path: Path) -> None:
    a, b = (kdq.CachedTeacher(Teacher(), tmp_path) for _ in range(2))
    x = randn(8, 6)
    a(x[:4])
    b(x[4:])
    assert torch.equal(a(x), b(x))
    assert (a.misses, b.misses) == (4, 4)
    assert len(list(tmp_path.glob("*.logits"))) == 2


def test_it_teaches_as_the_teacher_does(tmp_path: Path) -> None:
    data = [randn(16, 6, seed=s) for s in range(3)]
    histories = []
    for teacher in (Teacher(), kdq.CachedTeacher(Teacher(), tmp_path, dtype=torch.float32)):
        history = kdq.Distiller(teacher, Teacher(seed=1), [kdq.SoftTargets()]).fit(data, 3, progress=False)
        histories.append(history.losses)
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    assert teacher.misses == 48
    assert teacher.hits == 96


class Augmented:
    def __init__(self) -> None:
        self.seed = 0

    def __iter__(self) -> Any:
        for _ in range(2):
            self.seed += 1
            yield randn(16, 6, seed=self.seed)


def test_inputs_that_change_every_epoch_end_the_storing_with_one_warning(tmp_path: Path) -> None:
    cached = kdq.CachedTeacher(Teacher(), tmp_path)
    distiller = kdq.Distiller(cached, Teacher(seed=1), [kdq.SoftTargets()])
    # The validation batch is known from its second time on; it does not hide that the training batches are not.
    with pytest.warns(UserWarning, match="0 of 32 samples.*augmentation") as caught:
        distiller.fit(Augmented(), 4, validation=[randn(64, 6, seed=99)], progress=False)
    assert len(caught) == 1
    assert not cached.storing
    size = sum(file.stat().st_size for file in tmp_path.glob("*.logits"))
    cached(randn(3, 6, seed=77))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.logits")) == size


def own_loop(cached: kdq.CachedTeacher, loader: Any, epochs: int) -> list[Any]:
    distiller = kdq.Distiller(cached, Teacher(seed=1), [kdq.SoftTargets()])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(epochs):
            for batch in loader:
                distiller.loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    return [w for w in caught if "CachedTeacher" in str(w.message)]


def test_a_loop_of_ones_own_is_told_too(tmp_path: Path) -> None:
    """Two epochs may be unknown: validation is asked beside the training data."""
    cached = kdq.CachedTeacher(Teacher(), tmp_path, samples=32)
    augmented = Augmented()
    assert not own_loop(cached, augmented, 2)
    (warning,) = own_loop(cached, augmented, 2)
    assert "80 samples were unknown, where there are 32" in str(warning.message)
    assert not cached.storing
    size = sum(file.stat().st_size for file in tmp_path.glob("*.logits"))
    assert not own_loop(cached, augmented, 1)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.logits")) == size


def test_a_loop_whose_inputs_stay_is_not_warned(tmp_path: Path) -> None:
    data = [randn(16, 6, seed=s) for s in range(2)]
    cached = kdq.CachedTeacher(Teacher(), tmp_path, samples=32)
    cached(randn(32, 6, seed=9))  # as much validation data
    assert not own_loop(cached, data, 4)
    assert cached.storing


def test_fit_warns_once_whatever_else_counts(tmp_path: Path) -> None:
    cached = kdq.CachedTeacher(Teacher(), tmp_path, samples=32)
    distiller = kdq.Distiller(cached, Teacher(seed=1), [kdq.SoftTargets()])
    with pytest.warns(UserWarning, match="CachedTeacher") as caught:
        distiller.fit(Augmented(), 4, progress=False)
    assert len(caught) == 1


@pytest.mark.parametrize("killed_after", [3, 5])  # batches: within the second epoch, and early in the third
def test_a_training_taken_up_with_an_empty_folder_is_not_warned(killed_after: int, tmp_path: Path) -> None:
    """The samples are unknown there for an epoch, and that says nothing about the inputs."""

    class Killed(Exception):
        pass

    class Batches:
        def __init__(self, left: int | None) -> None:
            self.left = left

        def __iter__(self) -> Any:
            for seed in range(2):
                if self.left == 0:
                    raise Killed
                self.left = None if self.left is None else self.left - 1
                yield randn(16, 6, seed=seed)

    def fit(folder: Path, left: int | None) -> kdq.CachedTeacher:
        cached = kdq.CachedTeacher(Teacher(), folder)
        distiller = kdq.Distiller(cached, Teacher(seed=1), [kdq.SoftTargets()])
        distiller.fit(Batches(left), 5, checkpoint=tmp_path / "a.pt", checkpoint_every=1, progress=False)
        return cached

    with pytest.raises(Killed):
        fit(tmp_path / "one", killed_after)
    cached = fit(tmp_path / "two", None)
    assert cached.storing
    assert cached.misses == 32


def test_a_teacher_whose_rows_depend_on_the_batch_is_refused(tmp_path: Path) -> None:
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> nn.Dropout:
            return super().train(True)

    batched = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(ValueError, match="teacher: BatchNorm1d '1' keeps no running statistics.*depends on its batch"):
        kdq.CachedTeacher(batched, tmp_path)
    with pytest.raises(ValueError, match="teacher: Stubborn '0.0' stays in training mode after eval"):
        kdq.CachedTeacher(nn.Sequential(nn.Sequential(Stubborn()), nn.Linear(6, 5)), tmp_path)
    assert not list(tmp_path.iterdir())
    alone = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten(), nn.Linear(6, 5), nn.Dropout(0.5))
    cached = kdq.CachedTeacher(alone.train(), tmp_path)  # each sample is normalized by itself
    assert alone[4].training
    assert torch.equal(cached(randn(4, 6))[1:2], cached(randn(4, 6)[1:2]))


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    cached = kdq.CachedTeacher(Teacher(), tmp_path)
    for make, message in [
        (lambda: kdq.CachedTeacher(Teacher(seed=1), tmp_path), "another teacher"),
        (lambda: kdq.CachedTeacher(Teacher(), tmp_path, top_k=2), "another top_k"),
        (lambda: kdq.CachedTeacher(Teacher(), tmp_path, dtype=torch.float32), "another dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    copy.deepcopy(cached)(randn(2, 6))
    with pytest.raises(RuntimeError, match="weights have changed"):
        copy.deepcopy(cached).half()(randn(2, 6))
    with torch.no_grad():
        cached.teacher.linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed"):
        cached(randn(2, 6))
    assert not list(tmp_path.glob("*.tmp"))


def test_where_it_cannot_be_used(tmp_path: Path) -> None:
    cached = kdq.CachedTeacher(Teacher(), tmp_path)
    student = Teacher(seed=1)
    with pytest.raises(ValueError, match="CachedTeacher keeps logits"):
        kdq.Distiller(cached, student, [kdq.Hint({"linear": "teacher.linear"})])
    with pytest.raises(ValueError, match="CachedTeacher cannot change"):
        kdq.Distiller(kdq.TeacherEnsemble([cached]), student, [kdq.SoftTargets()], train_teacher=True)
    with pytest.raises(TypeError, match="argument mask.*list"):
        cached(randn(2, 6), mask=[1, 2])
    with pytest.raises(ValueError, match="at least one sample"):
        cached(randn(0, 6))
    with pytest.raises(ValueError, match="dtype"):
        kdq.CachedTeacher(Teacher(), tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="top_k"):
        kdq.CachedTeacher(Teacher(), tmp_path, top_k=0)
    with pytest.raises(ValueError, match="samples: expected an integer, at least 1"):
        kdq.CachedTeacher(Teacher(), tmp_path, samples=0)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        LogitCodec("float16", None).encode(torch.tensor([[1e5, 0.0]]))

    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    with pytest.raises(ValueError, match=r"expected logits \[2, ..., C\]"):
        kdq.CachedTeacher(Pooled(), tmp_path / "pooled")(randn(2, 6))
