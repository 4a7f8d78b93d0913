"""Huffman coding: optimal lengths, bits as the definition has them, files that come back bit for bit, and damage."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import kdq
from kdq import huffman
from kdq.compact import decode, encode_floats, encode_indices
from small_models import mlp, randn


def optimal_bits(counts: list[int]) -> int:
    """Huffman's own algorithm: the total length of all words, without a bound on a word's."""
    heap = [c for c in counts if c]
    heapq.heapify(heap)
    total = sum(heap) if len(heap) == 1 else 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 300), min_size=2, max_size=40))
def test_lengths_are_optimal(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts))
    assert int(np.array(counts) @ lengths) == optimal_bits(counts)


def test_no_word_is_longer_than_15_bits() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 32:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman.code_lengths(np.array(fibonacci)).astype(int)
    assert lengths.max() == 15  # without the bound, 31
    assert sum(2.0**-lengths) == 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 500), symbols=st.sampled_from([2, 4, 32, 256]))
def test_decoding_inverts_encoding(seed: int, size: int, symbols: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.minimum(rng.geometric(rng.uniform(0.01, 0.9), size) - 1, symbols - 1).astype(np.uint8)
    lengths = huffman.code_lengths(np.bincount(values, minlength=symbols))
    coded = huffman.encode(values, lengths)
    assert len(coded) == (int(lengths[values].sum()) + 7) // 8
    assert np.array_equal(huffman.unpack_lengths(np.frombuffer(huffman.pack_lengths(lengths), np.uint8)), lengths)
    data = np.frombuffer(coded, np.uint8)
    assert np.array_equal(huffman.decode(data, lengths, size), values)
    for wrong in (data[:-1], np.append(data, np.uint8(0))):
        with pytest.raises(ValueError, match="bytes than its symbols have"):
            huffman.decode(wrong, lengths, size)


def test_words_are_canonical() -> None:
    lengths = np.array([2, 1, 3, 3], np.uint8)  # words 10, 0, 110, 111
    assert huffman.encode(np.array([0, 1, 3, 2], np.uint8), lengths) == bytes([0b10011111, 0b00000000])
    with pytest.raises(ValueError, match="no Huffman code"):
        huffman.decode(np.zeros(1, np.uint8), np.array([1, 1, 1, 0], np.uint8), 1)
    with pytest.raises(ValueError, match="does not have"):
        huffman.decode(np.array([0b01000000], np.uint8), np.array([1, 0], np.uint8), 2)


def test_long_streams_are_decoded_in_pieces() -> None:
    values = np.random.default_rng(0).integers(0, 32, 3 * huffman.CHUNK, dtype=np.uint8) % 27
    lengths = huffman.code_lengths(np.bincount(values, minlength=32))
    assert np.array_equal(
        huffman.decode(np.frombuffer(huffman.encode(values, lengths), np.uint8), lengths, len(values)), values
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    density=st.sampled_from([0.0, 0.003, 0.1, 0.5, 1.0]),
    bits=st.integers(1, 5),
)
def test_indices_come_back(seed: int, shape: tuple[int, int], density: float, bits: int) -> None:
    rng = np.random.default_rng(seed)
    indices = torch.from_numpy(rng.integers(0, 2**bits, shape, dtype=np.uint8) * (rng.random(shape) < density))
    data, about = encode_indices(indices, 2**bits)
    assert torch.equal(decode(data, json.loads(json.dumps(about))), indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = torch.where(randn(60, 70, seed=1) > 1, randn(60, 70), 0.0).to(dtype)
    tensor[3, 4], tensor[5, 6], tensor[7] = -0.0, torch.nan, 0.0
    coded = encode_floats(tensor)
    assert coded is not None
    data, about = coded
    assert data.numel() < tensor.nbytes / 2
    back = decode(data, about)
    assert back.dtype == dtype
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(bits), tensor.view(bits))
    assert encode_floats(randn(9, 9).to(dtype)) is None
    assert encode_floats(torch.zeros(9, 9, dtype=torch.int8)) is None


def compressed(sparsity: float = 0.9) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.BatchNorm1d(100), nn.Linear(100, 10))
    kdq.prune_(model, sparsity)
    kdq.quantize_(model, kdq.Codebook(weight_bits=4))
    return model.eval()


def test_files_are_as_small_as_their_entropy(tmp_path: Path) -> None:
    model, x = compressed(), randn(5, 64)
    kdq.save(model, tmp_path / "plain")
    kdq.save(model, tmp_path / "coded", huffman=True)
    for into in (None, kdq.load(tmp_path / "plain")):
        loaded = kdq.load(tmp_path / "coded", into)
        assert all(
            torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
        )
        assert torch.equal(loaded(x), model(x))
    entropy = 0.0
    for name in ("0", "2", "4"):
        shares = torch.bincount(model.get_submodule(name).indices().flatten().long()).double()
        shares /= shares.sum()
        weights = model.get_submodule(name).indices().numel()
        entropy -= weights * float((shares[shares > 0] * shares[shares > 0].log2()).sum()) / 8
    rest = sum(t.nbytes for n, t in model.state_dict().items() if not n.endswith("packed"))
    size = (tmp_path / "coded").stat().st_size
    assert entropy < size - rest < 1.1 * entropy + 3000  # names, shapes, architecture and code words
    assert size < (tmp_path / "plain").stat().st_size / 3


def test_pruned_float_models_are_coded(tmp_path: Path) -> None:
    model, x = mlp(200), randn(5, 6)
    kdq.prune_(model, 0.9)
    kdq.convert_(model)
    kdq.save(model, tmp_path / "coded", huffman=True)
    assert torch.equal(kdq.load(tmp_path / "coded")(x), model(x))
    with safe_open(tmp_path / "coded", "pt") as file:
        assert set(json.loads(file.metadata()["kdq"])["huffman"]) == {"0.weight", "2.weight"}
    kdq.save(mlp(20), tmp_path / "dense", huffman=True)  # nothing to gain: nothing is coded
    assert torch.equal(kdq.load(tmp_path / "dense")(x), mlp(20)(x))


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    kdq.save(compressed(), tmp_path / "coded", huffman=True)
    content = (tmp_path / "coded").read_bytes()
    for length in [*range(0, len(content), 997), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut"):
            kdq.load(tmp_path / "cut")


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    kdq.save(compressed(), tmp_path / "coded", huffman=True)
    tensors = load_file(tmp_path / "coded")
    with safe_open(tmp_path / "coded", "pt") as file:
        info = json.loads(file.metadata()["kdq"])

    def refuse(message: str, *, key: str = "2.packed", data: Any = None, **about: Any) -> None:
        changed = {**info["huffman"], key: {**info["huffman"].get(key, {}), **about}}
        replaced = tensors if data is None else {**tensors, key: data}
        save_file(replaced, tmp_path / "bad", metadata={"kdq": json.dumps({**info, "huffman": changed})})
        with pytest.raises(ValueError, match=message):
            kdq.load(tmp_path / "bad")

    whole = tensors["2.packed"]
    for at in range(0, len(whole), 61):
        broken = whole.clone()
        broken[at] ^= 4
        refuse("bad: the coded tensor '2.packed' is damaged: its checksum is wrong", data=broken)
    refuse("'2.packed' is damaged: expected uint8", data=whole.int())
    refuse("'nowhere' is not valid", key="nowhere")
    refuse("'2.packed' is damaged", gaps=3)
    refuse("'2.packed' is damaged", gap_bytes=7)
    refuse("'2.packed' is damaged", shape=[3, 3])
    refuse("'2.packed' is damaged", shape=[-1])
    refuse("'2.packed' is damaged", shape=[10**9, 10**6])
    refuse("'2.packed' is damaged", shape="all")
    refuse("'2.packed' is damaged", symbols=3)
    refuse("'2.packed' is damaged", dtype="float64")
    refuse("tensor '2.packed' is torch.int32", shape=[300, 100])
