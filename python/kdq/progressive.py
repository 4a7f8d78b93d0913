"""lower_precision_: a student in training goes on at another precision."""

from __future__ import annotations

import torch
from torch import nn

from kdq.configs import ConfigMap
from kdq.layers.qat import TrainingTwin
from kdq.layers.switchable import SwitchableLinear
from kdq.planning import ConversionReport, LayerPlan, Target, plan_layers
from kdq.quantize import training_twin


def lower_precision_(student: nn.Module, config: ConfigMap) -> ConversionReport:
    """Rebuilds the training twins of a prepared student at a new precision, in place and all or nothing.

    Float weights and biases stay the parameters they are; scales are learned anew: those of the weights start from the
    weights as they now are, those of the activations from the next batch. Make the optimizer after this call. Going
    down in steps (8, 4, 2 bits) is progressive quantization (Zhuang et al.: Towards Effective Low-bitwidth
    Convolutional Neural Networks, 2018).

    Args:
        student: after `prepare_qat_`.
        config: one config for all twins, or a mapping of layer names or patterns to configs, as for `quantize_`; twins
            without a match stay.

    Raises:
        TypeError: config is not one of kdq's.
        ValueError: the student has no training twin that config is for, one of them is switchable or has hooks, a name
            or pattern matches no layer, or a weight is not finite.
    """
    return plan_lower_precision(student, config).carry_out(student, _rebuilt)


def plan_lower_precision(student: nn.Module, config: ConfigMap) -> LayerPlan:
    """What `lower_precision_` would do, and its errors but for that of the weights."""
    plan = plan_layers(student, config, None, _why_not_twin)
    for name, target in plan.chosen.items():
        if isinstance(target.module, SwitchableLinear):
            raise ValueError(f"student: {name!r} holds its precisions already; choose one with set_precision_")
    if not plan.chosen:
        raise ValueError("student: expected a training twin that config is for; call prepare_qat_ first")
    return plan


def _why_not_twin(module: nn.Module) -> str | None:
    return None if isinstance(module, TrainingTwin) else "not prepared by prepare_qat_"


def _rebuilt(name: str, target: Target) -> nn.Module:
    layer = target.module.to_float()
    if not torch.isfinite(layer.weight).all():
        raise ValueError("its weight contains NaN or inf; nothing was changed")
    return training_twin(layer, target.config, name)
