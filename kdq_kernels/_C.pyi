"""Types of the native module (csrc/bindings/numpy*.cpp and introspection.cpp)."""

from typing import Any

from numpy import bool_, float32, int8, int32, int64, uint8
from numpy.typing import NDArray

from kdq_kernels.cpu import BuildInfo

Floats = NDArray[Any]  # float32 or float16
Ints = NDArray[Any]  # int8, uint8 or int32
ZeroPoint = NDArray[Any] | None  # int32 or float32

def cpu_isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def build_info() -> BuildInfo: ...
def machine_peak(name: str, threads: int, bytes: int, seconds: float) -> float: ...
def fake_quantize(
    x: Floats,
    scale: NDArray[float32],
    zero_point: ZeroPoint,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
    out: Floats | None,
) -> Floats: ...
def fake_quantize_backward(
    grad: Floats,
    x: Floats,
    scale: NDArray[float32],
    zero_point: ZeroPoint,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> tuple[Floats, NDArray[float32], NDArray[float32]]: ...
def quantize(
    x: Floats,
    scale: NDArray[float32],
    zero_point: ZeroPoint,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> Ints: ...
def dequantize(
    q: Ints, scale: NDArray[float32], zero_point: ZeroPoint, axis: int | None, group_size: int | None
) -> NDArray[float32]: ...
def quantize_rows(x: Floats) -> tuple[NDArray[int8], NDArray[float32]]: ...
def fake_quantize_rows(x: Floats) -> Floats: ...
def binarize_rows(x: Floats) -> tuple[Floats, NDArray[float32]]: ...
def int8_packed_bytes(n: int, k: int, bits: int) -> int: ...
def pack_int8_weight(w: NDArray[int8], bits: int) -> NDArray[uint8]: ...
def unpack_int8_weight(packed: NDArray[uint8]) -> NDArray[int8]: ...
def int8_matmul(a: NDArray[int8], b: NDArray[Any]) -> NDArray[int32]: ...
def int8_linear(
    x: Floats,
    packed: NDArray[uint8],
    weight_scale: NDArray[float32],
    bias: NDArray[float32] | None,
    input_scale: float | None,
    input_zero_point: int | None,
    input_quant_max: int,
    activation: str | None,
    weight_only: bool,
) -> Floats: ...
def int8_conv2d(
    x: Floats,
    packed: NDArray[uint8],
    weight_scale: NDArray[float32],
    bias: NDArray[float32] | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    input_scale: float | None,
    input_zero_point: int | None,
    input_quant_max: int,
    activation: str | None,
) -> Floats: ...
def pack_signs(x: Floats) -> NDArray[int64]: ...
def unpack_signs(bits: NDArray[int64], k: int) -> NDArray[float32]: ...
def binary_matmul(a_bits: NDArray[int64], b_bits: NDArray[int64], k: int) -> NDArray[int32]: ...
def binary_linear(
    x: Floats | NDArray[int64],
    weight_bits: NDArray[int64],
    weight_scale: NDArray[float32],
    bias: NDArray[float32] | None,
    k: int | None,
) -> Floats: ...
def binary_conv2d(
    x: Floats,
    weight_bits: NDArray[int64],
    weight_scale: NDArray[float32],
    bias: NDArray[float32] | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Floats: ...
def binary_threshold(
    x: Floats | NDArray[int64], weight_bits: NDArray[int64], threshold: NDArray[int32], k: int | None
) -> NDArray[int64]: ...
def bitplane_pairs() -> int: ...
def pack_bitplanes(q: NDArray[Any], bits: int, form: str) -> NDArray[int64]: ...
def unpack_bitplanes(planes: NDArray[int64], k: int, form: str) -> NDArray[Any]: ...
def bitplane_matmul(
    a_planes: NDArray[int64], b_planes: NDArray[int64], k: int, a_form: str, b_form: str
) -> NDArray[int32]: ...
def bitplane_linear(
    x: Floats,
    weight_planes: NDArray[int64],
    weight_sum: NDArray[int32],
    weight_scale: NDArray[float32],
    bias: NDArray[float32] | None,
    input_scale: float,
    input_zero_point: int | None,
    input_quant_max: int,
    weight_form: str,
    activation: str | None,
) -> Floats: ...
def pack_indices(indices: NDArray[uint8], bits: int) -> NDArray[int32]: ...
def unpack_indices(packed: NDArray[int32], bits: int, n: int, k: int) -> NDArray[uint8]: ...
def codebook_linear(
    x: Floats,
    packed: NDArray[int32],
    codebook: NDArray[float32],
    out_features: int,
    bias: NDArray[float32] | None,
    activation: str | None,
) -> Floats: ...
def scaled_dot_product_attention(
    query: Floats,
    key: Floats,
    value: Floats,
    attn_mask: NDArray[float32] | NDArray[bool_] | None,
    is_causal: bool,
    scale: float,
) -> Floats: ...
def distillation_loss(
    student: Floats,
    teacher: Floats,
    target: NDArray[int64] | None,
    temperature: float,
    alpha: float,
    with_gradient: bool,
) -> tuple[float, Floats | None]: ...
