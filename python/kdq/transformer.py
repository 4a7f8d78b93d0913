"""torch's transformer encoders: keeping them from reading around the layers that kdq puts in."""

from __future__ import annotations

from torch import nn


def run_layers_of_transformers(model: nn.Module) -> None:
    """Makes encoders call their linear layers where these are no longer plain ones.

    In inference, nn.TransformerEncoderLayer has a fused path that reads the float weights of `linear1` and `linear2`,
    and nn.TransformerEncoder packs padded batches into nested tensors for it. Each goes by a flag that nothing else
    reads.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _is_float(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and not all(map(_is_float, module.layers)):
            module.use_nested_tensor = False


def _is_float(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.TransformerEncoderLayer) or (
        type(layer.linear1) is nn.Linear and type(layer.linear2) is nn.Linear
    )
