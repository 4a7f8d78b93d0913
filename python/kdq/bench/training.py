"""What quantization-aware training costs: one step (forward, backward, AdamW) beside the same step in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.bench.case import Case, Contender
from kdq.bench.limits import float_products
from kdq.bench.models import encoder, mlp, operations
from kdq.bench.target import Target
from kdq.configs import Binary, Config, Int8Dynamic, LowBit
from kdq.quantize import prepare_qat_

SCHEMES: dict[str, Config] = {
    "kdq int8": Int8Dynamic(),
    "kdq 4 bits (LSQ)": LowBit(weight_bits=4, act_bits=4),
    "kdq 1 bit": Binary(),
}
TOLERANCE = 0.5  # of the first step's loss: it says only that the same thing is trained


@torch.inference_mode(False)
def training_step_cases(target: Target) -> list[Case]:
    torch.manual_seed(8)
    device = target.device
    if target.quick:
        return [training_case("mlp 32-64-8, batch 4", mlp(32, 64, 8), torch.randn(4, 32), device)]
    wide, deep = "mlp 784-1024-1024-10, batch 128", "encoder of 2 layers, 256 wide, batch 16 x 64"
    return [
        training_case(wide, mlp(784, 1024, 1024, 10), torch.randn(128, 784), device),
        training_case(deep, encoder(2, 256, 4), torch.randn(16, 64, 256), device),
    ]


def training_case(shape: str, model: nn.Module, x: Tensor, device: torch.device) -> Case:
    """Prepared on the CPU, then moved."""
    labels = torch.randint(model(x).shape[-1], x.shape[:-1]).to(device)
    x = x.to(device)
    plain = copy.deepcopy(model).to(device)
    reference = loss_of(plain, x, labels).detach()
    contenders = [Contender("torch float32", training_step(plain, x, labels), "peer", 1e-5)]
    for name, config in SCHEMES.items():
        student = copy.deepcopy(model)
        prepare_qat_(student, config)
        contenders.append(Contender(name, training_step(student.to(device), x, labels), "ours", TOLERANCE))
    limits = [float_products(3 * operations(model, x), x.dtype)]
    return Case("training_step", shape, limits, reference, contenders)


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), labels.flatten())


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """One step of AdamW; returns the loss before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer.zero_grad()
            loss = loss_of(model, x, labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

    return run
