"""Tensors as few bytes: relative positions of what is not zero, and Huffman codes.

Han, Mao, Dally: Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
Coding, 2016. Coding is lossless: what comes back has the same bits.

A coded array is a run of bytes: the lengths of the code words of gaps and of values, the coded gaps, the coded (or, for
floats, plain) values. A gap is the number of zeros before a value. One that is longer than `escape` is told in pieces:
the symbol `escape` stands for so many zeros with no value behind, where the paper puts a zero among the values.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdq import huffman

WORTH_CODING = 256  # bytes that must be saved: a description takes about so many
ESCAPES = (7, 15, 31, 63, 127, 255)
FLOATS = {torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16}
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}

Code = tuple[Tensor, dict[str, Any]]  # uint8 `[bytes]`, and what `decode` has to know


def encode_indices(indices: Tensor, symbols: int) -> Code:
    """indices uint8 `[N, K]`, below `symbols` (an even number): dense or by the gaps between those that are not 0,
    whatever takes fewer bytes."""
    flat = indices.numpy().reshape(-1)
    dense = _encode_symbols(flat, symbols)
    gaps, about = _encode_gaps(flat != 0)
    values = _encode_symbols(flat[flat != 0], symbols)
    about |= {"shape": list(indices.shape), "symbols": symbols}
    if len(dense) <= len(gaps) + len(values):
        return _sealed(dense, {"shape": list(indices.shape), "symbols": symbols})
    return _sealed(gaps + values, about)


def encode_floats(tensor: Tensor) -> Code | None:
    """A float tensor by the gaps between the elements that are not +0, and these as they are; None if that saves next
    to nothing, or it is of another dtype."""
    if tensor.dtype not in FLOATS:
        return None
    bits = torch.int32 if tensor.element_size() == 4 else torch.int16
    flat = tensor.cpu().contiguous().view(bits).numpy().reshape(-1)
    if flat.all():
        return None
    gaps, about = _encode_gaps(flat != 0)
    data = gaps + flat[flat != 0].tobytes()
    if len(data) + WORTH_CODING > flat.nbytes:
        return None
    return _sealed(data, {**about, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")})


def decode(data: Tensor, about: Mapping[str, Any]) -> Tensor:
    """The inverse of both: uint8 indices, or floats.

    Raises:
        ValueError: the bytes or what is said about them are damaged.
    """
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"expected uint8 [bytes], got {data.dtype} {list(data.shape)}")
    rest = data.numpy()
    if zlib.crc32(rest.tobytes()) != about.get("crc32"):
        raise ValueError("its checksum is wrong")
    try:
        shape = [_size(about, n) for n in about["shape"]]
        total = int(np.prod(shape, dtype=np.int64))
        where: Any = slice(None)
        count = total
        if "gaps" in about:
            where, rest = _decode_gaps(rest, about, total)
            count = len(where)
        if "dtype" in about:
            dtype = NAMES[about["dtype"]]
            flat = np.zeros(total, FLOATS[dtype])
            flat[where] = np.frombuffer(rest.tobytes(), FLOATS[dtype])
            return torch.from_numpy(flat).view(dtype).view(shape)
        flat = np.zeros(total, np.uint8)
        flat[where] = _decode_symbols(rest, _size(about, about["symbols"]), count)
    except (KeyError, TypeError, IndexError, MemoryError) as error:
        raise ValueError(f"its description is not valid: {error!r}") from error
    return torch.from_numpy(flat).view(shape)


# ---- the parts -------------------------------------------------------------------------------------------------------


def _sealed(data: bytes, about: dict[str, Any]) -> Code:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), {**about, "crc32": zlib.crc32(data)}


def _size(about: Mapping[str, Any], value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"its description is not valid: {dict(about)}")
    return value


def _encode_symbols(values: NDArray[np.uint8], symbols: int) -> bytes:
    lengths = huffman.code_lengths(np.bincount(values, minlength=symbols))
    return huffman.pack_lengths(lengths) + huffman.encode(values, lengths)


def _decode_symbols(data: NDArray[np.uint8], symbols: int, count: int) -> NDArray[np.uint8]:
    head = symbols // 2
    return huffman.decode(data[head:], huffman.unpack_lengths(data[:head]), count)


def _encode_gaps(present: NDArray[np.bool_]) -> tuple[bytes, dict[str, Any]]:
    """With the escape that takes the fewest bytes."""
    gaps = np.diff(np.flatnonzero(present), prepend=-1) - 1
    best: tuple[int, int, NDArray[np.uint8]] | None = None
    for escape in ESCAPES:
        symbols = _pieces(gaps, escape)
        counts = np.bincount(symbols, minlength=escape + 1)
        size = int(counts @ huffman.code_lengths(counts)) // 8 + (escape + 1) // 2
        if best is None or size < best[0]:
            best = size, escape, symbols
    assert best is not None
    data = _encode_symbols(best[2], best[1] + 1)
    return data, {"escape": best[1], "gaps": len(best[2]), "gap_bytes": len(data)}


def _pieces(gaps: NDArray[np.int64], escape: int) -> NDArray[np.uint8]:
    """Each gap as `gap // escape` times the escape, then the rest."""
    escapes = gaps // escape
    symbols = np.full(int(escapes.sum()) + len(gaps), escape, np.uint8)
    symbols[(escapes + 1).cumsum() - 1] = gaps % escape
    return symbols


def _decode_gaps(
    data: NDArray[np.uint8], about: Mapping[str, Any], total: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Where the values are, and the bytes behind the gaps."""
    escape, gaps, size = (_size(about, about[key]) for key in ("escape", "gaps", "gap_bytes"))
    symbols = _decode_symbols(data[:size], escape + 1, gaps).astype(np.int64)
    ends = symbols.cumsum()[symbols < escape]
    where = ends + np.arange(len(ends))
    if len(where) and where[-1] >= total:
        raise ValueError("its gaps are longer than it is")
    return where, data[size:]
