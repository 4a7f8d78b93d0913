"""`Distiller.loss` in a loop of the real Accelerate, against `Distiller.fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from loop_cases import (
    CLIP,
    X,
    Y,
    distiller_of,
    halving,
    same,
    tensors_in,
    without,
)


@pytest.mark.parametrize(("precision", "clip"), [("no", None), ("no", CLIP), ("bf16", None)])
def test_accelerate_needs_nothing_but_the_loss(precision: str, clip: float | None, tmp_path: Path) -> None:
    """If gradients are clipped, the learning rate falls, too."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    ours, theirs = distiller_of(), distiller_of()
    batches = DataLoader(TensorDataset(X, Y), batch_size=6)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision, project_dir=tmp_path
    )
    student, adapter = ours.student.train(), ours.adapters[1, "0"]
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)
    scheduler = halving(optimizer) if clip else None
    student, adapter, optimizer, loader, scheduler = accelerator.prepare(
        student, adapter, optimizer, batches, scheduler
    )
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(student), accelerator.autocast():
                accelerator.backward(ours.loss(batch))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(ours.parameters(), clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    options: dict[str, Any] = {"scheduler": halving(adam) if clip else None, "clip_grad_norm": clip}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        theirs.fit(batches, 2, adam, accumulate=2, progress=False, **options)
    tolerance = (0.0, 0.0) if precision == "no" else (1e-2, 1e-3)  # accelerate turns the logits to float32
    same(ours.student, theirs.student, *tolerance)
    same(ours.adapters[1, "0"], theirs.adapters[1, "0"], *tolerance)
    accelerator.save_state(str(tmp_path / "state"))
    kept = [torch.load(file, weights_only=False) for file in (tmp_path / "state").glob("*.bin")]
    from safetensors.torch import load_file

    weights = [load_file(file) for file in (tmp_path / "state").glob("*.safetensors")]
    assert [set(w) for w in weights if len(w) > 2] == [set(student.state_dict())]
    assert without(ours.teacher, tensors_in([*kept, *weights]))
