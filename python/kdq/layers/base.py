"""What the inference layers share: frozen portable buffers, the packed-weight cache, gradients that reach the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdq_kernels as kk
from kdq.layers.geometry import Conv2dGeometry, Geometry, LinearGeometry, check_conv_config
from kdq_kernels._torch_library import check_device

# The activations that kernels compute with their result, by the kernels' names: the same as functions and modules.
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
ACTIVATION_MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class InferenceLayer(nn.Module):
    """What takes a float layer's place for inference. Its tensors are buffers: frozen, and saved in a form any machine
    can load."""

    config: Any

    def arguments(self) -> dict[str, Any]:
        """What the constructor takes beside the config, ready for JSON."""
        raise NotImplementedError

    def fits(self, module: nn.Module) -> bool:
        """Whether it may take the place of a layer, in float or quantized: it has the same sizes."""
        raise NotImplementedError

    def described(self) -> str:
        """What it is, for messages."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceLayer:
        """Moves between devices, but keeps dtypes: `model.bfloat16()` must not round the float32 scales."""
        super()._apply(lambda t: keeping_dtype(fn, t), recurse)
        return self


class InferenceProduct(InferenceLayer):
    """A linear or convolution layer on quantized kernels.

    Subclasses compute the result in `kernel`; `dequantized_weight` is the float32 weight that they stand for.
    `activation` (None, "relu", "gelu" in its erf form, or "silu") is applied to the result, by the kernel where
    `computes_activation`. The geometry's sizes are attributes, named as in the float layer.
    """

    geometry_type: ClassVar[type[Geometry]]
    computes_activation = False
    channel_axis: ClassVar[int]
    geometry: Geometry
    bias: Tensor | None

    def __init__(self, geometry: Geometry, bias: bool, config: Any, activation: str | None) -> None:
        super().__init__()
        if activation is not None and activation not in ACTIVATION_FUNCTIONS:
            names = ", ".join(map(repr, ACTIVATION_FUNCTIONS))
            raise ValueError(f"activation: expected None or one of {names}, got {activation!r}")
        self.geometry = geometry
        for name, value in geometry.arguments().items():
            setattr(self, name, value)
        self.inputs = geometry.inputs
        self.config = config
        self.activation = activation
        self.register_buffer("bias", torch.zeros(geometry.outputs) if bias else None)

    @classmethod
    def sized_as(cls, layer: Any, config: Any, activation: str | None = None) -> Self:
        """A layer of the sizes of a float one, with its bias; the weight is still to be set."""
        make: Any = cls
        fused = {} if activation is None else {"activation": activation}
        sizes = cls.geometry_type.of(layer).arguments()
        made: Self = make(**sizes, bias=layer.bias is not None, config=config, **fused)
        if layer.bias is not None:
            made.bias = layer.bias.detach().float().clone()
        return made

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        """x as in `forward`, with an axis for images -> the result, in the dtype of x.

        Implementations read their tensors from `self._buffers`: `self.name` costs more than a microsecond on an
        nn.Module, and five of them cost as much as a small layer's whole product.
        """
        raise NotImplementedError

    def dequantized_weight(self) -> Tensor:
        """float32, in the shape of the float layer's weight."""
        raise NotImplementedError

    def pack(self) -> None:
        """Makes what the kernels read from the portable buffers; here nothing, they read these."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[self.channel_axis] != self.inputs:
            raise ValueError(f"x: expected {self.geometry.expected}, got {list(x.shape)}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and x.requires_grad:
            y = straight_through(lambda x: self.kernel(x, None), self.dequantized_weight, x, self.geometry)
            return y if self.activation is None else ACTIVATION_FUNCTIONS[self.activation](y)
        return self.kernel(x, self.activation)

    def to_float(self) -> nn.Module:
        """A plain layer with the dequantized weight, in an nn.Sequential with the activation if there is one."""
        layer: Any = self.geometry.float_layer(bias=self.bias is not None)
        with torch.no_grad():
            layer.weight.copy_(self.dequantized_weight())
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        if self.activation is None:
            return layer
        return nn.Sequential(layer, ACTIVATION_MODULES[self.activation]())

    def fits(self, module: nn.Module) -> bool:
        return self.geometry.fits(module)

    def described(self) -> str:
        return self.geometry.described()

    def arguments(self) -> dict[str, Any]:
        fused = {} if self.activation is None else {"activation": self.activation}
        return {**self.geometry.arguments(), "bias": self.bias is not None, **fused}

    def extra_repr(self) -> str:
        fused = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self.geometry}, bias={self.bias is not None}{fused}"


class InferenceLinear(InferenceProduct):
    """A linear layer on quantized kernels: x `[..., in_features]` -> `[..., out_features]`."""

    geometry_type = LinearGeometry
    channel_axis = -1
    in_features: int
    out_features: int

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, config: Any, activation: str | None = None
    ) -> None:
        super().__init__(LinearGeometry(in_features, out_features), bias, config, activation)


class InferenceConv2d(InferenceProduct):
    """A 2d convolution on quantized kernels, in one group and padded with zeros.

    x `[images, in_channels, H, W]` -> `[images, out_channels, OH, OW]`, or both without images. An x in channels_last
    format is the fast one, and gives such a result.

    Args:
        kernel_size, stride, padding, dilation: an integer for both axes, or two, as those of nn.Conv2d.
        config: `Int8Dynamic`, `Int8Static`, `LowBit` or `Binary`, as the class is for.
        activation: None, "relu", "gelu" (erf form) or "silu", computed by the kernel; a `BinaryConv2d` has none.

    Raises:
        ValueError: an argument is out of range, or there are no convolution kernels for the config.
    """

    geometry_type = Conv2dGeometry
    channel_axis = -3
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        bias: bool = True,
        config: Any,
        activation: str | None = None,
    ) -> None:
        check_conv_config(config)
        sizes: tuple[Any, ...] = (in_channels, out_channels, kernel_size, stride, padding, dilation)
        super().__init__(Conv2dGeometry(*sizes), bias, config, activation)

    def forward(self, x: Tensor) -> Tensor:
        """
        Raises:
            ValueError: x has other axes or another number of channels.
        """
        y = super().forward(self.geometry.batched(x))
        return y.squeeze(0) if x.dim() == 3 else y


def keeping_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn(tensor)` for a function of nn.Module._apply, but for changes of the dtype: only the device is taken over."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def fused_activation(module: nn.Module) -> str | None:
    """The activation that a layer computes with its result, if it is one of ours and has one."""
    return module.activation if isinstance(module, InferenceProduct) else None


class _StraightThrough(torch.autograd.Function):
    """Passes `y` on; its gradient goes to x through the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        grad = ctx.geometry.dense(grads[0])
        like = grad.new_empty(1).expand(ctx.shape)
        return ctx.geometry.input_gradient(grad, weight.flatten(1).to(grad.dtype), like), None, None, None


def straight_through(
    kernel: Callable[[Tensor], Tensor], weight: Callable[[], Tensor], x: Tensor, geometry: Geometry
) -> Tensor:
    """`kernel(x)`, with the gradient of the dequantized layer, so that what lies before a frozen layer still trains."""
    y: Tensor = _StraightThrough.apply(x, kernel(x.detach()), weight(), geometry)
    return y


class PackedProduct(InferenceProduct):
    """An inference layer whose kernels read the weight in another order than that in which it is saved.

    The packed weight is a cache beside the portable buffers: made when the layer is built, loaded, copied or unpickled,
    remade on another device, and never saved. Where it depends on the machine, layers read it by `packed_weight`, which
    remakes it after `set_isa`.
    """

    weight_scale: Tensor
    packed: Tensor

    def __init__(self, geometry: Geometry, bias: bool, config: Any, activation: str | None) -> None:
        super().__init__(geometry, bias, config, activation)
        self.register_buffer("packed", torch.empty(0, dtype=torch.uint8), persistent=False)
        self._packed_isa = ""

    def pack_weight(self) -> Tensor:
        """The packed weight, from the portable buffers."""
        raise NotImplementedError

    def pack(self) -> None:
        """
        Raises:
            RuntimeError: the layer is on a device for which this build has no kernels.
        """
        check_device(self.weight_scale.device)
        self.packed = self.pack_weight()
        self._packed_isa = kk.cpu_isa()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedProduct:
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


class PackedInt8(PackedProduct):
    """A layer on the int8 kernels, with `input_scale` and `input_zero_point` (or None) among its buffers."""

    computes_activation = True
    input_quant_max = 255
    packed_bits = 8  # of a weight, as the kernels read it from memory

    def __init__(self, geometry: Geometry, bias: bool, config: Any, activation: str | None) -> None:
        super().__init__(geometry, bias, config, activation)
        self.register_buffer("weight_scale", torch.ones(geometry.outputs))

    def int8_weight(self) -> Tensor:
        """The integers, int8 `[N, K]`."""
        raise NotImplementedError

    def pack_weight(self) -> Tensor:
        return kk.pack_int8_weight(self.geometry.kernel_order(self.int8_weight()), self.packed_bits)

    def kernel(self, x: Tensor, activation: str | None) -> Tensor:
        return self.int8_kernel(x, self.packed_weight(), activation)

    def int8_kernel(self, x: Tensor, packed: Tensor, activation: str | None) -> Tensor:
        own: dict[str, Any] = self._buffers  # see InferenceProduct.kernel
        return self.geometry.int8(
            x,
            packed,
            own["weight_scale"],
            own["bias"],
            input_scale=own["input_scale"],
            input_zero_point=own["input_zero_point"],
            input_quant_max=self.input_quant_max,
            activation=activation,
        )

    def dequantized_weight(self) -> Tensor:
        return kk.dequantize(self.int8_weight(), self.weight_scale, axis=0).view(self.geometry.weight_shape)
