"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kdq_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tests of the torch operators run")


def pytest_configure(config: pytest.Config) -> None:
    """Stops before the first test where CUDA is asked for and cannot be: tests would fail one by one, or be skipped."""
    if config.getoption("--device") != "cuda":
        return
    import torch

    from kdq_kernels import _torch_library

    try:
        _torch_library.check_gpu(torch.device("cuda"))
    except RuntimeError as error:
        raise pytest.UsageError(f"--device cuda: {error}") from error


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of a test are: what --device says. `make test-cuda` asks for cuda."""
    name: str = request.config.getoption("--device")
    return name


ALL_ISAS = ["reference", "avx2", "avx512", "avx512vnni"]


@pytest.fixture(params=ALL_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set; skips, visibly, those that this CPU lacks."""
    name: str = request.param
    if name not in kdq_kernels.available_isas():
        pytest.skip(f"this CPU cannot run {name}")
    before = kdq_kernels.cpu_isa()
    kdq_kernels.set_isa(name)
    yield name
    kdq_kernels.set_isa(before)
