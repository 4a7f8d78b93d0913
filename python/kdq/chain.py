"""chain_layers_: fewer calls for small layers that follow one another."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.configs import Int8WeightOnly
from kdq.fuse import does_nothing, has_own_code, plain_sequential
from kdq.layers.int8_linear import Int8Linear
from kdq.layers.low_bit_linear import LowBitLinear
from kdq.ptq.tool_report import ToolReport


def chain_layers_(model: nn.Module) -> ToolReport:
    """Makes linear layers of int8 and few bits that follow one another in an nn.Sequential run as one operator, in
    place: the last step before serving, for small batches.

        kdq.quantize_(model, kdq.Int8Dynamic())
        kdq.chain_layers_(model)

    Names, layers and results stay what they are, bit for bit: only the class of the nn.Sequential becomes
    `kdq.chain.ChainedSequential`. Layers count as neighbours with nothing between them but activations that
    `quantize_` has fused, and nn.Dropout in eval mode. Layer by layer it goes where a layer has hooks, under autocast,
    and where x needs a gradient; torch's global module hooks see the nn.Sequential alone. `save` knows a chained model
    as a plain one; chain it again after `load`.

    Returns:
        The nn.Sequentials that were changed, with the layers that run together, and those left.
    """
    report = ToolReport()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential) or isinstance(module, ChainedSequential):
            continue
        chains = _chains(module)
        if type(module) is not nn.Sequential or not plain_sequential(module):
            report.left[name] = "it has code of its own"
        elif not chains:
            report.left[name] = "no two layers of int8 or few bits follow one another in it"
        else:
            module.__class__ = ChainedSequential
            report.changed[name] = "; ".join(f"{' -> '.join(chain)} in one call" for chain in chains)
    return report


def _chains(module: nn.Sequential) -> list[list[str]]:
    """The names of the layers that will run together."""
    kept = [(key, _is_link(child)) for key, child in module._modules.items() if not _passes(child)]
    runs = [[key for key, _ in run] for together, run in groupby(kept, key=lambda item: item[1]) if together]
    return [run for run in runs if len(run) > 1]


class ChainedSequential(nn.Sequential):
    """nn.Sequential, as before but for the way in which it is computed: layers that `_is_link` says follow one another,
    with nothing between them but an nn.Identity or an nn.Dropout in eval mode, are one call of `int8_linear_chain`.

    A call of a layer costs some 5 us of Python and operator around its kernel, which is more than a small kernel takes.
    Results are those of the layers one by one, bit for bit. Layer by layer it goes where something watches or changes
    that: hooks, a gradient for x, autocast; and where a layer's many rows are multiplied by bit planes.
    """

    def forward(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if needs_gradient or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        links: list[Any] = []
        for module in self._modules.values():
            if _is_link(module):
                links.append(module)
            elif not _passes(module):
                assert module is not None
                x = module(_run(links, x))
                links = []
        return _run(links, x)


def _is_link(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer of int8 or few bits with integer activations, and nothing but that."""
    if type(module) is Int8Linear:
        return type(module.config) is not Int8WeightOnly and not has_own_code(module)
    return type(module) is LowBitLinear and not has_own_code(module)


def _passes(module: nn.Module | None) -> bool:
    is_off = type(module) is nn.Dropout and not module.training and not has_own_code(module)
    return is_off or does_nothing(module)


def _run(links: list[Any], x: Tensor) -> Tensor:
    if len(links) < 2:
        return links[0](x) if links else x
    if x.shape[-1] != links[0].inputs:
        raise ValueError(f"x: expected {links[0].geometry.expected}, got {list(x.shape)}")
    rows = x.numel() // max(links[0].inputs, 1)
    # With a few rows more than they need, bit planes win more than a call takes.
    if any(type(link) is LowBitLinear and link.on_planes(rows // 2) for link in links):
        for link in links:
            x = link(x)
        return x
    packed = [link.packed_weight() for link in links]
    own = [link._buffers for link in links]  # see InferenceProduct.kernel
    weight_scale, bias = [buffers["weight_scale"] for buffers in own], [buffers["bias"] for buffers in own]
    activation = [link.activation for link in links]
    input_scale = [buffers["input_scale"] for buffers in own]
    if all(scale is None for scale in input_scale):
        return kk.int8_linear_chain(x, packed, weight_scale, bias, activation=activation)
    return kk.int8_linear_chain(
        x,
        packed,
        weight_scale,
        bias,
        input_scale=input_scale,
        input_zero_point=[buffers["input_zero_point"] for buffers in own],
        input_quant_max=[link.input_quant_max for link in links],
        activation=activation,
    )
