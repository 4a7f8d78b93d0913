"""Losses on features: what named layers of the student put out, compared with what layers of the teacher put out.

`FeatureLoss` is all that a `Distiller` knows of them: the names of the layers, an adapter (`make_adapters`) that it
trains beside the student if the two features cannot be compared as they are, and the comparison. Alone, a loss is
called with features by layer name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.observe import IGNORED_TARGET
from kdq.ranks import gather_rows, pooling, share_of_rows


@dataclass(frozen=True)
class FeatureLoss:
    """Base of the losses on features; for one of your own, override `compare`, and `adapter` if it needs one.

    Samples whose targets are all -100 are left out. The features are compared in float32, or float64 if they are, under
    autocast too. Where ranks train together, `compare` is taken for a mean over what this rank's samples have, and
    weighs as much as they are; a loss that relates samples sets `relates_samples`, and compares all ranks'.

    Args:
        layers: student layer name -> teacher layer name, as in `named_modules()`; the loss is the sum over the pairs.
            The feature is the layer's output, after an in-place activation if one follows.
        weight: factor of the loss.
    """

    layers: Mapping[str, str]
    weight: float = 1.0
    relates_samples: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise ValueError(f'layers: expected {{"student layer": "teacher layer", ...}}, got {self.layers!r}')
        check_not_negative("weight", self.weight)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        """A module `(student, teacher) -> (student, teacher)` that makes a pair comparable, or None; from the shapes
        of its first batch.

        Raises:
            ValueError: nothing can make these comparable.
        """
        return None

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair of features (after the adapter): a scalar."""
        raise NotImplementedError

    def counted(self, features: Tensor, target: Tensor | None) -> Tensor:
        """The features `[samples, ...]` without those whose targets are all -100.

        Raises:
            ValueError: there are such, but the first axis of the features is not that of the target.
        """
        if target is None or target.dim() == 0:
            return features
        ignored = (target == IGNORED_TARGET).reshape(len(target), -1).all(1)
        if not bool(ignored.any()):
            return features
        if features.dim() == 0 or len(features) != len(target):
            raise ValueError(
                f"expected features [{len(target)}, ...] as the target has samples, of which some are "
                f"{IGNORED_TARGET}, got {list(features.shape)}"
            )
        return features[~ignored]

    def __call__(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        target: Tensor | None = None,
        adapters: Mapping[str, nn.Module] | None = None,
    ) -> Tensor:
        """The loss of features by layer name; adapters by the name of the student's layer.

        Raises:
            ValueError: the features of a pair cannot be compared.
        """
        terms = []
        for ours, theirs in self.layers.items():
            try:
                adapter = None if adapters is None else adapters.get(ours)
                terms.append(self._term(student[ours], teacher[theirs].detach(), target, adapter))
            except ValueError as error:
                raise ValueError(f"{type(self).__name__} {ours!r} -> {theirs!r}: {error}") from error
        return self.weight * torch.stack(terms).sum()

    def _term(self, student: Tensor, teacher: Tensor, target: Tensor | None, adapter: nn.Module | None) -> Tensor:
        ours, theirs = self.counted(student, target), self.counted(teacher, target)
        ours = ours.to(torch.promote_types(ours.dtype, torch.float32))
        theirs = theirs.to(ours.dtype)
        share: Tensor | float = 1.0
        if self.relates_samples:
            ours, theirs = gather_rows(ours)[0], gather_rows(theirs)[0]
        else:
            share = share_of_rows(ours.numel(), ours.device)
        empty = ours.numel() == 0
        if empty and not pooling():
            return ours.sum()  # 0, with a gradient of 0
        with torch.autocast(ours.device.type, enabled=False):
            if adapter is not None:
                ours, theirs = adapter(ours, theirs)  # also if this rank has nothing: it may gather what others have
            return ours.sum() if empty else self.compare(ours, theirs) * share


def make_adapters(
    losses: Mapping[int, FeatureLoss], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[tuple[int, str], nn.Module]:
    """The adapters that the losses need for these features, by number of the loss and name of the student's layer.

    Raises:
        ValueError: nothing can make a pair comparable.
    """
    made = {}
    for number, loss in losses.items():
        for ours, theirs in loss.layers.items():
            try:
                adapter = loss.adapter(student[ours], teacher[theirs])
            except ValueError as error:
                raise ValueError(f"{type(loss).__name__} {ours!r} -> {theirs!r}: {error}") from error
            if adapter is not None:
                wide = torch.promote_types(student[ours].dtype, torch.float32)
                made[number, ours] = adapter.to(student[ours].device, wide)
    return made


@dataclass(frozen=True)
class Hint(FeatureLoss):
    """Mean squared distance between the features.

    Romero et al.: FitNets: Hints for Thin Deep Nets, 2015, who take half the sum. Where the widths differ, a
    `Distiller` learns a linear regressor from the student's feature to the teacher's. Where the first axes of a feature
    are those of the target (as tokens), single positions with -100 are left out; otherwise whole samples.
    """

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        return None if student.shape == teacher.shape else Regressor.between(student, teacher)

    def counted(self, features: Tensor, target: Tensor | None) -> Tensor:
        if target is None or features.shape[: target.dim()] != target.shape or features.dim() == target.dim():
            return super().counted(features, target)
        kept = target != IGNORED_TARGET
        return features if bool(kept.all()) else features[kept]

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_equal(student.shape, teacher.shape, "shape")
        return F.mse_loss(student, teacher)


class Regressor(nn.Module):
    """A linear map of the student's feature along one axis (on channels, axis 1, it is a 1x1 convolution), in the place
    of FitNets' regressor."""

    def __init__(self, in_width: int, out_width: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.linear = nn.Linear(in_width, out_width)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        y: Tensor = self.linear(student.movedim(self.axis, -1))
        return y.movedim(-1, self.axis), teacher

    @classmethod
    def between(cls, student: Tensor, teacher: Tensor) -> Regressor:
        """What maps the student's feature to the shape of the teacher's.

        Raises:
            ValueError: the shapes do not differ in just the channels (axis 1) or the features (last axis).
        """
        axes = [i for i, (s, t) in enumerate(zip(student.shape, teacher.shape, strict=False)) if s != t]
        last = student.dim() - 1
        if student.dim() != teacher.dim() or len(axes) != 1 or axes[0] not in (1, last):
            raise ValueError(
                "expected features that differ only in axis 1 or the last axis, "
                f"got {list(student.shape)} and {list(teacher.shape)}"
            )
        # Counted from the end, so that it stays the last one when positions of -100 are left out.
        axis = -1 if axes[0] == last else 1
        return cls(student.shape[axis], teacher.shape[axis], axis)


@dataclass(frozen=True)
class AttentionTransfer(FeatureLoss):
    """Mean squared difference between the attention maps: the channels' sum of squares at each position, normalised to
    length 1 a sample.

    Zagoruyko, Komodakis: Paying More Attention to Attention, 2017, the activation-based maps with p = 2, compared as in
    the authors' code (squares, mean over samples and positions), where a weight of 1000 is usual. The numbers of
    channels may differ, the positions must be the same.

    Args:
        channel_axis: 1 for `[N, C, H, W]`, -1 for tokens `[N, L, C]`.
    """

    channel_axis: int = 1

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = self._map(student), self._map(teacher)
        check_equal(ours.shape, theirs.shape, "samples and positions")
        return F.mse_loss(ours, theirs)

    def _map(self, features: Tensor) -> Tensor:
        if features.dim() < 3:
            raise ValueError(f"expected features with channels and positions, got shape {list(features.shape)}")
        return F.normalize(features.square().sum(self.channel_axis).flatten(1), dim=1)


@dataclass(frozen=True)
class RelationalKD(FeatureLoss):
    """How the samples of a batch lie to each other: distances of pairs and angles of triplets, by Huber's loss.

    Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019. Distances are over the mean distance in the batch. The
    loss is a mean over all pairs and triplets, where the paper writes sums; those of a sample with itself count, as 0.
    Features are flattened a sample; their widths may differ. The angles take memory of (samples of the batch)^2 times
    width and (samples)^3. Where ranks train together the batch is that of all, and each computes all of the loss.

    Args:
        distance_weight, angle_weight: factors of the two parts, at least 0; 0 leaves one out.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0
    relates_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("distance_weight", self.distance_weight)
        check_not_negative("angle_weight", self.angle_weight)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_equal(student.shape[:1], teacher.shape[:1], "number of samples")
        ours, theirs = student.flatten(1), teacher.flatten(1)
        loss = ours[:0].sum()
        if self.distance_weight > 0:
            loss = loss + self.distance_weight * F.smooth_l1_loss(_distances(ours), _distances(theirs))
        if self.angle_weight > 0:
            loss = loss + self.angle_weight * F.smooth_l1_loss(_angles(ours), _angles(theirs))
        return loss


def _distances(rows: Tensor) -> Tensor:
    """`[n, n]`, over the mean of those that are not 0."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / (distances.sum() / (distances > 0).sum().clamp_min(1)).clamp_min(1e-12)


def _angles(rows: Tensor) -> Tensor:
    """`[n, n, n]`: the cosine of the angle at i between j and k."""
    directions = F.normalize(rows[None, :, :] - rows[:, None, :], dim=2)
    return directions @ directions.transpose(1, 2)


@dataclass(frozen=True)
class ContrastiveKD(FeatureLoss):
    """Cross entropy of finding a sample's teacher feature, by the student's, among those of other samples.

    Tian, Krishnan, Isola: Contrastive Representation Distillation, 2020, with the student as anchor. Negatives are the
    other samples of the batch and a queue of the latest teacher features, scored by a softmax (InfoNCE) instead of the
    paper's memory bank and NCE, which need each sample's index in the data. The heads that project both features
    (flattened) to a common width belong to the `Distiller` and are trained. Keep queue plus batch well below the number
    of samples of an epoch: a sample that meets itself in the queue counts as its own negative. A batch that comes again
    at once, as at each precision of a `SwitchableDistiller`, does not meet itself. Where ranks train together,
    negatives and queue are the samples of all, the anchors each rank's own.

    Args:
        width: of the common space.
        T: temperature of the cosine similarities.
        queue: how many earlier teacher features are kept, at least 0.
    """

    width: int = 128
    T: float = 0.07
    queue: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.T > 0 and math.isfinite(self.T)):
            raise ValueError(f"T: expected a positive finite temperature, got {self.T!r}")
        for name, value, least in (("width", self.width, 1), ("queue", self.queue, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer, at least {least}, got {value!r}")

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        return ContrastiveHeads(math.prod(student.shape[1:]), math.prod(teacher.shape[1:]), self.width, self.queue)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student `[n, width]`, teacher `[n + negatives, width]`: the first n are the students' own."""
        if student.dim() != 2 or teacher.dim() != 2 or len(teacher) < len(student):
            raise ValueError(f"expected [n, d] and [>= n, d], got {list(student.shape)} and {list(teacher.shape)}")
        check_equal(student.shape[1:], teacher.shape[1:], "width")
        similarity = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T
        return F.cross_entropy(similarity / self.T, torch.arange(len(student), device=student.device))


class ContrastiveHeads(nn.Module):
    """CRD's two linear projections, and the queue of negatives.

    The queue keeps the teacher's features as they were before the projection: those of a frozen teacher do not age,
    while its head is trained.
    """

    queue: Tensor

    def __init__(self, student_width: int, teacher_width: int, width: int, size: int) -> None:
        super().__init__()
        self.student = nn.Linear(student_width, width)
        self.teacher = nn.Linear(teacher_width, width)
        self.size = size
        self.register_buffer("queue", torch.empty(0, teacher_width), persistent=False)

    def get_extra_state(self) -> Tensor:
        """The queue, which a buffer of the state dict could not be: it grows."""
        return self.queue

    def set_extra_state(self, state: Tensor) -> None:
        self.queue = state.to(self.queue)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, width]` and `[n + negatives, width]`. Only a forward pass that trains puts features into the queue."""
        teacher, own = gather_rows(teacher.flatten(1))
        latest = self.queue[: len(teacher)]
        negatives = self.queue[len(latest) :] if torch.equal(latest, teacher[: len(latest)]) else self.queue
        candidates = torch.cat([teacher, negatives])
        if self.training and torch.is_grad_enabled():
            self.queue = candidates[: self.size].clone()  # the latest are in front
        ours, theirs = self.student(student.flatten(1)), self.teacher(candidates.roll(-own, 0))
        return ours, theirs


def check_equal(student: torch.Size, teacher: torch.Size, what: str) -> None:
    if student != teacher:
        raise ValueError(f"expected features of one {what}, got {list(student)} and {list(teacher)}")


def check_not_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number, at least 0, got {value!r}")
