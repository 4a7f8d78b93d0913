"""What the cases are built for: a CPU, or a GPU, which has shapes, a dtype and peers of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """What the cases are built for.

    Attributes:
        quick: small shapes, to see that everything works.
        device: where the operands are made.
        gpu: shapes, dtype and peers are those of a GPU. Apart from `device`, so that they can be tested without one.
    """

    quick: bool = False
    device: torch.device = CPU
    gpu: bool = False

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Target:
        return cls(quick, device, device.type != "cpu")

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def has_operator(self, name: str) -> bool:
        """Whether this torch has that operator of its own for the device."""
        key = "CUDA" if self.device.type == "cuda" else "CPU"
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)

    @property
    def activations(self) -> torch.dtype:
        """Of the linear layers: what models are usually run in."""
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def rounding(self) -> float:
        """The accepted relative error of a result that is exact but for sums and rounding in `activations`."""
        return 1e-2 if self.gpu else 1e-5
