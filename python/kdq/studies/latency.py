"""How well the search predicts: the latency and size of a plan against those of the converted model."""

from __future__ import annotations

import copy
import statistics
from functools import partial

import torch
from torch import nn

from kdq.bench.table import markdown_table
from kdq.configs import Binary, Int8Dynamic, LowBit
from kdq.quantize import quantize_
from kdq.reporting import interleaved_latency, size_on_disk
from kdq.search import Budget, search_precision
from kdq.studies.tasks import mlp

CANDIDATES = [None, Int8Dynamic(), LowBit(weight_bits=4, act_bits=8), LowBit(weight_bits=2, act_bits=8), Binary()]
SHARES = (0.0, 0.25, 0.5, 0.75)  # of the way from the fastest plan to the model in float


def models(quick: bool) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    if quick:
        return {"MLP 64-64-64, batch 4": (mlp(nn.Identity(), [64, 64, 64]), torch.randn(4, 64))}
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return {
        "MLP 512-2048-2048-512, batch 64": (mlp(nn.Identity(), [512, 2048, 2048, 512]), torch.randn(64, 512)),
        "encoder of 4 layers, 256 wide, batch 8 x 64": (
            nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(256, 32)),
            torch.randn(8, 64, 256),
        ),
    }


@torch.inference_mode()
def measured_ms(model: nn.Module, x: torch.Tensor) -> float:
    return 1e3 * interleaved_latency([partial(model.eval(), x)], devices=[x.device])[0].median


def latency_section(quick: bool) -> str:
    """Markdown: for budgets between the fastest plan and the float model, predicted and measured."""
    torch.manual_seed(0)
    rows, errors = [], []
    for name, (model, x) in models(quick).items():
        costs = search_precision(
            model.eval(), model, [x], budget=Budget(average_bits=32.0), candidates=CANDIDATES, progress=False
        )
        fastest = costs.fixed_ms + sum(min(o.latency_ms for o in layer.options) for layer in costs.layers)
        in_float = costs.fixed_ms + sum(layer.options[0].latency_ms for layer in costs.layers)
        for share in SHARES:
            plan = costs.under(Budget(latency_ms=1.001 * (fastest + share * (in_float - fastest))))
            converted = copy.deepcopy(model)
            quantize_(converted, plan, calibration=[x])
            measured = measured_ms(converted, x)
            errors.append(abs(plan.latency_ms / measured - 1))
            rows.append(
                (
                    name,
                    f"{plan.budget.latency_ms:.3f}" if plan.budget and plan.budget.latency_ms else "",
                    f"{plan.average_bits:.2f}",
                    f"{plan.latency_ms:.3f}",
                    f"{measured:.3f}",
                    f"{100 * (plan.latency_ms / measured - 1):+.1f}%",
                    f"{plan.size_bytes:,}",
                    f"{size_on_disk(converted):,}",
                )
            )
    columns = (
        "model",
        "budget, ms",
        "bits a weight",
        "predicted, ms",
        "measured, ms",
        "error",
        "predicted bytes",
        "file",
    )
    lines = ["## Predicted latency against measured", ""]
    lines += [
        "Random weights; one thread. The search times the layers on this machine's kernels, inside the model with all "
        "layers at one precision after the other, and has them add up to what the whole model takes there. A plan's "
        "prediction is the sum of its layers' times; measured is the converted model.",
        "",
    ]
    lines += markdown_table(columns, rows, text_columns=1)
    median, worst = statistics.median(errors), max(errors)
    lines += ["", f"Off by {100 * median:.1f}% (median) and {100 * worst:.1f}% (worst). A file has a header on top."]
    return "\n".join(lines) + "\n"
