"""int8_conv2d and binary_conv2d against torch's float64 convolution of the integers, on every instruction set, or where
--device says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdq_kernels as kk
import kdq_kernels.numpy as kn
from op_cases import int8, randn


@dataclass(frozen=True)
class Window:
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def arguments(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def fits(self, height: int, width: int) -> bool:
        sides = zip((height, width), self.kernel_size, self.padding, self.dilation, strict=True)
        return all(size + 2 * p >= d * (k - 1) + 1 for size, k, p, d in sides)


# Of images [images, channels, height, width] and output channels; windows with and without padding, gaps and overlaps.
CASES = [
    ((1, 1, 1, 1), 1, Window((1, 1), padding=(0, 0))),
    ((2, 3, 9, 7), 5, Window()),
    ((1, 64, 8, 8), 64, Window()),
    ((3, 70, 5, 6), 130, Window((3, 2), (2, 1), (1, 2), (1, 2))),
    ((1, 3, 20, 21), 16, Window((7, 7), (2, 2), (3, 3))),
    ((2, 16, 6, 6), 33, Window((1, 1), (2, 2), (0, 0))),
    ((1, 128, 4, 4), 72, Window((3, 3), (1, 1), (4, 4), (2, 2))),
    ((2, 5, 3, 12), 8, Window((2, 5), (1, 3), (0, 4), (1, 3))),
    ((1, 4, 40, 40), 24, Window((3, 3), (3, 3), (0, 0))),
]
IDS = [f"{shape}-{n}-{'-'.join(map(str, astuple(w)))}" for shape, n, w in CASES]


def packed(w: Tensor) -> Tensor:
    return kk.pack_int8_weight(w.permute(0, 2, 3, 1).flatten(1))


def sums(q: Tensor, w: Tensor, window: Window) -> Tensor:
    """The exact sums, float64."""
    return F.conv2d(q.double(), w.double(), **window.arguments())


def layer(shape: tuple[int, ...], n: int, window: Window) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, scale, bias."""
    w = int8(n, shape[1], *window.kernel_size)
    return randn(*shape), w, randn(n, seed=2).abs() * 0.01 + 0.001, randn(n, seed=3)


# ---- int8 ------------------------------------------------------------------------------------------------------------


def dynamic_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = kk.quantize_rows(x.flatten(1))
    return q.view(x.shape), scale


def expected_int8(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, window: Window) -> Tensor:
    q, x_scale = dynamic_integers(x)
    return sums(q, w, window) * x_scale[:, None, None, None] * scale[:, None, None] + bias[:, None, None]


def int8_conv2d(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, window: Window, **more: Any) -> Tensor:
    """Where x is."""
    weights = packed(w.to(x.device)), scale.to(x.device), None if bias is None else bias.to(x.device)
    return kk.int8_conv2d(x, *weights, kernel_size=window.kernel_size, **window.arguments(), **more)


@pytest.mark.parametrize(("shape", "n", "window"), CASES, ids=IDS)
def test_int8_dynamic(isa: str, device: str, shape: tuple[int, ...], n: int, window: Window) -> None:
    x, w, scale, bias = layer(shape, n, window)
    got = int8_conv2d(x.to(device), w, scale, bias, window).cpu()
    torch.testing.assert_close(got.double(), expected_int8(x, w, scale, bias, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "n", "window"), CASES, ids=IDS)
@pytest.mark.parametrize(("zero_point", "quant_max"), [(100, 255), (0, 15), (7, 7)])
def test_int8_static_sums_are_exact(
    isa: str, device: str, shape: tuple[int, ...], n: int, window: Window, zero_point: int, quant_max: int
) -> None:
    """With scales of 1 the results are the integers themselves: padding is the zero point's."""
    _, w, _, _ = layer(shape, n, window)
    x = (randn(*shape) * 60).round() + 0.0
    grid: dict[str, Any] = {"input_scale": 1.0, "input_zero_point": zero_point, "input_quant_max": quant_max}
    got = int8_conv2d(x.to(device), w, torch.ones(n), None, window, **grid).cpu()
    q = (x + zero_point).clamp(0, quant_max) - zero_point
    assert torch.equal(got.double(), sums(q, w, window).float().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_half(isa: str, device: str, dtype: torch.dtype) -> None:
    shape, n, window = CASES[3]
    x, w, scale, bias = layer(shape, n, window)
    got = int8_conv2d(x.to(device, dtype), w, scale, bias, window).cpu()
    assert got.dtype == dtype
    expected = expected_int8(x.to(dtype), w, scale, bias, window)
    torch.testing.assert_close(got.double(), expected, rtol=2.0**-8, atol=1e-3)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_int8_activation(isa: str, device: str, activation: str) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    shape, n, window = CASES[1]
    x, w, scale, bias = layer(shape, n, window)
    got = int8_conv2d(x.to(device), w, scale, bias, window, activation=activation).cpu()
    expected = functions[activation](expected_int8(x, w, scale, bias, window))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_image(isa: str, device: str) -> None:
    shape, n, window = CASES[3]
    x, w, scale, bias = layer(shape, n, window)
    x = x.to(device)
    clean = {static: int8_conv2d(x, w, scale, bias, window, input_scale=static) for static in (None, 0.05)}
    x[1, 3, 2, 1] = torch.nan
    for static, expected in clean.items():
        got = int8_conv2d(x, w, scale, bias, window, input_scale=static)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], expected[[0, 2]])
    x[1, 3, 2, 1] = torch.inf
    assert int8_conv2d(x, w, scale, bias, window)[1].isnan().all()
    assert int8_conv2d(x, w, scale, bias, window, input_scale=0.05).isfinite().all()


def test_images_of_zeros_and_of_tiny_numbers(isa: str, device: str) -> None:
    _, w, scale, bias = layer((2, 3, 9, 7), 5, Window())
    x = torch.zeros(2, 3, 9, 7)
    x[1] = 1e-42
    got = int8_conv2d(x.to(device), w, scale, bias, Window()).cpu()
    torch.testing.assert_close(got, bias[:, None, None].expand_as(got))


# ---- binary ----------------------------------------------------------------------------------------------------------


def signs(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).double()


def binary_conv2d(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """Where x is."""
    bits = kk.pack_signs(w.to(x.device).permute(0, 2, 3, 1))
    return kk.binary_conv2d(
        x, bits, scale.to(x.device), None if bias is None else bias.to(x.device), **window.arguments()
    )


@pytest.mark.parametrize(("shape", "n", "window"), CASES, ids=IDS)
def test_binary_sums_are_exact(isa: str, device: str, shape: tuple[int, ...], n: int, window: Window) -> None:
    """Padding counts as 0, not as a sign."""
    x, w = randn(*shape), randn(n, shape[1], *window.kernel_size, seed=1)
    got = binary_conv2d(x.to(device), w, torch.ones(n), None, window).cpu()
    assert torch.equal(got.double(), sums(signs(x), signs(w), window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_binary_scale_and_bias(isa: str, device: str, dtype: torch.dtype) -> None:
    for shape, n, window in (CASES[2], CASES[3]):
        x, w = randn(*shape).to(dtype), randn(n, shape[1], *window.kernel_size, seed=1)
        scale, bias = randn(n, seed=2), randn(n, seed=3)
        got = binary_conv2d(x.to(device), w, scale, bias, window).cpu()
        expected = sums(signs(x), signs(w), window) * scale[:, None, None] + bias[:, None, None]
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=2.0**-8 if dtype != torch.float32 else 1e-6, atol=1e-4)


# ---- both ------------------------------------------------------------------------------------------------------------

pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kernel_size=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dilation=pairs,
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 12), st.integers(1, 12)),
    n=st.integers(1, 70),
)
def test_any_geometry(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    sizes: tuple[int, int, int, int],
    n: int,
) -> None:
    window = Window(kernel_size, stride, padding, dilation)
    if not window.fits(*sizes[2:]):
        with pytest.raises(ValueError, match="less than the .* that the kernel covers"):
            check_geometry(sizes, n, window)
        return
    check_geometry(sizes, n, window)


def check_geometry(sizes: tuple[int, int, int, int], n: int, window: Window) -> None:
    x, w = (randn(*sizes) * 40).round(), int8(n, sizes[1], *window.kernel_size)
    got = int8_conv2d(x, w, torch.ones(n), None, window, input_scale=1.0)
    assert torch.equal(got.double(), sums(x.clamp(-128, 127), w, window).float().double())
    binary = binary_conv2d(x, w.float(), torch.ones(n), None, window)
    assert torch.equal(binary.double(), sums(signs(x), signs(w), window))


def convolutions(shape: tuple[int, ...], n: int, window: Window) -> list[Callable[[Tensor], Tensor]]:
    _, w, scale, bias = layer(shape, n, window)
    return [
        lambda x: int8_conv2d(x, w, scale, bias, window),
        lambda x: int8_conv2d(x, w, scale, bias, window, input_scale=0.02, input_zero_point=3),
        lambda x: binary_conv2d(x, w.float(), scale, bias, window),
    ]


def test_memory_formats(device: str) -> None:
    """As torch's own: the result has that of x; any strides are taken."""
    for shape, n, window in CASES:
        x = randn(*shape, device=device)
        last = x.to(memory_format=torch.channels_last)
        wide = randn(shape[0], shape[1], shape[2], 2 * shape[3], device=device)
        wide[..., ::2] = x
        for run in convolutions(shape, n, window):
            expected = run(x)
            assert expected.is_contiguous()
            got = run(last)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, expected)
            assert torch.equal(run(wide[..., ::2]), expected)
            assert torch.equal(run(x.flip(0).flip(0)), expected)


def test_images_do_not_depend_on_each_other(device: str) -> None:
    """Nor on how many are prepared at a time."""
    shape, n, window = (40, 64, 28, 28), 8, Window()
    x = randn(*shape, device=device)
    for run in convolutions(shape, n, window):
        whole = run(x)
        for image in (0, 17, 39):
            assert torch.equal(run(x[image : image + 1]), whole[image : image + 1])


def test_last_images_of_a_large_weight(isa: str) -> None:
    """The windows of the first images read the weight in pieces of k, those of the last three do not."""
    shape, n, window = (43, 400, 16, 16), 128, Window((5, 5), (12, 12), (0, 0))
    x, w, scale, bias = layer(shape, n, window)
    whole = int8_conv2d(x, w, scale, bias, window)
    for image in (0, 19, 39, 40, 42):
        assert torch.equal(int8_conv2d(x[image : image + 1], w, scale, bias, window), whole[image : image + 1])


def test_threads_do_not_change_the_result() -> None:
    shape, n, window = (3, 64, 30, 31), 96, Window()
    x = randn(*shape)
    before = torch.get_num_threads()
    try:
        for run in convolutions(shape, n, window):
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(run(x))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_nothing_to_do(device: str) -> None:
    for run in convolutions((1, 3, 8, 8), 4, Window()):
        assert run(torch.zeros(0, 3, 8, 8, device=device)).shape == (0, 4, 8, 8)


def test_numpy_is_the_same() -> None:
    shape, n, window = CASES[3]
    x, w, scale, bias = layer(shape, n, window)
    bits = kk.pack_signs(w.float().permute(0, 2, 3, 1))
    arrays = [t.numpy() for t in (packed(w), scale, bias)]
    for images in (x, x.to(memory_format=torch.channels_last)):
        got = kn.int8_conv2d(images.numpy(), *arrays, kernel_size=window.kernel_size, **window.arguments())
        assert torch.equal(torch.from_numpy(got), int8_conv2d(x, w, scale, bias, window))
        static = kn.int8_conv2d(
            images.numpy(),
            *arrays,
            kernel_size=window.kernel_size,
            **window.arguments(),
            input_scale=0.05,
            input_zero_point=9,
            activation="relu",
        )
        expected = int8_conv2d(x, w, scale, bias, window, input_scale=0.05, input_zero_point=9, activation="relu")
        assert torch.equal(torch.from_numpy(static), expected)
        binary = kn.binary_conv2d(images.numpy(), bits.numpy(), arrays[1], None, **window.arguments())
        assert torch.equal(torch.from_numpy(binary), binary_conv2d(x, w.float(), scale, None, window))
    with pytest.raises(ValueError, match=r"x: expected 4 axes \(images, channels, height, width\), got shape \[2, 3\]"):
        kn.int8_conv2d(np.zeros((2, 3), np.float32), *arrays, kernel_size=(1, 1))
    with pytest.raises(ValueError, match="x: has K = 6, but the packed weight has K = 420"):
        kn.int8_conv2d(np.zeros((1, 6, 3, 3), np.float32), *arrays, kernel_size=(1, 1))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 8, 8)}, r"x: expected 4 axes \(images, channels, height, width\), got shape \[3, 8, 8\]"),
    ({"x": torch.zeros(1, 3, 8, 8).double()}, "x: expected dtype float32, bfloat16 or float16, got float64"),
    ({"x": torch.zeros(1, 3, 2, 8), "padding": (0, 0)}, "x: height 2 and its padding make 2, less than the 3"),
    ({"x": torch.zeros(1, 3, 8, 2), "padding": (0, 0)}, "x: width 2 and its padding make 2, less than the 3"),
    ({"stride": (0, 1)}, "stride: expected 1 to 16777216 for the height, got 0"),
    ({"dilation": (1, 0)}, "dilation: expected 1 to 16777216 for the width, got 0"),
    ({"padding": (-1, 0)}, "padding: expected 0 to 16777216 for the height, got -1"),
    ({"padding": (1, 1, 1)}, "padding: expected two numbers, got 3"),
    ({"weight_scale": torch.ones(5)}, r"weight_scale: expected shape \[4\], got \[5\]"),
    ({"bias": torch.ones(4).double()}, "bias: expected dtype float32, got float64"),
    ({"padding": (1 << 24, 1 << 24)}, "x: the images with their padding are too large"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 3, 8, 8),
        "weight_scale": torch.ones(4),
        "bias": None,
        "padding": (1, 1),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        kk.int8_conv2d(packed=packed(int8(4, 3, 3, 3)), kernel_size=(3, 3), **arguments)
    with pytest.raises(ValueError, match=message):
        kk.binary_conv2d(weight_bits=kk.pack_signs(randn(4, 3, 3, 3)), **arguments)


def test_bad_weights() -> None:
    x, scale = torch.zeros(1, 3, 8, 8), torch.ones(4)
    with pytest.raises(ValueError, match="x: has K = 12, but the packed weight has K = 27"):
        kk.int8_conv2d(x, packed(int8(4, 3, 3, 3)), scale, kernel_size=(2, 2))
    with pytest.raises(ValueError, match="kernel_size: expected two numbers, got 1"):
        kk.int8_conv2d(x, packed(int8(4, 3, 3, 3)), scale, kernel_size=(3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="K = 65536 would overflow int32 sums; expected at most 65535"):
        kk.int8_conv2d(torch.zeros(1, 65536, 1, 1), packed(int8(1, 65536, 1, 1)), scale[:1], kernel_size=(1, 1))
    with pytest.raises(ValueError, match="weight_bits: expected 1 words in the last axis for k = 3"):
        kk.binary_conv2d(x, kk.pack_signs(randn(4, 3, 3, 70)), scale)
    bits = kk.pack_signs(randn(4, 3, 3, 3))
    bits[2, 1, 1, 0] |= 8
    with pytest.raises(ValueError, match="weight_bits: row 22 has bits set beyond k = 3"):
        kk.binary_conv2d(x, bits, scale)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    shape, n, window = CASES[1]
    _, w, scale, bias = layer(shape, n, window)
    weight, bits = packed(w), kk.pack_signs(randn(n, n, 3, 3).permute(0, 2, 3, 1))

    def model(x: Tensor) -> Tensor:
        y = kk.int8_conv2d(x, weight, scale, bias, kernel_size=window.kernel_size, **window.arguments())
        return kk.binary_conv2d(y - 1, bits, scale, stride=(2, 1))

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for size in ((2, 3, 9, 7), (3, 3, 12, 8)):
        x = randn(*size)
        torch.testing.assert_close(compiled(x), model(x))
        last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled(last), model(last))
