"""SwitchableDistiller: distils one student at all of its precisions at once.

prepare_switchable_(student, [Int8Dynamic(), LowBit(weight_bits=4, act_bits=4), Binary()])
SwitchableDistiller(teacher, student, [SoftTargets(T=4)]).fit(loader, epochs=20)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdq import ranks
from kdq.configs import Config
from kdq.distill import Distiller
from kdq.losses import Loss, Weighted
from kdq.observe import Batch
from kdq.phases import Phase
from kdq.switch import keeping_precision, precisions, set_precision_


class SwitchableDistiller(Distiller):
    """Trains a switchable student on a teacher, several precisions in each step.

    A step runs the widest precision, the narrowest, and some random ones between them (the sandwich rule: Yu, Huang:
    Universally Slimmable Networks, 2019), sums their losses and takes one optimizer step. Recursively distilled, the
    widest learns from the teacher, and each narrower one from the logits of the next wider one that the step ran
    (Yu, Li, Shi, Huang, Hua: Any-Precision Deep Neural Networks, 2021). Labels and hints are the same for all.

    `loss(batch)` is such a step's loss, `fit` and everything else is as in `Distiller`. Each call of `loss` draws anew,
    and leaves the student at the precision that it found, so that activations cannot be recomputed in the backward pass
    (`torch.utils.checkpoint`).

    Args:
        teacher, losses: as for `Distiller`.
        student: after `prepare_switchable_`.
        sandwich: how many random precisions a step runs between the widest and the narrowest; all, if there are no
            more.
        recursive: False: all precisions learn from the teacher. docs/studies/claim-c.md found recursion better at 1 bit
            (by 2.5 and 0.5 points of accuracy on its two tasks), and worse or equal from 3 bits up (by up to 0.95).
        seed: of the random choice; ranks that train together take that of rank 0. A student in DDP needs
            `find_unused_parameters=True`: a step does not use the scales of the precisions that it leaves out.

    Raises:
        ValueError: the student has no switchable layers, or sandwich is below 1; or as for `Distiller`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        losses: Sequence[Loss | Weighted],
        *,
        sandwich: int = 1,
        recursive: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(teacher, student, losses)
        if sandwich < 1:
            raise ValueError(
                f"sandwich: expected 1 or more, got {sandwich}: without, the middle precisions never train"
            )
        self.precisions = precisions(student)
        self.sandwich = sandwich
        self.recursive = recursive
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> list[Config]:
        """The precisions of one step, from the widest to the narrowest."""
        last = len(self.precisions) - 1
        between = torch.randperm(max(last - 1, 0), generator=self.generator)[: self.sandwich] + 1
        return [self.precisions[i] for i in sorted({0, last, *between.tolist()})]

    def _computation(self, batch: Batch) -> Callable[[], Tensor]:
        """The sum of the losses of the precisions that are drawn for this step."""
        goal, taught = self._run_teacher(batch)
        drawn: list[Config] = ranks.gather_objects(self.draw())[0]
        return lambda: self._sandwich(batch, goal, taught, drawn)

    def _sandwich(
        self, batch: Batch, goal: Tensor | None, taught: Mapping[str, Tensor], drawn: Sequence[Config]
    ) -> Tensor:
        terms = []
        with keeping_precision(self._inner):
            for precision in drawn:
                set_precision_(self._inner, precision)
                term, logits = self._compare(batch, goal, taught)
                terms.append(term)
                if self.recursive:
                    goal = logits.detach()
        return torch.stack(terms).sum()

    def _for_phase(self, phase: Phase) -> Distiller:
        if phase.config is not None or phase.train_teacher:
            raise ValueError(
                f"phases: {phase.name!r} has a config or train_teacher, which a SwitchableDistiller does not take: its "
                "student holds all precisions at once, and its teacher is frozen"
            )
        if phase.losses is None:
            return self
        other = SwitchableDistiller(
            self.teacher, self.student, phase.losses, sandwich=self.sandwich, recursive=self.recursive
        )
        other.generator = self.generator
        return other
