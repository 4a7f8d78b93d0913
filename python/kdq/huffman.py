"""Canonical Huffman codes of small symbols (Huffman: A Method for the Construction of Minimum-Redundancy Codes, 1952).

No word is longer than 15 bits, so that a table of all 15-bit windows decodes a code, and a code is told by the lengths
of its words alone, half a byte each. Of the words of one length, those of smaller symbols are smaller numbers; the
first bit of a word is the highest of its byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONGEST = 15
CHUNK = 1 << 16  # symbols (encoding) or bytes (decoding) at a time: bounds the memory

Symbols = NDArray[np.uint8]


def code_lengths(counts: NDArray[np.int64]) -> Symbols:
    """The best lengths for symbols that occur so often; 0 for those that never do.

    By packages of symbols (Larmore, Hirschberg: A Fast Algorithm for Optimal Length-Limited Huffman Codes, 1990).
    """
    present = np.flatnonzero(counts)
    if len(present) < 2:
        return (counts > 0).astype(np.uint8)
    own = np.eye(len(counts), dtype=np.int64)
    leaves = sorted(((int(counts[s]), own[s]) for s in present), key=lambda package: package[0])
    packages = leaves
    for _ in range(LONGEST - 1):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(packages[::2], packages[1::2], strict=False)]
        packages = sorted([*leaves, *pairs], key=lambda package: package[0])
    lengths = sum(symbols for _, symbols in packages[: 2 * len(present) - 2])
    return np.asarray(lengths, dtype=np.uint8)


def pack_lengths(lengths: Symbols) -> bytes:
    """Two a byte; the number of symbols is even."""
    return (lengths[::2] << 4 | lengths[1::2]).astype(np.uint8).tobytes()


def unpack_lengths(data: Symbols) -> Symbols:
    """The inverse of `pack_lengths`."""
    return np.stack([data >> 4, data & 15], 1).reshape(-1)


def encode(symbols: Symbols, lengths: Symbols) -> bytes:
    """The code words of the symbols, one behind the other, filled up to whole bytes with zeros."""
    words = _words(lengths)
    parts = [np.empty(0, np.uint8)]
    for start in range(0, len(symbols), CHUNK):
        chunk = symbols[start : start + CHUNK]
        sizes = lengths[chunk].astype(np.int64)
        ends = sizes.cumsum()
        shift = np.repeat(ends, sizes) - np.arange(ends[-1]) - 1  # bits of the word that come after this one
        parts.append((np.repeat(words[chunk], sizes) >> shift & 1).astype(np.uint8))
    return np.packbits(np.concatenate(parts)).tobytes()


def decode(data: Symbols, lengths: Symbols, count: int) -> Symbols:
    """`count` symbols from the bytes that `encode` made, of which none may be left.

    Raises:
        ValueError: the lengths are those of no code, or the bytes are not `count` words of it.
    """
    if count == 0 and len(data) == 0:
        return np.empty(0, np.uint8)
    symbol_of, length_of = _tables(lengths)
    padded = np.concatenate([data, np.zeros(3, np.uint8)]).astype(np.uint32)
    decoded = [np.empty(0, np.uint8)]
    at, left = 0, count  # the bit where the next word begins, behind the bytes that are done
    for start in range(0, len(data), CHUNK):
        size = min(CHUNK, len(data) - start)
        part = padded[start : start + size + 2]
        three = part[:-2] << 16 | part[1:-1] << 8 | part[2:]
        windows = (three[:, None] >> np.arange(9, 1, -1, dtype=np.uint32) & 0x7FFF).reshape(-1)
        steps = length_of[windows].tobytes()
        begins = []
        while left and at < 8 * size:
            begins.append(at)
            at += steps[at] or 8 * size  # no word begins like this: found out below
            left -= 1
        decoded.append(symbol_of[windows[begins]] if begins else decoded[0])
        if begins and steps[begins[-1]] == 0:
            raise ValueError("a word that the code does not have")
        if not left:
            left_over = len(data) - start - (at + 7) // 8
            if left_over != 0:
                raise ValueError("more or fewer bytes than its symbols have")
            break
        at -= 8 * size
    if left:
        raise ValueError("fewer bytes than its symbols have")
    return np.concatenate(decoded)


def _ordered(lengths: Symbols) -> NDArray[np.int64]:
    """The symbols that have a word, in the order of these."""
    order = np.argsort(lengths, kind="stable")
    return order[lengths[order] > 0]


def _words(lengths: Symbols) -> NDArray[np.int64]:
    words = np.zeros(len(lengths), np.int64)
    word = before = 0
    for symbol in _ordered(lengths):
        word <<= int(lengths[symbol]) - before
        before = int(lengths[symbol])
        words[symbol] = word
        word += 1
    return words


def _tables(lengths: Symbols) -> tuple[Symbols, Symbols]:
    """Of each 15-bit window, the symbol whose word it begins with, and that word's length (0: none)."""
    order = _ordered(lengths)
    spans = 1 << (LONGEST - lengths[order].astype(np.int64))
    total = int(spans.sum())
    if total != 1 << LONGEST and not (len(order) == 1 and lengths[order[0]] == 1):
        raise ValueError("word lengths that no Huffman code has")
    symbol_of, length_of = np.zeros(1 << LONGEST, np.uint8), np.zeros(1 << LONGEST, np.uint8)
    symbol_of[:total] = np.repeat(order, spans)
    length_of[:total] = np.repeat(lengths[order], spans)
    return symbol_of, length_of
