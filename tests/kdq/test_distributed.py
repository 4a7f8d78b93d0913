"""Training on several processes: two do what `distributed_ranks` says; the page's example runs under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distributed_ranks
import kdq
import kdq.ranks as ranks_module
from small_models import mlp, randn

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
LIMIT = 180  # seconds; far above what it takes
DEATH = "a_rank_that_dies-ddp"  # comes after all others, in the same two processes
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


def torchrun(folder: Path, *script: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr


def run_ranks(folder: Path, *names: str) -> None:
    """Two processes run the checks of these names, and leave in the folder what they found."""
    processes = [
        subprocess.Popen(
            [sys.executable, distributed_ranks.__file__, str(rank), str(folder), *names],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(distributed_ranks.RANKS)
    ]
    try:
        for rank, process in enumerate(processes):
            (folder / f"stderr.{rank}").write_text(process.communicate(timeout=LIMIT)[1])
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes found. One of them dies in the last check."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(folder, *distributed_ranks.NAMES, DEATH)
    return folder


@pytest.mark.parametrize("check", distributed_ranks.NAMES)
def test_ranks_do_what_one_process_does(ranks: Path, check: str) -> None:
    for rank in range(distributed_ranks.RANKS):
        found = ranks / f"{check}.{rank}"
        assert found.exists(), f"rank {rank} did not get here: {(ranks / f'stderr.{rank}').read_text()}"
        assert found.read_text() == ""


@pytest.mark.parametrize("check", distributed_ranks.DEATHS)
def test_a_rank_that_dies_is_an_error_on_the_others(check: str, ranks: Path, tmp_path: Path) -> None:
    folder = ranks
    if check != DEATH:
        folder = tmp_path
        run_ranks(folder, check)
    found = folder / f"{check}.0"
    assert found.exists(), (folder / "stderr.0").read_text()
    assert found.read_text() == ""
    assert not (folder / f"{check}.1").exists()


def test_the_example_of_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    """And its file, written by rank 0, holds a student on the kernels."""
    (code,) = re.findall(r"```python\n(# train\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "train.py").write_text(code)
    torchrun(tmp_path, "train.py")
    student = kdq.load(tmp_path / "student.safetensors")
    assert any(isinstance(module, kdq.LowBitLinear) for module in student.modules())


def test_loops_of_other_libraries_under_torchrun(tmp_path: Path) -> None:
    """transformers, Lightning and Accelerate on two processes do what `fit` does in one."""
    for library in ("transformers", "lightning", "accelerate"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    torchrun(tmp_path, str(Path(distributed_ranks.__file__).with_name("loops_under_torchrun.py")), str(tmp_path))


def test_without_processes_nothing_is_shared() -> None:
    model = mlp(8)
    with kdq.distributed.together():
        assert not ranks_module.pooling()
        x = randn(3, 6)
        rows, first = ranks_module.gather_rows(x)
        assert rows is x
        assert first == 0
        assert ranks_module.share_of_rows(3, x.device) == 1.0
        assert list(ranks_module.batches_in_step([1, 2], None)) == [1, 2]
    assert kdq.distributed.unwrapped(model) is model
    assert not kdq.distributed.is_spread(model)
    kdq.prepare_qat_(model, kdq.LowBit(weight_bits=4, act_bits=4))
    model(randn(3, 6))
    names = {name for name, p in model.named_parameters() if p in kdq.distributed.learned_scales(model)}
    parts = ("weight_scale", "input_grid.scale", "input_grid.zero_point")
    assert names == {f"{layer}.{part}" for layer in (0, 2) for part in parts}


def test_plain_gradients_are_clipped_as_by_torch() -> None:
    pair = [mlp(8), mlp(8)]
    for model in pair:
        model(randn(5, 6)).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(pair[0].parameters(), 0.1)
    kdq.distributed.clip_gradients_(list(pair[1].parameters()), 0.1)
    for ours, theirs in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
