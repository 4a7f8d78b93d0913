"""Hugging Face models whose attention runs on the kernel: the same results as with torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdq
from small_models import mlp

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from kdq.integrations.transformers_attention import use_attention_kernel_  # noqa: E402

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones(3, 11, dtype=torch.int64)
PADDING[0, 7:] = 0
PADDING[2, 10:] = 0


def causal() -> Any:
    """Grouped-query attention, two heads a key."""
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def encoder() -> Any:
    torch.manual_seed(1)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def kernel_calls(model: Any, **inputs: Any) -> int:
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(**inputs)
    return [event.name for event in profile.events()].count("kdq::scaled_dot_product_attention")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [causal, encoder])
def test_gives_what_torchs_attention_gives(make: Any, padded: bool) -> None:
    model, reference = make(), make()
    use_attention_kernel_(model)
    inputs = {"input_ids": TOKENS, **({"attention_mask": PADDING} if padded else {})}
    with torch.no_grad():
        y, expected = model(**inputs)[0], reference(**inputs)[0]
    kept = PADDING.bool() if padded else torch.ones_like(TOKENS, dtype=torch.bool)
    torch.testing.assert_close(y[kept], expected[kept], rtol=1e-4, atol=1e-5)
    assert kernel_calls(model, **inputs) == 2
    assert kernel_calls(reference, **inputs) == 0


def test_generates_the_same_tokens() -> None:
    model, reference = causal(), causal()
    use_attention_kernel_(model)
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": TOKENS.flip(1), "attention_mask": PADDING.flip(1)}
    assert model.generate(**inputs, **settings).equal(reference.generate(**inputs, **settings))


def test_quantized_models_take_it_too() -> None:
    model = causal()
    kdq.quantize_(model, kdq.Int8Dynamic())
    with torch.no_grad():
        expected = model(TOKENS).logits
        use_attention_kernel_(model)
        y = model(TOKENS).logits
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_trains_by_torchs_attention() -> None:
    model, reference = causal(), causal()
    use_attention_kernel_(model)
    grads = []
    for m in (model, reference):
        m(TOKENS, labels=TOKENS).loss.backward()
        grads.append(m.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a transformers\.PreTrainedModel, got Sequential"):
        use_attention_kernel_(mlp(8))
