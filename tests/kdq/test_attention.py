"""Attention that consists of linear layers: the same as nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_cases import CAUSAL, HEADS, E, L, N, S, layer, sequence
from kdq.layers import MultiheadAttention
from small_models import randn


def both(theirs: nn.Module, ours: nn.Module, *args: Any, **kwargs: Any) -> list[list[Tensor | None]]:
    """Results of both, with the same random numbers, and gradients of their inputs."""
    found = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        leaves = {id(x): x.detach().clone().requires_grad_() for x in args}
        y, weights = module(*(leaves[id(x)] for x in args), **kwargs)
        loss = y.square().sum() if weights is None else y.square().sum() + weights.square().sum()
        loss.backward()
        found.append([y, weights, *(x.grad for x in leaves.values())])
    return found


def close(found: list[list[Tensor | None]]) -> None:
    theirs, ours = found
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        if a is None:
            assert b is None
        else:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no_batch"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("training", [True, False], ids=["dropout", "eval"])
@pytest.mark.parametrize("weights", [None, True, False], ids=["no_weights", "averaged", "by_head"])
def test_self_attention(batch_first: bool, batched: bool, bias: bool, training: bool, weights: bool | None) -> None:
    theirs = layer(batch_first=batch_first, bias=bias, dropout=0.3).train(training)
    ours = MultiheadAttention(theirs)
    x = sequence(L, batch_first=batch_first, batched=batched)
    close(both(theirs, ours, x, x, x, need_weights=weights is not None, average_attn_weights=bool(weights)))


@pytest.mark.parametrize("same", ["none", "key is value", "query is key", "query is value"])
def test_queries_keys_and_values_of_their_own(same: str) -> None:
    theirs = layer(batch_first=True)
    q, k, v = (sequence(L, seed=i) for i in range(3))
    if same == "none":
        k, v = sequence(S, seed=1), sequence(S, seed=2)
    k = v if same == "key is value" else q if same == "query is key" else k
    v = q if same == "query is value" else v
    close(both(theirs, MultiheadAttention(theirs), q, k, v))
    close(both(theirs, MultiheadAttention(theirs), q, k, v, need_weights=False))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(6, 10), (E, 10), (6, E)], ids=str)
def test_keys_and_values_of_other_widths(batch_first: bool, bias: bool, widths: tuple[int, int]) -> None:
    theirs = layer(batch_first=batch_first, bias=bias, kdim=widths[0], vdim=widths[1])
    sides = ((L, E), (S, widths[0]), (S, widths[1]))
    args = [sequence(*side, batch_first=batch_first, seed=i) for i, side in enumerate(sides)]
    close(both(theirs, MultiheadAttention(theirs), *args))


def test_gradients_of_parameters() -> None:
    theirs = layer(batch_first=True)
    ours = MultiheadAttention(theirs)
    q, k, v = sequence(L), sequence(S, seed=1), sequence(S, seed=2)
    found = []
    for module in (theirs, ours):
        module.zero_grad()
        module(q, k, v, need_weights=False)[0].square().sum().backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    expected, got = found
    for kind in ("weight", "bias"):
        packed = torch.cat([got.pop(f"{name}_proj.{kind}") for name in "qkv"])
        torch.testing.assert_close(packed, expected.pop(f"in_proj_{kind}"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


PADDING = torch.arange(L) >= torch.tensor([[4], [3]])
HEADWISE = torch.stack([CAUSAL, CAUSAL.T, CAUSAL & CAUSAL.T] * N)
MASKS: dict[str, dict[str, Any]] = {
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": randn(N, L, seed=3)},
    "2d": {"attn_mask": CAUSAL},
    "float 2d": {"attn_mask": randn(L, L, seed=4)},
    "3d": {"attn_mask": HEADWISE},
    "float 3d": {"attn_mask": randn(N * HEADS, L, L, seed=5)},
    "padding and 2d": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    "padding and 3d": {"key_padding_mask": PADDING, "attn_mask": HEADWISE},
    "float padding and 3d": {"key_padding_mask": randn(N, L, seed=3), "attn_mask": randn(N * HEADS, L, L, seed=5)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
    "nothing to see": {"key_padding_mask": torch.tensor([[False] * L, [True] * L])},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("grad", [True, False], ids=["by_torch", "by_kernel"])
def test_masks(masks: dict[str, Any], need_weights: bool, batch_first: bool, grad: bool) -> None:
    theirs = layer(batch_first=batch_first)
    ours = MultiheadAttention(theirs)
    x = sequence(L, batch_first=batch_first)
    with torch.set_grad_enabled(grad):
        expected, got = (m(x, x, x, need_weights=need_weights, **masks) for m in (theirs, ours))
        plain = ours(x, x, x, need_weights=need_weights)[0]
    assert not torch.allclose(got[0], plain)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_without_a_batch(need_weights: bool) -> None:
    theirs = layer()
    ours = MultiheadAttention(theirs)
    q, k = sequence(L, batched=False), sequence(S, batched=False, seed=1)
    for masks in (
        {"key_padding_mask": torch.arange(S) >= 4},
        {"attn_mask": randn(L, S) > 1},
        {"attn_mask": randn(HEADS, L, S) > 1},
        {"attn_mask": randn(HEADS, L, S), "key_padding_mask": randn(S)},
    ):
        close([list(m(q, k, k, need_weights=need_weights, **masks)) for m in (theirs, ours)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    theirs = layer(batch_first=True, dtype=dtype)
    ours = MultiheadAttention(theirs)
    x = sequence(L).to(dtype)
    for y, expected in zip(ours(x, x, x, PADDING), theirs(x, x, x, PADDING), strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_a_learned_mask_gets_its_gradient() -> None:
    theirs = layer(batch_first=True).requires_grad_(False)
    ours = MultiheadAttention(theirs)
    x = sequence(L)
    grads = []
    for m in (theirs, ours):
        bias = randn(L, L, seed=6).requires_grad_()
        m(x, x, x, attn_mask=bias, need_weights=False)[0].square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_forward_mode_is_left_to_torch() -> None:
    """Which says that it has none for its own kernel; the one here would give zeros in silence."""
    ours = MultiheadAttention(layer(batch_first=True).requires_grad_(False))
    x = sequence(L)
    with pytest.raises(NotImplementedError, match="forward"):
        torch.func.jvp(lambda x: ours(x, x, x, need_weights=False)[0], (x,), (x,))


def test_autocast() -> None:
    theirs = layer(batch_first=True)
    ours = MultiheadAttention(theirs)
    x = sequence(L)
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (True, False):
            expected, got = (m(x, x, x, PADDING, need_weights=need_weights)[0] for m in (theirs, ours))
            assert got.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (((L, E), (S, E), (N, S, E)), {}, r"value: expected 2 axes, 12 features in the last, got \[2, 7, 12\]"),
        (((E,), (E,), (E,)), {}, "query: expected 3 axes, or 2 without a batch, got 1"),
        (((N, L, 8), (N, S, E), (N, S, E)), {}, r"query: expected 3 axes, 12 features in the last, got \[2, 5, 8\]"),
        (((N, L, E), (N, S, 8), (N, S, E)), {}, r"key: expected 3 axes, 12 features in the last, got \[2, 7, 8\]"),
        (
            ((N, L, E), (N, S, E), (N, L, E)),
            {},
            r"value: expected the positions of key, \[2, 7, 12\], got \[2, 5, 12\]",
        ),
        (((N, L, E), (3, S, E), (3, S, E)), {}, "key: expected a batch of 2, as query has, got 3"),
        (((N, L, E),) * 3, {"is_causal": True}, "is_causal: expected attn_mask too"),
        (((N, L, E),) * 3, {"attn_mask": CAUSAL[:3]}, r"attn_mask: expected \[5, 5\] or \[6, 5, 5\], got \[3, 5\]"),
        (((N, L, E),) * 3, {"attn_mask": HEADWISE[:3]}, r"attn_mask: expected .*, got \[3, 5, 5\]"),
        (((N, L, E),) * 3, {"attn_mask": CAUSAL.int()}, "attn_mask: expected bool or a float dtype, got torch.int32"),
        (((N, L, E),) * 3, {"key_padding_mask": PADDING[0]}, r"key_padding_mask: expected \[2, 5\], got \[5\]"),
        (((L, E),) * 3, {"key_padding_mask": PADDING}, r"key_padding_mask: expected \[5\], got \[2, 5\]"),
    ],
)
def test_bad_inputs(args: Any, kwargs: dict[str, Any], message: str) -> None:
    ours = MultiheadAttention(layer(batch_first=True))
    with pytest.raises(ValueError, match=message):
        ours(*(torch.zeros(shape) for shape in args), **kwargs)


def test_nested_tensors_are_refused() -> None:
    ours = MultiheadAttention(layer(batch_first=True))
    x = torch.nested.nested_tensor([torch.zeros(L, E), torch.zeros(S, E)])
    with pytest.raises(ValueError, match="query: expected a padded tensor and key_padding_mask, got a nested tensor"):
        ours(x, x, x)
