"""torch's transformer encoders: keeping them from reading around the layers that kdq puts in."""

from __future__ import annotations

from torch import nn


def run_layers_of_transformers(model: nn.Module) -> None:
    """Makes encoders call their attention, linear layers and norms where these are no longer plain ones.

    In inference, nn.TransformerEncoderLayer has a fused path that reads the float weights of its attention, linear
    layers and norms, and nn.TransformerEncoder packs padded batches into nested tensors for it. Each goes by a flag
    that nothing else reads.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _is_float(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and not all(map(_is_float, module.layers)):
            module.use_nested_tensor = False


def _is_float(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.TransformerEncoderLayer):
        return True
    linears, norms = (layer.linear1, layer.linear2), (layer.norm1, layer.norm2)
    attention = isinstance(layer.self_attn, nn.MultiheadAttention)
    return attention and all(type(x) is nn.Linear for x in linears) and all(type(x) is nn.LayerNorm for x in norms)
