"""Direct calls of operators: what torch.ops would do, in every situation that torch tells apart."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kdq_kernels as kk
import op_cases
from kdq_kernels._torch_library import calls

ops = torch.ops.kdq
DIRECT = vars(calls._CALLS)


def cases() -> list[tuple[str, str, tuple[Any, ...]]]:
    """Those of op_cases that are called directly, with all arguments by position."""
    result = []
    for case, op, args, kwargs in op_cases.op_cases():
        name = op._schema.name.removeprefix("kdq::")
        if name in DIRECT:
            others = op._schema.arguments[len(args) :] if kwargs else []
            result.append((case, name, (*args, *(kwargs.get(a.name, a.default_value) for a in others))))
    return result


@pytest.fixture(autouse=True)
def _built() -> None:
    if not calls.are_direct():
        pytest.skip(f"operators are called by torch.ops: built for torch {kk.build_info()['torch_calls']}")


def layer(k: int = 70, n: int = 13) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of int8_linear."""
    packed = kk.pack_int8_weight(op_cases.int8(n, k))
    return op_cases.randn(5, k), packed, torch.rand(n) + 0.1, op_cases.randn(n)


class Notes:
    """A mode that notes the functions it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def handle(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


class Seen(Notes, TorchFunctionMode):
    __torch_function__ = Notes.handle


class Dispatched(Notes, TorchDispatchMode):
    __torch_dispatch__ = Notes.handle


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise KeyError(str(func))


class Marked(Tensor):
    """A subclass: what __torch_function__ returns is one too."""


def test_every_direct_operator_has_a_case() -> None:
    assert {name for _, name, _ in cases()} == set(DIRECT)


@pytest.mark.parametrize(("name", "args"), [c[1:] for c in cases()], ids=[c[0] for c in cases()])
def test_same_results(name: str, args: tuple[Any, ...]) -> None:
    result, expected = DIRECT[name](*args), getattr(ops, name)(*args)
    assert type(DIRECT[name]) is not type(ops.int8_linear.default)
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, packed, scale, bias: (x, packed, scale[:3], bias),  # std::invalid_argument
        lambda x, packed, scale, bias: (x.to_sparse(), packed, scale, bias),  # no kernel
        lambda x, packed, scale, bias: (x, packed),  # too few
        lambda x, packed, scale, bias: (x, packed, scale, bias, None, None, 255, None, 1),  # too many
        lambda x, packed, scale, bias: (None, packed, scale, bias),
        lambda x, packed, scale, bias: (x, packed, scale, bias, None, None, "255"),
        lambda x, packed, scale, bias: (x, packed, scale, bias, None, None, 1 << 70),
        lambda x, packed, scale, bias: (x, packed, scale, bias, None, None, 255, "tanh"),
        lambda x, packed, scale, bias: (x, packed, scale, bias, None, None, 255, "\udc80"),  # no UTF-8
        lambda x, packed, scale, bias: ([x], packed, scale, bias),
    ],
)
def test_same_errors(change: Callable[..., tuple[Any, ...]]) -> None:
    args = change(*layer())
    with pytest.raises(Exception) as expected:  # noqa: PT011  whichever it is
        ops.int8_linear.default(*args)
    with pytest.raises(type(expected.value)) as error:
        DIRECT["int8_linear"](*args)
    assert str(error.value) == str(expected.value)


def test_numbers_of_other_types() -> None:
    """A bool is an int to torch, NumPy's and torch's numbers convert: all of that is left to torch."""
    x, packed, scale, bias = layer()
    static = torch.tensor(0.1)
    for most in (127, True, torch.tensor(127)):
        result = DIRECT["int8_linear"](x, packed, scale, bias, static, None, most)
        assert torch.equal(result, ops.int8_linear.default(x, packed, scale, bias, static, None, most))
    query = op_cases.randn(1, 2, 3, 4)
    result = DIRECT["scaled_dot_product_attention"](query, query, query, None, False, 1)  # an int for a float
    assert torch.equal(result, kk.scaled_dot_product_attention(query, query, query, scale=1.0))
    result = DIRECT["scaled_dot_product_attention"](query, query, query, None, 1, 1.0)
    assert torch.equal(result, kk.scaled_dot_product_attention(query, query, query, scale=1.0, is_causal=True))


def test_function_modes_and_subclasses_see_the_operator() -> None:
    args = layer()
    with Seen() as mode:
        kk.int8_linear(*args)
    assert ops.int8_linear.default in mode.functions
    marked = kk.int8_linear(args[0].as_subclass(Marked), *args[1:])
    assert type(marked) is Marked
    parameter = torch.nn.Parameter(args[3])
    assert type(kk.int8_linear(*args[:3], parameter)) is Tensor


def test_dispatch_modes_see_the_operator() -> None:
    args = layer()
    with Dispatched() as mode:
        kk.int8_linear(*args)
    assert mode.functions == [ops.int8_linear.default]
    with Refusing(), pytest.raises(KeyError, match="int8_linear"):
        kk.int8_linear(*args)


def test_traces_have_the_operator() -> None:
    args = layer()
    graph = make_fx(lambda x: kk.int8_linear(x, *args[1:]))(args[0]).graph
    assert ops.int8_linear.default in [node.target for node in graph.nodes]
    traced = torch.jit.trace(lambda x: kk.int8_linear(x, *args[1:]), (args[0],))
    assert "kdq::int8_linear" in str(traced.graph)
    other = args[0] * 2
    assert torch.equal(traced(other), kk.int8_linear(other, *args[1:]))


def test_profiles_have_the_operator() -> None:
    args = layer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kk.int8_linear(*args)
    assert "kdq::int8_linear" in [event.key for event in profile.key_averages()]


def test_function_transforms_meet_the_operator() -> None:
    """vmap runs it once for each of a batch, whose wrapper is of type Tensor."""
    x, *rest = layer()
    result = torch.vmap(lambda rows: kk.int8_linear(rows, *rest))(torch.stack([x, -x]))
    assert torch.equal(result, torch.stack([kk.int8_linear(x, *rest), kk.int8_linear(-x, *rest)]))
    with pytest.raises(ValueError, match="weight_scale"), Seen():  # after the warning that it is slow
        torch.vmap(lambda rows: kk.int8_linear(rows, rest[0], rest[1][:3]))(torch.stack([x, x]))


@pytest.mark.parametrize("inference", [False, True])
def test_results_are_of_the_mode_in_force(inference: bool) -> None:
    args = layer()
    with torch.inference_mode(inference):
        assert kk.int8_linear(*args).is_inference() == inference


def test_a_bound_operator_holds_its_front() -> None:
    from kdq_kernels import _calls

    front = ops.int8_linear.default
    before = sys.getrefcount(front)
    call = _calls.bind(front, "kdq::int8_linear")
    assert sys.getrefcount(front) == before + 1
    del call
    assert sys.getrefcount(front) == before


def test_references_are_given_back() -> None:
    args = layer()
    pair = ([2, 1], [1, 1], [1, 2])
    images, conv = op_cases.randn(1, 5, 6, 7), kk.pack_signs(op_cases.randn(13, 3, 3, 5))
    before = [sys.getrefcount(value) for value in (*args, *pair)]
    for _ in range(10):
        kk.int8_linear(*args)
        kk.int8_linear_chain(args[0], [args[1]], [args[2]], [args[3]])
        kk.binary_conv2d(images, conv, args[2], args[3], stride=pair[0], padding=pair[1], dilation=pair[2])
        with pytest.raises(ValueError, match="weight_scale"):
            kk.int8_linear(args[0], args[1], args[3][:3])
    assert [sys.getrefcount(value) for value in (*args, *pair)] == before


def test_other_threads_run_meanwhile() -> None:
    """Python's lock is free during the kernel."""
    x, packed, scale, _ = layer(2048, 2048)
    x = x.expand(2048, 5, 2048).reshape(-1, 2048)
    done, turns = threading.Event(), 0

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(1e-3)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # whoever has the lock keeps it until it gives it up
    try:
        other = threading.Thread(target=count)
        other.start()
        turns = 0
        kk.int8_linear(x, packed, scale)
        during = turns
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()
    assert during > 2


def test_compiled_code_has_the_operator() -> None:
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    args = layer()
    compiled = torch.compile(kk.int8_linear, backend=backend, fullgraph=True)
    assert torch.equal(compiled(*args), kk.int8_linear(*args))
    assert ops.int8_linear.default in seen


def test_another_version_of_torch_is_called_by_torch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert not calls.are_direct()
    assert calls._direct_calls().int8_linear is ops.int8_linear.default


def test_only_operators_of_one_result_are_bound() -> None:
    from kdq_kernels import _calls

    with pytest.raises(RuntimeError, match="expected one tensor as result"):
        _calls.bind(ops.quantize_rows.default, "kdq::quantize_rows")
    with pytest.raises(RuntimeError, match="kdq::nothing"):
        _calls.bind(ops.quantize_rows.default, "kdq::nothing")
