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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_that_it_does_not_take_go_to_torch(dtype: torch.dtype) -> None:
    """With autocast, queries and keys are float32 behind their rotation, values bfloat16."""
    model, reference = causal(), causal()
    use_attention_kernel_(model)
    if dtype == torch.float64:
        model.double(), reference.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits)


def test_attention_that_it_does_not_compute_is_refused() -> None:
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
    with pytest.raises(ValueError, match="model: Gemma2ForCausalLM caps the logits of its attention"):
        use_attention_kernel_(gemma)
    sinks = transformers.GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2)
    with pytest.raises(ValueError, match="model: GptOssForCausalLM has attention that 'sdpa' does not compute"):
        use_attention_kernel_(transformers.GptOssForCausalLM(sinks))


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a transformers\.PreTrainedModel, got Sequential"):
        use_attention_kernel_(mlp(8))
