"""Shift-based AdaMax: an optimizer that multiplies by powers of two only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from kdq.qnn.power_of_two import nearest


class ShiftAdaMax(Optimizer):
    """AdaMax (Kingma and Ba, "Adam", 2015) by shifts (Hubara et al., "Quantized Neural Networks", 2016).

    At step t, with AP2 the nearest power of two: `m = b1 m + (1 - b1) g`, `v = max(b2 v, |g|)`, and
    `p -= AP2(lr / (1 - b1**t)) * m * AP2(1 / v)`. The paper's defaults are powers of two away from 0 and 1.

    Args:
        params: parameters or groups of them, as for any optimizer.
        lr: about the largest change of a parameter in a step. As it is rounded to a power of two, a schedule moves in
            octaves.
        betas: decay of the mean and of the largest magnitude, each at least 0 and below 1.

    Raises:
        ValueError: lr is negative or a beta is out of range.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 2**-10, betas: tuple[float, float] = (1 - 2**-3, 1 - 2**-10)
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr: expected at least 0, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected at least 0 and below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["betas"])
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, lr: float, betas: tuple[float, float]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["mean"] = torch.zeros_like(parameter)
            state["largest"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["mean"].lerp_(grad, 1 - betas[0])
        torch.maximum(state["largest"] * betas[1], grad.abs(), out=state["largest"])
        size = float(nearest(lr / (1 - betas[0] ** state["step"].double())))
        # Where no gradient has ever come, the mean is 0, and the inverse only has to be finite.
        shift = nearest(state["largest"].clamp_min(torch.finfo(parameter.dtype).tiny).reciprocal())
        parameter.addcmul_(state["mean"], shift, value=-size)
