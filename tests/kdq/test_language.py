"""The language demo: its model with and without a cache, its text, and the whole demo at a tiny size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import kdq
from kdq.cli import app
from kdq.language.data import Batches, library_text, spread_windows
from kdq.language.demo import ARMS, PRECISIONS, UNTRAINED, Settings, duration, run_language
from kdq.language.model import Cache, LanguageModel, Shape, complete
from kdq.language.show import table
from kdq.language.speed import check_decoding, without_products

SHAPE = Shape(blocks=2, width=24, heads=3, context=16)


def model(precision: str | None = None) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(SHAPE).eval()
    for parameter in made.parameters():
        parameter.data.mul_(3)  # so that attention is not close to uniform
    if precision is not None:
        kdq.quantize_(made, PRECISIONS[precision], calibration=[ids(4)])
    return made


def ids(rows: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 16), generator=torch.Generator().manual_seed(1))


# ---- the model -------------------------------------------------------------------------------------------------------


def test_attention_is_the_formula() -> None:
    attention: Any = model().blocks[0].attention
    x = torch.randn(2, 16, 24)
    bias = model().bias
    query, key, value = attention.qkv(x).double().view(2, 16, 3, 3, 8).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(8) + bias
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).reshape(2, 16, 24)
    torch.testing.assert_close(attention(x, bias), attention.out(attention.norm(mixed.float())))


def test_no_position_sees_what_follows() -> None:
    x = ids(1)
    other = x.clone()
    other[:, 9:] = 7
    first, second = model()(x), model()(other)
    torch.testing.assert_close(first[:, :9], second[:, :9])
    assert not torch.allclose(first[:, 9:], second[:, 9:])


@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_a_cache_changes_nothing(precision: str | None) -> None:
    """In pieces of any size, and for several sequences at once."""
    m = model(precision)
    with torch.inference_mode():
        expected = m(ids(2))
        cache = Cache(SHAPE, batch=2)
        pieces = torch.cat([m(part, cache) for part in ids(2).split([5, 1, 1, 6, 3], 1)], 1)
    assert cache.length == 16
    torch.testing.assert_close(pieces, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at most 16 positions in all, got 17"):
        m(ids(2)[:, :1], cache)


def test_completion_is_greedy() -> None:
    m = model()
    written = complete(m, b"import", 5)
    text = b"import" + written
    with torch.inference_mode():
        likeliest = m(torch.tensor([list(text)])).argmax(-1)[0]
    assert bytes(likeliest[5:-1].tolist()) == written
    with pytest.raises(ValueError, match="prompt"):
        complete(m, b"", 5)


def test_everything_but_norms_is_quantized() -> None:
    m = LanguageModel(SHAPE)
    report = kdq.quantize_(m, PRECISIONS["int8"])
    assert len(report.changed) == 2 * 4 + 2
    assert set(report.fused.values()) == {"gelu"}
    assert all(type(m.get_submodule(name)).__name__ == "LayerNorm" for name in report.left)


def test_decoding_is_checked_against_the_twin() -> None:
    m, x = model("int8"), ids(1)
    with torch.inference_mode():
        expected = m(x)
        assert check_decoding("int8", m, expected, x) < 1e-3
        with pytest.raises(RuntimeError, match="int8: logits with the cache differ"):
            check_decoding("int8", m, expected.roll(1, dims=1), x)
        rest = without_products(m)
        assert rest(x).shape == expected.shape
    assert not any(isinstance(module, kdq.Int8Linear) for module in rest.modules())
    with pytest.raises(ValueError, match="multiple of heads"):
        Shape(width=20, heads=3)


# ---- the text --------------------------------------------------------------------------------------------------------


def test_held_out_files_are_not_trained_on() -> None:
    text = library_text()
    assert min(text.training_files, text.held_out_files) > 10
    x, y = spread_windows(text.held_out, 32, 20)
    assert torch.equal(x[:, 1:], y[:, :-1])
    training = bytes(text.training.numpy())
    shared = sum(bytes(window.tolist()) in training for window in x.to(torch.uint8))
    assert shared <= 2, "but for phrases that many files have"


def test_batches_are_the_seeds() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    first, again, other = (list(Batches(text, 8, 3, 4, seed)) for seed in (5, 5, 6))
    assert len(first) == 4
    for (x, y), (x2, _), (x3, _) in zip(first, again, other, strict=True):
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x2)
        assert not torch.equal(x, x3)


# ---- the demo --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("language")
    with (folder / "printed").open("w", encoding="utf-8") as printed:
        run_language(folder, Settings.quick(), Console(file=printed, width=200))
    return folder


def test_report(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    rows = {row["precision"]: row for row in report["rows"]}
    assert list(rows) == ["float32", "bfloat16", *PRECISIONS]
    sizes = [row["size_bytes"] for row in report["rows"]]
    assert sizes == sorted(sizes, reverse=True), "fewer bits take fewer bytes"
    for name in PRECISIONS:
        arms = rows[name]["arms"]
        assert list(arms) == [UNTRAINED, *ARMS]
        assert rows[name]["gain"][0] == pytest.approx(
            arms["text"]["bits_per_byte"][0] - arms["teacher"]["bits_per_byte"][0], abs=1e-5
        )
        for arm in ARMS:
            assert arms[arm]["kernel_agreement"] > 0.98
            assert arms[arm]["kernel_difference"] < 0.02
    assert rows["float32"]["arms"][""]["teacher_kl"] == pytest.approx(0, abs=1e-9)
    assert set(report["speed"]) == {*rows, "no products"}
    for speed in report["speed"].values():
        for kind in ("prefill", "decode"):
            median, slowest, fastest = speed[kind]
            assert 0 < slowest <= median <= fastest
    assert (output / "language.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(report))
    assert "4 bits" in capture.get()


def test_completions_and_times_are_printed(output: Path) -> None:
    """Each completion under its model's name; the console leaves control characters out."""

    def words(text: str) -> str:
        return "".join(c for c in text if c.isprintable())

    report = json.loads((output / "report.json").read_text())
    printed = words((output / "printed").read_text(encoding="utf-8"))
    for row in report["rows"]:
        assert row["completion"].keys() == row["arms"].keys()
        for arm, completion in row["completion"].items():
            assert completion
            assert words(f"{row['precision']} {arm}\n{report['prompt']}{completion}") in printed
    assert report["processor_seconds"] > 0
    assert report["seconds"] > 0
    assert words(f"{duration(report['seconds'])} by the clock") in printed


def test_checkpoints_load_and_compute_what_was_reported(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    kinds = {"int8": "Int8Linear", "4-bits": "LowBitLinear", "2-bits": "LowBitLinear", "1-bit": "BinaryLinear"}
    settings = Settings.quick()
    for row in report["rows"][2:]:
        name = row["precision"].replace(" ", "-")
        path = output / "checkpoints" / f"{name}-teacher.safetensors"
        loaded: Any = kdq.load(path, LanguageModel(settings.shape))
        assert type(loaded.blocks[0].attention.qkv).__name__ == kinds[name]
        assert type(loaded.token).__name__ == "QuantizedEmbedding"
        written = complete(loaded, report["prompt"].encode(), settings.written)
        assert written.decode(errors="replace") == row["completion"]["teacher"]


def test_command_line(tmp_path: Path) -> None:
    call = CliRunner().invoke
    done = call(app, ["demo", "language", "--quick", "--prompt", "import ", "--out", str(tmp_path)])
    assert done.exception is None
    assert json.loads((tmp_path / "report.json").read_text())["prompt"] == "import "
    for arguments, message in (
        (["language", "--seeds", "3"], "seeds: not an option of language"),
        (["digits", "--prompt", "x"], "prompt: not an option of digits"),
        (["language", "--quick", "--prompt", ""], "prompt: expected 1 to 56 bytes"),
        (["words"], "demo: expected digits or language"),
    ):
        wrong = call(app, ["demo", *arguments, "--out", str(tmp_path)]).exception
        assert isinstance(wrong, ValueError)
        assert message in str(wrong)
