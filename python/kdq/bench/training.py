"""What quantization-aware training costs: one step (forward, backward, AdamW) beside the same step in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.bench.case import Case, Contender
from kdq.bench.limits import float32_products
from kdq.bench.models import encoder, linear_operations, mlp
from kdq.configs import Binary, Config, Int8Dynamic, LowBit
from kdq.quantize import prepare_qat_

SCHEMES: dict[str, Config] = {
    "kdq int8": Int8Dynamic(),
    "kdq 4 bits (LSQ)": LowBit(weight_bits=4, act_bits=4),
    "kdq 1 bit": Binary(),
}
TOLERANCE = 0.5  # of the first step's loss: it says only that the same thing is trained


@torch.inference_mode(False)
def training_step_cases(quick: bool) -> list[Case]:
    torch.manual_seed(8)
    if quick:
        return [training_case("mlp 32-64-8, batch 4", mlp(32, 64, 8), torch.randn(4, 32))]
    return [
        training_case("mlp 784-1024-1024-10, batch 128", mlp(784, 1024, 1024, 10), torch.randn(128, 784)),
        training_case("encoder of 2 layers, 256 wide, batch 16 x 64", encoder(2, 256, 4), torch.randn(16, 64, 256)),
    ]


def training_case(shape: str, model: nn.Module, x: Tensor) -> Case:
    target = torch.randint(model(x).shape[-1], x.shape[:-1])
    contenders = [Contender("torch float32", training_step(copy.deepcopy(model), x, target), "peer", 1e-5)]
    for name, config in SCHEMES.items():
        student = copy.deepcopy(model)
        prepare_qat_(student, config)
        contenders.append(Contender(name, training_step(student, x, target), "ours", TOLERANCE))
    reference = loss_of(model, x, target).detach()
    limits = [float32_products(3 * linear_operations(model, x.numel() // x.shape[-1]))]
    return Case("training_step", shape, limits, reference, contenders)


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), target.flatten())


def training_step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """One step of AdamW; returns the loss before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer.zero_grad()
            loss = loss_of(model, x, target)
            loss.backward()
            optimizer.step()
            return loss.detach()

    return run
