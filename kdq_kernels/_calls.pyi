"""Types of the module of direct calls (csrc/bindings/operator_calls.cpp)."""

from collections.abc import Callable

from torch import Tensor
from torch._ops import OpOverload

def bind(overload: OpOverload, name: str) -> Callable[..., Tensor]: ...
