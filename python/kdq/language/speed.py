"""Tokens a second of the language demo's models: reading a prompt and writing bytes one at a time, all models in turn.

What is timed is checked first: a model that decodes with a cache has to give the logits that its fake-quant twin gives
for the whole sequence at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kdq.demo import one_thread
from kdq.language.model import Cache, LanguageModel
from kdq.layers.base import InferenceLinear
from kdq.observe import evaluating
from kdq.reporting import Latency, interleaved_latency

LARGEST_DIFFERENCE = 0.05  # relative norm: a tie that rounds the other way moves what follows it by a step


@dataclass(frozen=True)
class Speed:
    """Of one model at batch 1.

    Attributes:
        prompt_bytes: that `prefill` reads at once; `decode` writes the byte behind as many.
        difference: of the logits with the cache from those expected, relative norm; None where nothing was expected.
    """

    prefill: Latency
    decode: Latency
    prompt_bytes: int
    difference: float | None

    def to_json(self) -> dict[str, object]:
        """With tokens a second: at the median, the slowest and the fastest round."""
        return {
            "prefill": _rates(self.prefill, self.prompt_bytes),
            "decode": _rates(self.decode, 1),
            "decode_us": 1e6 * self.decode.median,
            "prompt_bytes": self.prompt_bytes,
            "difference": self.difference,
        }


def _rates(time: Latency, tokens: int) -> list[float]:
    return [tokens / seconds for seconds in (time.median, time.slowest, time.fastest)]


class Given(nn.Module):
    """Stands for a linear layer that takes no time."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.features)


def without_products(model: LanguageModel) -> LanguageModel:
    """A copy of a quantized model without its linear layers: embeddings, norms, attention, additions, and calls. No
    kernel for products can be faster than that."""
    rest = copy.deepcopy(model)
    for name, module in list(rest.named_modules()):
        if isinstance(module, InferenceLinear):
            parent, _, key = name.rpartition(".")
            setattr(rest.get_submodule(parent), key, Given(module.out_features))
    return rest


def measure(
    models: Mapping[str, LanguageModel], expected: Mapping[str, LanguageModel], ids: Tensor, rounds: int
) -> dict[str, Speed]:
    """Times all models on one thread, in turn.

    Args:
        models: what to time. One that `expected` lacks is timed unchecked.
        expected: by the same names, models that give the logits to compare with.
        ids: int64 `[1, context]`, for the check; the first half is the prompt that is timed.

    Raises:
        RuntimeError: the logits of a model differ from those expected.
    """
    half = ids.shape[1] // 2
    with one_thread(), torch.inference_mode(), evaluating(*models.values(), *expected.values()):
        differences = {name: check_decoding(name, models[name], other(ids), ids) for name, other in expected.items()}
        prefill = interleaved_latency(
            [partial(model, ids[:, :half]) for model in models.values()], rounds, [ids.device]
        )
        decode = interleaved_latency([_step(model, half) for model in models.values()], rounds, [ids.device])
    return {
        name: Speed(first, second, half, differences.get(name))
        for name, first, second in zip(models, prefill, decode, strict=True)
    }


def _step(model: LanguageModel, seen: int) -> Callable[[], Tensor]:
    """Writes the byte behind `seen` others, again and again."""
    cache = Cache.of(model)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.bias.device)

    def step() -> Tensor:
        cache.length = seen
        logits: Tensor = model(ids, cache)
        return logits

    return step


def check_decoding(name: str, model: LanguageModel, expected: Tensor, ids: Tensor) -> float:
    """Reads half of ids, decodes the rest byte by byte, and compares with the logits `[1, context, 256]` expected;
    returns the relative norm of the difference.

    Raises:
        RuntimeError: it is above `LARGEST_DIFFERENCE`.
    """
    cache = Cache.of(model)
    half = ids.shape[1] // 2
    logits = [model(ids[:, :half], cache)] + [model(ids[:, i : i + 1], cache) for i in range(half, ids.shape[1])]
    difference = float((torch.cat(logits, 1) - expected).norm() / expected.norm())
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"{name}: logits with the cache differ from the fake-quant model's by {difference:.2%}")
    return difference
