"""Attention on every instruction set, against the formula in float64 and against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import kdq_kernels as kk
import kdq_kernels.numpy as kn
from kdq_kernels._torch_library.attention import attention_by_torch

every_isa = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Array = NDArray[Any]
SIZES = st.sampled_from([1, 2, 5, 6, 7, 13, 16, 31, 40, 47, 48, 49, 63, 64, 65, 100])
KEYS = st.one_of(SIZES, st.sampled_from([255, 256, 257, 300, 511, 600]))


def expected(q: Array, k: Array, v: Array, mask: Array | None, causal: bool, scale: float) -> Array:
    """In float64. A query that no key takes part for gets zeros."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = scale * q @ k.swapaxes(2, 3)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        scores[..., np.triu(np.ones(scores.shape[2:], bool), 1)] = -np.inf
    largest = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    total = weights.sum(-1, keepdims=True)
    return (weights / np.where(total == 0, 1, total)) @ v


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    queries, keys, size, values = draw(SIZES), draw(KEYS), draw(SIZES), draw(SIZES)
    dtype = draw(st.sampled_from(["f4", "f2"]))
    spread = draw(st.sampled_from([1, 5]))
    q = rng.normal(size=(batch, kv_heads * group, queries, size)) * spread
    k, v = rng.normal(size=(batch, kv_heads, keys, size)), rng.normal(size=(batch, kv_heads, keys, values))
    shape = [1 if draw(st.booleans()) else n for n in q.shape[:3]] + [keys]
    mask: Array | None = None
    kind = draw(st.sampled_from(["none", "bool", "float", "-inf", "smallest"]))
    if kind != "none":
        mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.7, 1.0]))
    if mask is not None and kind != "bool":
        off = {"float": -30, "-inf": -np.inf, "smallest": np.finfo("f4").min}[kind]
        mask = np.where(mask, rng.normal(size=shape) * 3, off).astype("f4")
    return {
        "operands": [x.astype(dtype) for x in (q, k, v)],
        "mask": mask,
        "causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.125, 1.0, -0.3])),
    }


@every_isa
@given(case=cases())
def test_is_the_formula(isa: str, case: dict[str, Any]) -> None:
    (q, k, v), mask, causal, scale = case["operands"], case["mask"], case["causal"], case["scale"]
    y = kn.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    want = expected(q, k, v, mask, causal, scale)
    assert y.dtype == q.dtype
    largest_score = abs(scale) * np.abs(q).max() * np.abs(k).astype("f8").sum(-1).max()
    accuracy = (1e-5 if q.dtype == np.float32 else 2e-3) + 2e-7 * largest_score  # a score's error is its weight's, too
    np.testing.assert_allclose(y, want, rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mask_heads", [None, 1, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_one_query_of_grouped_heads(
    isa: str, causal: bool, kv_heads: int, mask_heads: int | None, threads: int
) -> None:
    """As in generating text: heads that share keys go over them together, each with its own mask and place."""
    rng = np.random.default_rng(kv_heads)
    q = rng.normal(size=(2, 1, 8, 40)).astype("f4").swapaxes(1, 2)
    k, v = (rng.normal(size=(2, 300, kv_heads, size)).astype("f4").swapaxes(1, 2) for size in (40, 24))
    mask = None if mask_heads is None else rng.random((2, mask_heads, 1, 300)) < 0.5
    want = expected(q, k, v, mask, causal, 0.2)
    before = kn.num_threads()
    try:
        kn.set_num_threads(threads)
        y = kn.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.2)
    finally:
        kn.set_num_threads(before)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    torch_mask = None if mask is None else torch.from_numpy(mask)
    operands = [torch.from_numpy(x) for x in (q, k, v)]
    same = kk.scaled_dot_product_attention(*operands, torch_mask, is_causal=causal, scale=0.2)
    np.testing.assert_array_equal(same, y)


def test_long_sequences_are_rescaled_block_by_block(isa: str) -> None:
    """Each block of keys holds the largest score of all so far: a wrong factor between blocks would show."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1, n, 24)).astype("f4") for n in (9, 1100, 1100))
    q[..., 0], k[..., 0] = 4, np.linspace(-8, 8, 1100)
    for causal in (False, True):
        y = kn.scaled_dot_product_attention(q, k, v, is_causal=causal)
        np.testing.assert_allclose(y, expected(q, k, v, None, causal, 24**-0.5), rtol=2e-5, atol=2e-5)


def test_large_scores_do_not_overflow(isa: str) -> None:
    q = np.full((1, 1, 3, 8), 1e3, "f4")
    k = np.linspace(-1e3, 1e3, 8 * 40, dtype="f4").reshape(1, 1, 40, 8)
    v = np.random.default_rng(1).normal(size=(1, 1, 40, 8)).astype("f4")
    np.testing.assert_allclose(kn.scaled_dot_product_attention(q, k, v), expected(q, k, v, None, False, 8**-0.5))


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_without_keys_gets_zeros(isa: str, causal: bool) -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(1, 2, n, 20)).astype("f4") for n in (7, 300, 300))
    mask = np.ones((1, 1, 7, 300), bool)
    mask[:, :, 3] = False
    mask[:, :, 4, :256] = False  # its first key is in the second block
    y = kn.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    assert not y[:, :, 3].any()
    assert y[:, :, 4].any() != causal
    np.testing.assert_allclose(y, expected(q, k, v, mask, causal, 20**-0.5), atol=1e-5)
    none = kn.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0])
    assert none.shape == (1, 2, 7, 20)
    assert not none.any()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_inf_are_not_hidden(isa: str, poison: float, which: int) -> None:
    operands = [np.random.default_rng(3).normal(size=(1, 2, 11, 33)).astype("f4") for _ in range(3)]
    operands[which][0, 0, 5, 7] = poison
    y = kn.scaled_dot_product_attention(*operands)
    assert not np.isfinite(y[0, 0, 5]).all()
    assert np.isfinite(y[0, 1]).all()


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_torch_on_parts_of_a_joint_projection(isa: str, device: str, dtype: torch.dtype) -> None:
    q, k, v = randn(2, 50, 3, 4, 64, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
    assert not q.is_contiguous()
    y = kk.scaled_dot_product_attention(q, k, v)
    assert y.dtype == dtype
    assert y.transpose(1, 2).is_contiguous()
    accuracy = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v), rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_and_causal_together(device: str, kind: torch.dtype, causal: bool) -> None:
    q, k, v = (randn(2, 3, 17, 16, device=device) + i for i in range(3))
    keep = torch.rand(2, 1, 1, 17, generator=torch.Generator().manual_seed(5)).to(device) < 0.6
    keep[..., 0] = True
    mask = keep if kind == torch.bool else torch.zeros_like(keep, dtype=kind).masked_fill(~keep, -torch.inf)
    seen = keep.expand(2, 1, 17, 17)
    if causal:
        seen = seen & torch.ones(17, 17, dtype=torch.bool, device=device).tril()
    y = kk.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_what_gpus_run_is_the_same_function(kind: torch.dtype | None, causal: bool) -> None:
    q, k, v = randn(2, 4, 17, 16), randn(2, 2, 17, 16), randn(2, 2, 17, 16)
    keep = (torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(6)) < 0.6) | torch.eye(
        17, dtype=torch.bool
    )
    mask = {
        None: None,
        torch.bool: keep,
        torch.float32: torch.where(keep, randn(2, 1, 17, 17), -torch.inf),
    }[kind]
    y = attention_by_torch(q, k, v, mask, causal, 0.3)
    ours = kk.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.3)
    torch.testing.assert_close(y, ours, rtol=1e-5, atol=1e-5)
    assert y.stride() == ours.stride()


def test_last_axes_that_are_not_dense_are_copied() -> None:
    q, k, v = (randn(1, 2, 8, 12).transpose(2, 3) for _ in range(3))
    mask = (randn(1, 1, 12, 12) > 0).transpose(2, 3)
    dense = kk.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask.contiguous())
    assert kk.scaled_dot_product_attention(q, k, v, mask).equal(dense)


@pytest.mark.parametrize("queries", [577, 1200])
def test_more_queries_than_one_pass_takes(isa: str, queries: int) -> None:
    q, k, v = randn(1, 1, queries, 8), randn(1, 1, 300, 8), randn(1, 1, 300, 8)
    for causal in (False, True):
        y = kk.scaled_dot_product_attention(q, k, v, is_causal=causal)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_operands_that_are_expanded_are_read_where_they_are(isa: str) -> None:
    q, k, v = randn(2, 3, 7, 16), randn(1, 1, 9, 16).expand(2, 3, 9, 16), randn(2, 1, 1, 16).expand(2, 3, 9, 16)
    mask = (randn(1, 1, 1, 9) > 0).expand(2, 3, 7, 9)
    y = kk.scaled_dot_product_attention(q, k, v, mask)
    want = F.scaled_dot_product_attention(q, k.contiguous(), v.contiguous(), mask.contiguous())
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [500, 700])
def test_threads_change_nothing(causal: bool, queries: int) -> None:
    q, k, v = randn(3, 3, 5, queries, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(kk.scaled_dot_product_attention(q, k, v, is_causal=causal))
    finally:
        torch.set_num_threads(before)
    assert all(y.equal(results[0]) for y in results)


def test_compiled_and_exported(device: str) -> None:
    q, k, v = randn(3, 1, 2, 9, 16, device=device)

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kk.scaled_dot_product_attention(q * 2, k, v, is_causal=True).transpose(1, 2).flatten(2)

    eager = Model()(q, k, v)
    torch.testing.assert_close(torch.compile(Model(), fullgraph=True)(q, k, v), eager)
    exported = torch.export.export(Model(), (q, k, v))
    assert any(node.target == torch.ops.kdq.scaled_dot_product_attention.default for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(q, k, v), eager)


X = torch.zeros(1, 4, 3, 8)
attention = kk.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(X[0], X, X), r"query: expected 4 axes, got shape \[4, 3, 8\]"),
        (lambda: attention(X.double(), X, X), "query: expected dtype float32.*float64"),
        (lambda: attention(X, X.half(), X), "key: expected dtype float32, got float16"),
        (lambda: attention(X, X[..., :7], X), r"key: expected shape \[1, 4, 3, 8\], got \[1, 4, 3, 7\]"),
        (lambda: attention(X, X, X[:, :, :2]), r"value: expected shape \[1, 4, 3, 8\], got \[1, 4, 2, 8\]"),
        (
            lambda: attention(X, X[:, :3], X[:, :3]),
            "key: expected a number of heads that divides the 4 of query, got 3",
        ),
        (
            lambda: attention(X, X, X, X[..., :3] > 0, scale=float("nan")),
            "scale: expected a number of at most 1e38, got nan",
        ),
        (lambda: attention(X, X, X, X[..., :2]), r"attn_mask: expected shape \[1, 4, 3, 3\].*got \[1, 4, 3, 2\]"),
        (lambda: attention(X, X, X, X[:, :2, :, :3]), r"attn_mask: expected shape \[1, 4, 3, 3\].*got \[1, 2, 3, 3\]"),
        (lambda: attention(X, X, X, X[..., :3].half()), "attn_mask: expected dtype bool or float32, got float16"),
        (lambda: attention(X[..., :0], X[..., :0], X), "at least 1 of a head"),
        (lambda: kn.scaled_dot_product_attention(X.numpy(), X.numpy(), X[0].numpy()), "value: expected 4 axes"),
        (
            lambda: kn.scaled_dot_product_attention(X.numpy(), X.numpy(), X.numpy(), X.numpy()[..., :2]),
            r"attn_mask: expected.*\[1, 4, 3, 3\], got float32 \[1, 4, 3, 2\]",
        ),
    ],
)
def test_bad_arguments_raise_value_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_without_queries_or_batch() -> None:
    assert attention(X[:, :, :0], X, X).shape == (1, 4, 0, 8)
    assert attention(X[:0], X[:0], X[:0]).shape == (0, 4, 3, 8)
