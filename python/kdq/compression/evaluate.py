"""Models as a report shows them: quality on held batches, bytes, milliseconds a batch, all timed in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from kdq.compression.report import Layer, Model
from kdq.configs import bits_of, short_name
from kdq.layers.base import InferenceLinear
from kdq.observe import device_of, evaluating, parse_batch, rows_of
from kdq.reporting import interleaved_latency, layer_errors
from kdq.search.cost import tensor_bytes
from kdq.validation import validate


def evaluate(models: Mapping[str, nn.Module], teacher: nn.Module, batches: Sequence[Any]) -> dict[str, Model]:
    """Every model on the batches, by its name."""
    first = parse_batch(batches[0], teacher)
    with evaluating(*models.values()), torch.inference_mode():
        times = interleaved_latency(
            [partial(first.logits, model, name) for name, model in models.items()],
            devices=map(device_of, models.values()),
        )
    found = {}
    for (name, model), time in zip(models.items(), times, strict=True):
        quality = validate(model, teacher, batches)
        found[name] = Model(name, quality.accuracy, quality.teacher_kl, tensor_bytes(model), 1e3 * time.median)
    return found


def describe_layers(
    model: nn.Module, own: nn.Module, rounded: nn.Module, original: nn.Module, batch: Any
) -> list[Layer]:
    """The quantized layers of a converted model, in order, with the errors of their outputs. `own` has its weights in
    float, `rounded` is the original at its precisions."""
    errors = [
        {e.name: e.sqnr_db for e in layer_errors(*pair, batch) if math.isfinite(e.sqnr_db)}
        for pair in ((rounded, original), (model, original), (model, own))
    ]
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, InferenceLinear):
            config: Any = layer.config
            weight_bits, act_bits = bits_of(config)
            weights = layer.in_features * layer.out_features
            sqnr = (known.get(name) for known in errors)
            layers.append(Layer(name, short_name(config), weight_bits, act_bits, weights, *sqnr))
    return layers


def count_samples(model: nn.Module, batches: Sequence[Any]) -> int:
    """Rows of logits that count (their target is not -100), in all batches."""
    parsed = [parse_batch(batch, model) for batch in batches]
    with evaluating(model), torch.no_grad():
        return sum(int(rows_of(batch.logits(model, "model"), batch.target)[2].sum()) for batch in parsed)
