"""Describes models made of nn.Sequential and common layers as JSON, so that a checkpoint can rebuild them without
code."""

from __future__ import annotations

from typing import Any

from torch import nn

from kdq.chain import ChainedSequential
from kdq.layers.base import InferenceLayer
from kdq.qnn import QuantizeGradient, ShiftBatchNorm1d

# Constructor arguments of the layers that can be described; each is also an attribute ("bias" says whether there is
# one).
ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.BatchNorm1d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    nn.BatchNorm2d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    nn.Conv2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "bias",
        "padding_mode",
    ),
    nn.Dropout: ("p",),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.GELU: ("approximate",),
    nn.Hardtanh: ("min_val", "max_val"),
    nn.Identity: (),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.ReLU: (),
    nn.SiLU: (),
    nn.Sigmoid: (),
    nn.Softmax: ("dim",),
    nn.Tanh: (),
    QuantizeGradient: ("bits", "method"),
    ShiftBatchNorm1d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
}
TYPES = {cls.__name__: cls for cls in ARGUMENTS}


def describe_architecture(model: nn.Module, name: str = "") -> dict[str, Any] | None:
    """A JSON-ready description, or None if any part is not among the known layers."""
    if isinstance(model, InferenceLayer):
        return {"type": "kdq", "name": name}
    if type(model) in (nn.Sequential, ChainedSequential):
        children = {  # not named_children(), which names a module once that stands in several places
            key: None if child is None else describe_architecture(child, f"{name}.{key}" if name else key)
            for key, child in model._modules.items()
        }
        return None if None in children.values() else {"type": "Sequential", "children": children}
    if type(model) not in ARGUMENTS:
        return None
    arguments = {key: getattr(model, key) for key in ARGUMENTS[type(model)]}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    return {"type": type(model).__name__, "arguments": arguments}


def build_architecture(description: dict[str, Any], layers: dict[str, InferenceLayer]) -> nn.Module:
    """The inverse of `describe_architecture`; quantized layers come from `layers`, by name.

    Raises:
        ValueError: the description is not valid.
    """
    kind = description.get("type")
    try:
        if kind == "kdq":
            return layers[description["name"]]
        if kind == "Sequential":
            model = nn.Sequential()
            for key, child in description["children"].items():
                model.add_module(key, build_architecture(child, layers))
            return model
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in description["arguments"].items()}
        return TYPES[str(kind)](**arguments)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"architecture: the description of a {kind} is not valid: {error}") from error
