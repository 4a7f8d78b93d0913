"""save and load: one safetensors file with the tensors, and the quantization map in its metadata.

The tensors are the portable ones (row-major integers, packed bits, scales); what a machine's kernels want is made on
load. No code is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.architecture import build_architecture, describe_architecture
from kdq.compact import Code, decode, encode_floats, encode_indices
from kdq.configs import config_from_json, config_to_json
from kdq.distributed import check_plain
from kdq.fuse import Fusion, find_fusions, has_own_code
from kdq.layers.attention import MultiheadAttention
from kdq.layers.base import InferenceLayer, InferenceProduct, fused_activation
from kdq.layers.binary_linear import BinaryLinear
from kdq.layers.binary_threshold_linear import BinaryThresholdLinear
from kdq.layers.codebook_linear import CodebookLinear
from kdq.layers.conv2d import BinaryConv2d, Int8Conv2d, LowBitConv2d
from kdq.layers.embedding import QuantizedEmbedding
from kdq.layers.int8_linear import Int8Linear
from kdq.layers.low_bit_linear import LowBitLinear
from kdq.layers.qat import TrainingTwin
from kdq.open_attention import attention_of, replace_attention_, why_not_open
from kdq.transformer import run_layers_of_transformers

METADATA_KEY = "kdq"
# 2: a layer may have an activation. 3: a layer may have two names. 4: embeddings; binary layers from bits to bits;
# tensors may be coded. 5: convolutions. Older files are read as well.
FORMAT_VERSION = 5
LAYERS: dict[str, Callable[..., InferenceLayer]] = {
    cls.__name__: cls
    for cls in (
        *(Int8Linear, LowBitLinear, BinaryLinear, BinaryThresholdLinear, CodebookLinear),
        *(Int8Conv2d, LowBitConv2d, BinaryConv2d),
        QuantizedEmbedding,
    )
}


def save(model: nn.Module, path: str | os.PathLike[str], *, huffman: bool = False) -> None:
    """Writes a model to a safetensors file; an interrupted call leaves an existing file as it was.

    Models made of nn.Sequential and common layers are described in the file too, so that `load(path)` can rebuild them.

    Args:
        huffman: codes the indices of `CodebookLinear` layers, and float tensors with many zeros as pruning leaves them,
            without loss: relative positions and Huffman codes (Han, Mao, Dally: Deep Compression, 2016). `load` gives
            the same model back; it takes longer.

    Raises:
        ValueError: the model has training twins left (call `convert_` first), or is wrapped by DDP or FSDP2.
    """
    check_plain(model)
    for name, module in model.named_modules():
        if isinstance(module, TrainingTwin):
            raise ValueError(
                f"model: {name!r} is a training twin ({type(module).__name__}); call kdq.convert_(model) before "
                "saving, or keep training checkpoints with torch.save(model.state_dict(), ...)"
            )
    info = {
        "version": FORMAT_VERSION,
        "layers": _describe_layers(model),
        "architecture": describe_architecture(model),
    }
    # Shared tensors are written under each of their names: safetensors has no aliases.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    if huffman:
        info["huffman"] = _encode(model, tensors)
    temporary = Path(f"{os.fspath(path)}.partial")
    try:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(info)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Reads what `save` wrote.

    Args:
        path: the file.
        model: the float architecture; its layers are replaced as the file says, the activations that they compute taken
            out, its attention opened (`open_attention_`), and all tensors loaded, in place. None rebuilds models made
            of nn.Sequential and common layers.

    Returns:
        The model, in eval mode if it was rebuilt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, truncated or not kdq's, or does not fit the model, which is then left as it
            was.
    """
    info, tensors = _read(path)
    layers = _build_layers(path, info["layers"])
    if model is None:
        if info["architecture"] is None:
            raise ValueError(
                f"{path}: holds a model with code of its own; build its float architecture and pass it as model="
            )
        model = build_architecture(info["architecture"], layers).eval()
        _check_tensors(path, model, layers, tensors)
    else:
        with _opened_as(path, model, tensors):
            _replace(path, model, layers, tensors)
    model.load_state_dict(tensors)
    return model


@contextmanager
def _opened_as(path: str | os.PathLike[str], model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Opens the model's attention where the file's was (`open_attention_`); after an error inside, the model is as it
    was.

    Raises:
        ValueError: the file's attention is open, but that of the model cannot be opened.
    """
    closed = {
        name: module
        for name, module in attention_of(model).items()
        if name and any(key.startswith(f"{name}.q_proj.") for key in tensors) and not hasattr(module, "q_proj")
    }
    for name, module in closed.items():
        reason = why_not_open(module)
        if reason is not None:
            raise ValueError(
                f"{path}: its attention {name!r} was opened by open_attention_, the model's is not: {reason}"
            )
    replace_attention_(model, closed)
    try:
        yield
    except BaseException:
        for name, module in closed.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        raise


def _replace(
    path: str | os.PathLike[str], model: nn.Module, layers: dict[str, InferenceLayer], tensors: dict[str, Tensor]
) -> None:
    """Puts the file's layers in the model's, once all is checked."""
    for name in layers:
        _check_place(path, model, name, layers[name])
    _check_tensors(path, model, layers, tensors)
    fusions = _fusions_left(path, model, layers)
    for name, layer in layers.items():
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        before = getattr(parent, child)
        if isinstance(layer, QuantizedEmbedding):  # it decides what the layers after it compute in
            layer.dtype = before.dtype if isinstance(before, QuantizedEmbedding) else before.weight.dtype
        setattr(parent, child, layer.train(before.training))
    for fusion in fusions:
        fusion.take_out()
    run_layers_of_transformers(model)


def _encode(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Puts coded tensors in the place of others; what decoding has to know, by name."""
    known: dict[str, Any] = {}
    codebooks = {
        f"{n}.packed": m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, CodebookLinear)
    }
    for key, tensor in tensors.items():
        coded: Code | None
        if key in codebooks:
            coded = encode_indices(codebooks[key].indices(), 2 ** codebooks[key].config.weight_bits)
        else:
            coded = encode_floats(tensor)
        if coded is not None:
            tensors[key], known[key] = coded
    return known


def _decode(path: str | os.PathLike[str], known: Any, tensors: dict[str, Tensor]) -> None:
    """The inverse of `_encode`."""
    if not isinstance(known, dict):
        raise ValueError(f"{path}: what it says about coded tensors is not valid")
    for key, about in known.items():
        if key not in tensors or not isinstance(about, dict):
            raise ValueError(f"{path}: what it says about a coded tensor {key!r} is not valid")
        try:
            decoded = decode(tensors[key], about)
            if decoded.dtype == torch.uint8:
                decoded = kk.pack_indices(decoded, about["symbols"].bit_length() - 1)
        except ValueError as error:
            raise ValueError(f"{path}: the coded tensor {key!r} is damaged: {error}") from error
        tensors[key] = decoded


def _describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The quantization map; under its further names, a layer is only said to be `same_as` the first."""
    described: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, InferenceLayer):
            same_as = first.setdefault(id(module), name)
            described[name] = _describe_layer(module) if same_as == name else {"same_as": same_as}
    return described


def _describe_layer(layer: InferenceLayer) -> dict[str, Any]:
    return {"type": type(layer).__name__, **layer.arguments(), "config": config_to_json(layer.config)}


def _build_layers(path: str | os.PathLike[str], described: dict[str, Any]) -> dict[str, InferenceLayer]:
    """The layers by name, still without their tensors; one under several names is built once.

    Raises:
        ValueError: a description is not valid.
    """
    layers: dict[str, InferenceLayer] = {}
    for name, data in described.items():
        if not (isinstance(data, dict) and "same_as" in data):
            layers[name] = _build_layer(path, name, data)
        elif data["same_as"] in layers:
            layers[name] = layers[data["same_as"]]
        else:
            raise ValueError(
                f"{path}: layer {name!r} is said to be the same as {data['same_as']!r}, which is not there"
            )
    return layers


def _build_layer(path: str | os.PathLike[str], name: str, data: dict[str, Any]) -> InferenceLayer:
    try:
        arguments = {key: value for key, value in data.items() if key not in ("type", "config")}
        return LAYERS[data["type"]](**arguments, config=config_from_json(data["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the description of layer {name!r} is not valid: {error}") from error


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: corrupt, truncated, or not a safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one that kdq.save wrote: it has no quantization map")
    try:
        info = json.loads(metadata[METADATA_KEY])
        version = info["version"]
        if not isinstance(info["layers"], dict) or "architecture" not in info:
            raise KeyError("layers")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its quantization map is not valid: {error}") from error
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"{path}: format version {version}, this kdq reads 1 to {FORMAT_VERSION}")
    _decode(path, info.get("huffman", {}), tensors)
    return info, tensors


def _check_place(path: str | os.PathLike[str], model: nn.Module, name: str, layer: InferenceLayer) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{path}: has a layer {name!r}, which the model lacks") from error
    if has_own_code(module):
        raise ValueError(
            f"{path}: the model's layer {name!r} has hooks, which the new one would lack; remove them first"
        )
    if name == "" or not layer.fits(module):
        raise ValueError(f"{path}: layer {name!r} is {layer.described()}, the model has {module} there")


def _fusions_left(path: str | os.PathLike[str], model: nn.Module, layers: dict[str, InferenceLayer]) -> list[Fusion]:
    """The activations that the file's layers compute and the model still has behind its own.

    Raises:
        ValueError: the model would compute something else: an activation twice, another one, or none.
    """
    products = {name: layer for name, layer in layers.items() if isinstance(layer, InferenceProduct)}
    fusions = find_fusions(model, products)
    left = []
    for name, layer in products.items():
        present, behind = fused_activation(model.get_submodule(name)), fusions.get(name)
        if present == layer.activation:
            continue  # neither has one, or the model was fused before
        if present is not None or behind is None or behind.activation != layer.activation:
            found = present or (behind.activation if behind is not None else None)
            raise ValueError(
                f"{path}: layer {name!r} computes the activation {layer.activation}, the model's has {found} in it or "
                "directly behind it; pass the float model that was quantized, without hooks on these layers"
            )
        left.append(behind)
    return left


def _closed_attention(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """For the message: where the model's attention was opened and the file's was not."""
    opened = [name for name, module in model.named_modules() if isinstance(module, MultiheadAttention)]
    own = [name for name in opened if tensors.keys() & {f"{name}.in_proj_weight", f"{name}.q_proj_weight"}]
    if not own:
        return ""
    return f". The model's attention {own[0]!r} was opened by open_attention_, the file's was not: load it before"


def _check_tensors(
    path: str | os.PathLike[str],
    model: nn.Module,
    layers: dict[str, InferenceLayer],
    tensors: dict[str, Tensor],
) -> None:
    """Every tensor that the model will have once its layers are replaced is in the file, with the right shape and
    dtype."""
    expected = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in layers)
    }
    for name, layer in layers.items():
        expected |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        raise ValueError(
            f"{path}: does not fit the model: "
            + "; ".join(
                f"{text} {', '.join(names[:5])}"
                for text, names in (("it lacks", missing), ("the model lacks", surplus))
                if names
            )
            + _closed_attention(model, tensors)
        )
    for key, tensor in expected.items():
        got = tensors[key]
        # A float model may be loaded into another float dtype, as load_state_dict does; integers and scales must match.
        quantized = any(key.startswith(f"{name}.") for name in layers)
        if got.shape != tensor.shape or (quantized and got.dtype != tensor.dtype):
            raise ValueError(
                f"{path}: tensor {key!r} is {got.dtype} {list(got.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )
        if got.is_floating_point() and key.endswith(("weight_scale", "input_scale")) and quantized:
            _check_scale(path, key, got)
        if quantized and key.endswith(".codebook") and not torch.isfinite(got).all():
            raise ValueError(f"{path}: tensor {key!r} has centroids that are NaN or infinite")


def _check_scale(path: str | os.PathLike[str], key: str, scale: Tensor) -> None:
    if not (torch.isfinite(scale).all() and (scale >= 0).all()):
        raise ValueError(f"{path}: tensor {key!r} has scales that are negative, NaN or infinite")
