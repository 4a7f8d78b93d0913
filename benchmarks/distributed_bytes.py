"""Bytes that ranks exchange in a step of distillation, counted on a loopback interface, against arithmetic.

    unshare --net sh -c 'ip link set lo up; torchrun --standalone --nproc-per-node 2 benchmarks/distributed_bytes.py'

docs/distributed.md has the table. What TCP adds is counted too. gloo scatters sums by an all-reduce, so that FSDP2's
gradients take twice the bytes that they take with NCCL; this is computed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kdq
from kdq.distributed import learned_scales, parameter_groups

WIDTH, LAYERS, ROWS, STEPS = 1024, 8, 16, 5
PRECISIONS = [kdq.Int8Dynamic(), kdq.LowBit(weight_bits=4, act_bits=4), kdq.Binary()]


def sent() -> int:
    """Bytes that the interface has sent so far."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()) for _ in range(LAYERS)))


def low_bit() -> nn.Sequential:
    student = net()
    kdq.prepare_qat_(student, kdq.LowBit(weight_bits=4, act_bits=4))
    return student


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Sequential) -> nn.Module:
    scales = learned_scales(model)
    for block in model:
        fully_shard(block, ignored_params=scales)
    fully_shard(model, ignored_params=scales)
    return model


def switchable() -> nn.Sequential:
    student = net()
    kdq.prepare_switchable_(student, PRECISIONS)
    return student


def per_step(distiller: kdq.Distiller) -> float:
    """Bytes a step and rank, after the first two steps, in which DDP and FSDP2 set themselves up."""
    optimizer = torch.optim.SGD(parameter_groups(distiller.parameters()), lr=1e-4)

    def steps(count: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            yield torch.randn(ROWS, WIDTH)

    for batch in steps(2):
        distiller.loss(batch).backward()
        optimizer.step()
    dist.barrier()
    before = sent()
    dist.barrier()
    for batch in steps(STEPS):
        optimizer.zero_grad()
        distiller.loss(batch).backward()
        optimizer.step()
    dist.barrier()
    return (sent() - before) / STEPS / dist.get_world_size()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, weights = dist.get_world_size(), LAYERS * WIDTH * WIDTH
    scales = sum(p.numel() for p in learned_scales(low_bit()))
    once = 4 * (ranks - 1) / ranks  # bytes that a rank sends to gather or to scatter a float32 number
    all_reduce, scatter = 2 * once, 2 * once  # with NCCL the scatter is once
    plain, losses = net(), [kdq.SoftTargets()]
    cases: list[tuple[str, kdq.Distiller, float]] = [
        ("DDP, float student", kdq.Distiller(plain, ddp(net()), losses), all_reduce * weights),
        ("DDP, 4 bits (LSQ)", kdq.Distiller(plain, ddp(low_bit()), losses), all_reduce * (weights + scales)),
        (
            "FSDP2, 4 bits (LSQ)",
            kdq.Distiller(plain, sharded(low_bit()), losses),
            (2 * once + scatter) * weights + all_reduce * scales,
        ),
        (
            "the same, teacher sharded too",
            kdq.Distiller(sharded(net()), sharded(low_bit()), losses),
            (3 * once + scatter) * weights + all_reduce * scales,
        ),
        (
            "FSDP2, switchable, 3 precisions a step",
            kdq.SwitchableDistiller(plain, sharded(switchable()), losses),
            (3 * 2 * once + scatter) * weights + all_reduce * scales,  # the widest and the narrowest learn no scales
        ),
    ]
    if dist.get_rank() == 0:
        print(f"{weights:,} weights and {scales:,} learned scales and zero points, {ranks} ranks")
        print("| | computed, MB a rank and step | counted |\n|---|---:|---:|")
    for name, distiller, computed in cases:
        counted = per_step(distiller)
        if dist.get_rank() == 0:
            print(f"| {name} | {computed / 1e6:.2f} | {counted / 1e6:.2f} |", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
