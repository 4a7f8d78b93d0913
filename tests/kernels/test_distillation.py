"""The distillation loss on every instruction set, against formulas in float64 and against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import kdq_kernels as kk
import kdq_kernels.numpy as kn

every_isa = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Array = NDArray[Any]


def log_softmax(x: Array) -> Array:
    shifted = x.astype(np.float64) - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected(s: Array, t: Array, target: Array | None, temperature: float, alpha: float) -> tuple[float, Array]:
    """Loss and gradient in float64, rows `[rows, classes]`."""
    s, t = s.astype(np.float64), t.astype(np.float64)
    kept = np.ones(len(s), bool) if target is None else target != -100
    grad = np.zeros_like(s)
    if not kept.any():
        return 0.0, grad
    log_q, log_p, log_label = log_softmax(s / temperature), log_softmax(t / temperature), log_softmax(s)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        loss = alpha * temperature**2 * np.where(p == 0, 0, p * (log_p - log_q)).sum(-1)
    grad += alpha * temperature * (np.exp(log_q) - p)
    if target is not None:
        at = np.arange(len(s)), np.where(kept, target, 0)
        loss += (1 - alpha) * -log_label[at]
        grad += (1 - alpha) * np.exp(log_label)
        grad[at] -= 1 - alpha
    grad[~kept] = 0
    return loss[kept].mean(), grad / kept.sum()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, classes = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7, 8, 9, 16, 31, 100, 2048, 2049, 5000]))
    dtype = draw(st.sampled_from(["f4", "f2"]))
    spread, shift = draw(st.sampled_from([(1, 0), (10, 0), (1, 300), (0, -5)]))
    logits = [(rng.normal(size=(rows, classes)) * spread + shift).astype(dtype) for _ in range(2)]
    target = rng.integers(0, classes, rows)
    target[rng.random(rows) < draw(st.sampled_from([0, 0.3, 1]))] = -100
    alpha = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return {
        "logits": logits,
        "target": target if alpha < 1 or draw(st.booleans()) else None,
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0, 4.0])),
        "alpha": alpha,
    }


@every_isa
@given(case=cases())
def test_is_the_formula(isa: str, case: dict[str, Any]) -> None:
    (s, t), target, temperature, alpha = case["logits"], case["target"], case["temperature"], case["alpha"]
    want, want_grad = expected(s, t, target, temperature, alpha)
    settings = {"temperature": temperature, "alpha": alpha}
    loss, grad = kn.distillation_loss_gradient(s, t, target, **settings)
    assert loss == pytest.approx(want, rel=2e-6, abs=2e-6 * temperature**2)
    assert grad.dtype == s.dtype
    accuracy = 2e-6 if s.dtype == np.float32 else 1e-3
    np.testing.assert_allclose(grad, want_grad, rtol=accuracy, atol=accuracy * temperature / len(s))
    assert kn.distillation_loss(s, t, target, **settings) == loss


def test_of_itself_is_zero(isa: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, 777)).astype("f4") * 20
    loss, grad = kn.distillation_loss_gradient(x, x, temperature=3.0, alpha=1.0)
    assert loss == 0
    assert not grad.any()


def test_classes_that_the_teacher_rules_out_count_nothing(isa: str) -> None:
    rng = np.random.default_rng(1)
    s, t = rng.normal(size=(2, 4, 50)).astype("f4")
    ruled_out = rng.random((4, 50)) < 0.5
    t[ruled_out] = -np.inf
    want = expected(s, t, None, 2.0, 1.0)
    loss, grad = kn.distillation_loss_gradient(s, t, temperature=2.0, alpha=1.0)
    assert loss == pytest.approx(want[0], rel=1e-5)
    np.testing.assert_allclose(grad, want[1], atol=1e-6)
    s[ruled_out] = -np.inf  # both rule them out
    loss, grad = kn.distillation_loss_gradient(s, t, temperature=2.0, alpha=1.0)
    assert np.isfinite(loss)
    assert not grad[ruled_out].any()
    s[:] = rng.normal(size=s.shape)
    s[0, np.flatnonzero(~ruled_out[0])[0]] = -np.inf  # the student rules out what the teacher does not
    assert kn.distillation_loss(s, t, temperature=2.0, alpha=1.0) == np.inf


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 40, 99])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_are_not_hidden(isa: str, poison: float, place: int, which: int) -> None:
    logits = np.random.default_rng(2).normal(size=(2, 3, 100)).astype("f4")
    logits[which, 1, place] = poison
    loss, grad = kn.distillation_loss_gradient(*logits, temperature=2.0, alpha=1.0)
    assert np.isnan(loss)
    assert np.isnan(grad[1]).any()
    assert np.isfinite(grad[[0, 2]]).all()


def random_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    s, t = torch.randn(2, 2, 9, 333, generator=generator).to(dtype)
    target = torch.randint(333, (2, 9), generator=generator)
    target[0, 3] = -100
    return s.requires_grad_(), t, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_every_dtype(isa: str, dtype: torch.dtype) -> None:
    s, t, target = random_case(dtype)
    loss = kk.distillation_loss(s, t, target, temperature=2.0, alpha=0.7)
    (3 * loss).backward()
    rows = [x.detach().double().reshape(-1, 333).numpy() for x in (s, t)]
    want, want_grad = expected(rows[0], rows[1], target.flatten().numpy(), 2.0, 0.7)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)
    assert s.grad is not None
    torch.testing.assert_close(
        s.grad.double().reshape(-1, 333),
        3 * torch.from_numpy(want_grad),
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-7 if dtype == torch.float32 else 1e-5,
    )


def test_threads_and_strides_change_nothing() -> None:
    s, t, target = random_case()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(kk.distillation_loss(s.repeat(64, 1, 1), t.repeat(64, 1, 1), temperature=2.0, alpha=1.0))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]
    strided = s.detach().transpose(0, 1).contiguous().transpose(0, 1)
    a = kk.distillation_loss(strided, t, target, temperature=2.0, alpha=0.5)
    assert a == kk.distillation_loss(s, t, target, temperature=2.0, alpha=0.5)


def test_compiled_training_step_matches_eager() -> None:
    s, t, target = random_case()

    def step(student: Tensor) -> Tensor:
        return kk.distillation_loss(student * 2, t, target, temperature=2.0, alpha=0.5)

    step(s).backward()
    eager, s.grad = s.grad, None
    torch.compile(step, fullgraph=True)(s).backward()
    torch.testing.assert_close(s.grad, eager)


def test_gradients_pass_opcheck(device: str) -> None:
    s, t, target = (x.detach().to(device) for x in random_case())
    s.requires_grad_()
    torch.library.opcheck(torch.ops.kdq.distillation_loss.default, (s, t, target, 2.0, 0.5))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kk.distillation_loss(X, X[:, :2], temperature=1.0, alpha=1.0), r"teacher.*\[2, 3\].*\[2, 2\]"),
        (lambda: kk.distillation_loss(X, X.half(), temperature=1.0, alpha=1.0), "teacher: expected dtype float32"),
        (lambda: kk.distillation_loss(X.double(), X, temperature=1.0, alpha=1.0), "student: expected dtype"),
        (lambda: kk.distillation_loss(X, X, temperature=1.0, alpha=0.5), "target: expected class indices.*none"),
        (lambda: kk.distillation_loss(X, X, torch.tensor([0, 3]), temperature=1.0, alpha=0.5), "target.*got 3 at.* 1"),
        (lambda: kk.distillation_loss(X, X, torch.tensor([0]), temperature=1.0, alpha=0.5), "target.*shape"),
        (lambda: kk.distillation_loss(X, X, X[:, 0], temperature=1.0, alpha=0.5), "target: expected dtype int64"),
        (lambda: kk.distillation_loss(X, X, temperature=0.0, alpha=1.0), "temperature.*got 0"),
        (lambda: kk.distillation_loss(X, X, temperature=float("nan"), alpha=1.0), "temperature.*nan"),
        (lambda: kk.distillation_loss(X, X, temperature=1.0, alpha=1.5), "alpha.*1.5"),
        (lambda: kk.distillation_loss(X[:, :0], X[:, :0], temperature=1.0, alpha=1.0), "student.*at least 1 class"),
        (lambda: kn.distillation_loss(X.numpy(), X.half().numpy(), temperature=1.0, alpha=1.0), "teacher.*float16"),
    ],
)
def test_bad_arguments_raise_value_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_rows_are_no_loss(device: str) -> None:
    empty = torch.zeros(0, 3, requires_grad=True, device=device)
    loss = kk.distillation_loss(empty, empty.detach(), temperature=1.0, alpha=1.0)
    loss.backward()
    assert loss == 0
