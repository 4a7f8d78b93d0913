"""What the inference layers share: frozen portable buffers, the packed-weight cache, gradients that reach the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq_kernels as kk
from kdq_kernels._torch_library import check_device

# The activations that kernels compute with their result, by the kernels' names: the same as functions and modules.
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
ACTIVATION_MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class InferenceLayer(nn.Module):
    """What takes a float layer's place for inference. Its tensors are buffers: frozen, and saved in a form any machine
    can load.

    sizes: names of the attributes that say how large it is, in the float layer as well as here.
    """

    sizes: ClassVar[tuple[str, str]]
    config: Any

    def arguments(self) -> dict[str, Any]:
        """What the constructor takes beside the config, ready for JSON."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceLayer:
        """Moves between devices, but keeps dtypes: `model.bfloat16()` must not round the float32 scales."""
        super()._apply(lambda t: keeping_dtype(fn, t), recurse)
        return self


class InferenceLinear(InferenceLayer):
    """A linear layer on quantized kernels.

    Subclasses compute the result in `kernel`; `dequantized_weight` is the float32 weight that they stand for.
    `activation` (None, "relu", "gelu" in its erf form, or "silu") is applied to the result, by the kernel where
    `computes_activation`.
    """

    sizes = ("in_features", "out_features")
    computes_activation = False
    in_features: int
    out_features: int
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str | None = None) -> None:
        super().__init__()
        if activation is not None and activation not in ACTIVATION_FUNCTIONS:
            names = ", ".join(map(repr, ACTIVATION_FUNCTIONS))
            raise ValueError(f"activation: expected None or one of {names}, got {activation!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        """x `[..., in_features]` -> `[..., out_features]`, in the dtype of x.

        Implementations read their tensors from `self._buffers`: `self.name` costs more than a microsecond on an
        nn.Module, and five of them cost as much as a small layer's whole product.
        """
        raise NotImplementedError

    def dequantized_weight(self) -> Tensor:
        """float32 `[out_features, in_features]`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected {self.in_features} features in the last axis, got {list(x.shape)}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and x.requires_grad:
            y = straight_through(lambda x: self.kernel(x, None), self.dequantized_weight, x)
            return y if self.activation is None else ACTIVATION_FUNCTIONS[self.activation](y)
        return self.kernel(x, self.activation)

    def to_float(self) -> nn.Linear | nn.Sequential:
        """A plain nn.Linear with the dequantized weight, in an nn.Sequential with the activation if there is one."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        with torch.no_grad():
            linear.weight.copy_(self.dequantized_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        if self.activation is None:
            return linear
        return nn.Sequential(linear, ACTIVATION_MODULES[self.activation]())

    def arguments(self) -> dict[str, Any]:
        fused = {} if self.activation is None else {"activation": self.activation}
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **fused,
        }

    def extra_repr(self) -> str:
        fused = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{fused}"


def keeping_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn(tensor)` for a function of nn.Module._apply, but for changes of the dtype: only the device is taken over."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def fused_activation(module: nn.Module) -> str | None:
    """The activation that a layer computes with its result, if it is one of ours and has one."""
    return module.activation if isinstance(module, InferenceLinear) else None


class _StraightThrough(torch.autograd.Function):
    """Passes `y` on; its gradient goes to x through the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


def straight_through(kernel: Callable[[Tensor], Tensor], weight: Callable[[], Tensor], x: Tensor) -> Tensor:
    """`kernel(x)`, with the gradient of the dequantized linear layer, so that what lies before a frozen layer still
    trains."""
    y: Tensor = _StraightThrough.apply(x, kernel(x.detach()), weight())
    return y


class PackedInt8Linear(InferenceLinear):
    """An inference layer on the int8 kernels.

    The kernels read a machine-dependent packed weight. It is a cache beside the portable buffers: made when the layer
    is built, loaded, copied or unpickled, remade after `set_isa` and on another device, and never saved.
    """

    computes_activation = True
    weight_scale: Tensor
    packed: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str | None) -> None:
        super().__init__(in_features, out_features, bias, activation)
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("packed", torch.empty(0, dtype=torch.uint8), persistent=False)
        self._packed_isa = ""

    def int8_weight(self) -> Tensor:
        """The integers, int8 `[out_features, in_features]`."""
        raise NotImplementedError

    def pack(self) -> None:
        """Makes the packed weight from the portable buffers.

        Raises:
            RuntimeError: the layer is on a device for which this build has no kernels.
        """
        check_device(self.weight_scale.device)
        self.packed = kk.pack_int8_weight(self.int8_weight())
        self._packed_isa = kk.cpu_isa()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedInt8Linear:
        before = self.packed.device
        super()._apply(fn, recurse)
        if self.packed.device != before:
            self.pack()
        return self

    def packed_weight(self) -> Tensor:
        """The packed weight for the instruction set in force."""
        if not torch.compiler.is_compiling() and self._packed_isa != kk.cpu_isa():
            self.pack()
        own: dict[str, Any] = self._buffers
        packed: Tensor = own["packed"]
        return packed

    def dequantized_weight(self) -> Tensor:
        return kk.dequantize(self.int8_weight(), self.weight_scale, axis=0)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.pack()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "packed": torch.empty(0, dtype=torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()
