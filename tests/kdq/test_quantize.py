"""quantize_, prepare_qat_, convert_ and the layers: what is replaced, what is left, and that errors change nothing."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
import kdq_kernels as kk
from kdq.configs import Config, assign, config_from_json, config_to_json
from kdq.grids import AffineGrid
from kdq.layers.low_bit_linear import pack_bits, unpack_bits

CONFIGS: list[Config] = [
    kdq.Int8Dynamic(),
    kdq.Int8Static(),
    kdq.Int8WeightOnly(),
    kdq.Codebook(weight_bits=5),
    kdq.LowBit(weight_bits=8, act_bits=8),
    kdq.LowBit(weight_bits=4, act_bits=4),
    kdq.LowBit(weight_bits=3, act_bits=5),
    kdq.LowBit(weight_bits=2, act_bits=2),
    kdq.LowBit(weight_bits=1, act_bits=4),
    kdq.Binary(),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(37, 48),
        nn.ReLU(),
        nn.BatchNorm1d(48),
        nn.Sequential(nn.Linear(48, 33, bias=False), nn.Tanh()),
    )


def data(rows: int = 40) -> Tensor:
    return torch.randn(rows, 37, generator=torch.Generator().manual_seed(1))


def quantized(config: Config) -> nn.Sequential:
    m = model().eval()
    kdq.quantize_(m, config, calibration=[data()])
    return m


# ---- configs ---------------------------------------------------------------------------------------------------------


@every_config
def test_configs_round_trip_through_json(config: Config) -> None:
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, "4", True])
def test_low_bit_validates(bits: Any) -> None:
    with pytest.raises(ValueError, match="weight_bits"):
        kdq.LowBit(weight_bits=bits, act_bits=4)


def test_low_bit_combinations() -> None:
    with pytest.raises(ValueError, match="act_bits"):
        kdq.LowBit(weight_bits=2, act_bits=1)
    assert kdq.quantize_(model(), kdq.LowBit(weight_bits=1, act_bits=1)).changed["0"] == kdq.Binary()
    with pytest.raises(ValueError, match="type among"):
        config_from_json({"type": "Int4"})
    with pytest.raises(ValueError, match="LowBit"):
        config_from_json({"type": "LowBit", "weight_bits": 4})


# ---- quantize_ and convert_ ------------------------------------------------------------------------------------------


@every_config
def test_report_is_complete_and_the_model_runs(config: Config) -> None:
    m = model().eval()
    report = kdq.quantize_(m, config, calibration=[data()])
    assert report.changed == {"0": config, "3.0": config}
    assert set(report.left) == {"2"}, "of what has weights, only the batch norm is left"
    assert m(data()).shape == (40, 33)
    assert "3.0" in str(report)
    again = kdq.quantize_(m, config, calibration=[data()])
    assert not again.changed
    assert "already quantized" in again.left["0"]


@pytest.mark.parametrize(
    ("config", "decibels"),
    [
        (kdq.Int8Dynamic(), 30),
        (kdq.Int8Static(), 30),
        (kdq.Int8WeightOnly(), 35),
        (kdq.LowBit(weight_bits=4, act_bits=4), 10),
    ],
    ids=str,
)
def test_post_training_error_is_small(config: Config, decibels: float) -> None:
    expected = model().eval()(data())
    error = (quantized(config)(data()) - expected).norm() / expected.norm()
    assert -20 * torch.log10(error) > decibels


def test_patterns_and_filter() -> None:
    report = kdq.quantize_(model(), {"3.*": kdq.Binary()})
    assert report.changed == {"3.0": kdq.Binary()}
    assert "pattern" in report.left["0"]
    report = kdq.quantize_(model(), kdq.Int8Dynamic(), lambda module, name: name == "0")
    assert list(report.changed) == ["0"]
    assert report.left["3.0"] == "filter_fn is false"


@pytest.mark.parametrize("change", ["quantize_", "prepare_qat_", "lower_precision_", "convert_", "set_precision_"])
def test_one_rule_for_names_and_patterns(change: str) -> None:
    """Exact names before patterns, these in order; what matches no layer is an error, and changes nothing."""

    def applied(m: nn.Module, configs: dict[str, Config]) -> dict[str, Any]:
        if change == "set_precision_":
            kdq.set_precision_(m, configs)
            return kdq.precision_of(m)
        return dict(getattr(kdq, change)(m, configs).changed)

    m = model()
    if change == "lower_precision_":
        kdq.prepare_qat_(m, kdq.Int8Dynamic())
    if change == "set_precision_":
        kdq.prepare_switchable_(m, [kdq.Int8Dynamic(), kdq.Int8WeightOnly()])
    before = str(m)
    wide, narrow = kdq.Int8Dynamic(), kdq.Int8WeightOnly()
    for wrong in ("nothing", "encoder.*", "1"):  # "1" is a ReLU, which has no weights
        with pytest.raises(ValueError, match=f"{re.escape(repr(wrong))} is neither the name of a layer nor a pattern"):
            applied(m, {"*": wide, wrong: narrow})
    assert str(m) == before
    assert applied(m, {"*": wide, "3.*": wide, "3.0": narrow}) == {"0": wide, "3.0": narrow}


def test_an_exact_name_is_no_pattern() -> None:
    wide, narrow = kdq.Int8Dynamic(), kdq.Int8WeightOnly()
    assert assign({"a?": narrow, "*": wide}, ["a?", "ab"]) == {"a?": narrow, "ab": wide}
    assert assign({"a?": narrow}, ["a?", "ab"]) == {"a?": narrow, "ab": None}
    assert assign({"a?": narrow}, ["aa", "ab"]) == {"aa": narrow, "ab": narrow}


def test_names_of_one_layer_get_one_config() -> None:
    m = nn.ModuleDict({"a": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    m["b"] = m["a"]
    with pytest.raises(ValueError, match="'a' and 'b' are one layer, but get Int8Dynamic.* and Int8WeightOnly"):
        kdq.quantize_(m, {"*": kdq.Int8Dynamic(), "b": kdq.Int8WeightOnly()})
    with pytest.raises(
        ValueError, match="filter_fn: 'a' and 'b' are one layer, but it is true of the first name alone"
    ):
        kdq.quantize_(m, kdq.Int8Dynamic(), lambda _, name: name != "b")
    with pytest.raises(ValueError, match="filter_fn: 'b' and 'a' are one layer"):
        kdq.prune_(m, 0.5, lambda _, name: name == "b")
    assert type(m["a"]) is nn.Linear


@pytest.mark.parametrize("named", ["a", "b", "[b]"])
def test_a_layer_named_once_is_changed_at_all_its_names(named: str) -> None:
    for change in (kdq.quantize_, kdq.prepare_qat_, kdq.convert_):
        m = nn.ModuleDict({"a": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
        m["b"] = m["a"]
        assert dict(change(m, {named: kdq.Int8Dynamic()}).changed) == dict.fromkeys("ab", kdq.Int8Dynamic())
        assert m["a"] is m["b"]
        assert type(m["a"]) is not nn.Linear
        assert type(m["c"]) is nn.Linear


def test_the_title_speaks_of_fused_activations_where_there_are_some() -> None:
    assert "2 changed, 1 left" in str(kdq.prepare_qat_(model(), kdq.Int8Dynamic()))
    assert "2 changed, 1 with their activation, 1 left" in str(kdq.quantize_(model(), kdq.Int8Dynamic()))


def test_what_cannot_be_quantized_is_left_with_a_reason() -> None:
    class Custom(nn.Linear):
        pass

    m = nn.ModuleDict({"wide": nn.Linear(3, 3).double(), "custom": Custom(3, 3), "conv": nn.Conv1d(1, 1, 1)})
    m["normed"] = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    report = kdq.quantize_(m, kdq.Int8Dynamic())
    assert not report.changed
    assert "float64" in report.left["wide"]
    assert "subclass" in report.left["custom"]
    assert "Conv1d" in report.left["conv"]
    assert "parametrized" in report.left["normed"]


def watches(layer: nn.Module) -> list[Any]:
    """Ways to watch or change one layer, each of which gives back how to undo it."""

    def replace_forward() -> Callable[[], None]:
        layer.forward = lambda x: x  # type: ignore[method-assign]
        return lambda: vars(layer).pop("forward")

    return [
        *(
            lambda register=register: getattr(layer, register)(lambda *_: None).remove
            for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
        ),
        replace_forward,
    ]


def test_layers_that_are_watched_are_left_and_their_twins_refused() -> None:
    """A new layer would not have the hooks."""
    m, trained = model(), model()
    kdq.prepare_qat_(trained, kdq.Int8Dynamic())
    twin = trained[3][0]
    for put, put_on_twin in zip(watches(m[0]), watches(twin), strict=True):
        remove, remove_from_twin = put(), put_on_twin()
        report = kdq.prepare_qat_(copy.copy(m), kdq.Binary(), lambda module, name: name == "0")
        assert not report.changed
        assert "hooks" in report.left["0"]
        for change in (kdq.convert_, lambda student: kdq.lower_precision_(student, kdq.Binary())):
            with pytest.raises(ValueError, match="3.0: it has hooks"):
                change(trained)
        assert type(trained[0]).__name__ == "Int8QATLinear"
        remove(), remove_from_twin()
    assert kdq.quantize_(m, kdq.Int8Dynamic()).changed
    assert kdq.convert_(trained).changed


def test_shared_layers_stay_shared() -> None:
    m = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    m.append(m[0])
    report = kdq.quantize_(m, kdq.Int8Dynamic())
    assert set(report.changed) == {"0", "2"}
    assert m[0] is m[2]


def test_transformer_encoder_runs_the_quantized_layers() -> None:
    """In inference mode torch would take a fused path that reads linear1.weight."""
    torch.manual_seed(0)
    m = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    with torch.inference_mode():
        expected = m(x)
        report = kdq.quantize_(m, kdq.Int8Dynamic())
        assert "layers.0.linear1" in report.changed
        for name in ("layers.0.self_attn", "layers.0.self_attn.out_proj"):
            assert "call kdq.open_attention_ first" in report.left[name]
        got = m(x)
    assert 0 < (got - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("config", [kdq.Int8Dynamic(), kdq.Binary()], ids=str)
def test_padded_batches_of_transformers_run_the_quantized_layers(config: Config) -> None:
    """In inference mode torch would pack them into nested tensors for the path that reads linear1.weight."""
    torch.manual_seed(0)
    m = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    kdq.quantize_(m, config)
    with torch.inference_mode():
        got = m(x, src_key_padding_mask=padding)
        for row, length in enumerate((5, 3, 4)):
            torch.testing.assert_close(got[row, :length], m(x[row : row + 1, :length])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "config", "kwargs", "error", "message"),
    [
        (lambda m: None, "int8", {}, TypeError, "config"),
        (lambda m: None, kdq.Int8Static(), {}, ValueError, "calibration"),
        (lambda m: None, kdq.Int8Static(), {"calibration": []}, ValueError, "batch"),
        (
            lambda m: m[3][0].weight.data.fill_(float("nan")),
            kdq.Int8Dynamic(),
            {},
            ValueError,
            "3.0.*weight.*NaN",
        ),
        (lambda m: m[0].bias.data.fill_(float("inf")), kdq.Binary(), {}, ValueError, "0.*bias"),
    ],
)
def test_errors_leave_the_model_as_it_was(
    spoil: Callable[[Any], Any], config: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    m = model()
    spoil(m)
    before = copy.deepcopy(m)
    with pytest.raises(error, match=message):
        kdq.quantize_(m, config, **kwargs)
    assert str(m) == str(before)


def test_a_bare_linear_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="Sequential"):
        kdq.quantize_(nn.Linear(3, 3), kdq.Int8Dynamic())


def test_quantized_transformers_take_padding() -> None:
    """nn.TransformerEncoder would pack the batch into a nested tensor for its fused path."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padded = torch.randn(2, 5, 16), torch.arange(5).expand(2, 5) >= torch.tensor([[3], [5]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padded)
        nested = nn.TransformerEncoder(layer, 2).eval()
        nested.load_state_dict(model.state_dict())
        kdq.quantize_(nested, kdq.Int8Dynamic())
        got = nested(x, src_key_padding_mask=padded)
    assert (got - expected)[~padded].norm() / expected[~padded].norm() < 0.02


def test_convert_before_any_batch_is_an_error() -> None:
    m = model()
    kdq.prepare_qat_(m, kdq.LowBit(weight_bits=4, act_bits=4))
    with pytest.raises(RuntimeError, match="0: the activation scale is not initialized"):
        kdq.convert_(m)
    assert not any(isinstance(module, kdq.LowBitLinear) for module in m.modules())


def test_convert_with_a_plan() -> None:
    m = model()
    kdq.prepare_qat_(m, {"0": kdq.Int8Dynamic()})
    report = kdq.convert_(m, {"3.*": kdq.Binary()})
    assert report.changed == {"0": kdq.Int8Dynamic(), "3.0": kdq.Binary()}
    with pytest.raises(ValueError, match="plan"):
        kdq.convert_(model(), {"*": kdq.Int8Static()})


# ---- layers ----------------------------------------------------------------------------------------------------------


@every_config
def test_copies_compute_the_same(config: Config) -> None:
    m = quantized(config)
    expected = m(data())
    assert torch.equal(copy.deepcopy(m)(data()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(m))(data()), expected)
    other = quantized(config)
    for buffer in other.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1.5)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(data()), expected)


@every_config
def test_survives_set_isa(config: Config) -> None:
    m = quantized(config)
    expected = m(data())
    before = kk.cpu_isa()
    try:
        for name in kk.available_isas():
            kk.set_isa(name)
            torch.testing.assert_close(m(data()), expected, rtol=1e-4, atol=1e-4)
    finally:
        kk.set_isa(before)


@every_config
def test_modes_and_dtypes(config: Config) -> None:
    m: Any = quantized(config)[0]
    expected = m(data())
    with torch.inference_mode():
        assert torch.equal(m(data()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert m(data()).dtype == torch.bfloat16
    half = copy.deepcopy(m).bfloat16()
    values = half.codebook if isinstance(config, kdq.Codebook) else half.weight_scale
    assert values.dtype == torch.float32, "scales and centroids are not rounded with the model"
    assert half(data().bfloat16()).dtype == torch.bfloat16
    assert m(data(0)).shape == (0, 48)
    assert torch.equal(m(data(12).reshape(3, 4, 37)), m(data(12)).reshape(3, 4, 48))
    with pytest.raises(ValueError, match="37 features"):
        m(torch.zeros(2, 36))


@every_config
def test_gradient_passes_to_the_input(config: Config) -> None:
    m: Any = quantized(config)[0]
    x = data().requires_grad_()
    grad = torch.randn(40, 48)
    y = m(x)
    assert torch.equal(y.detach(), m(data()))
    y.backward(grad)
    passed = grad if m.activation is None else grad * (y > 0)
    torch.testing.assert_close(x.grad, passed @ m.dequantized_weight())


@every_config
def test_compiles_and_exports(config: Config) -> None:
    m = quantized(config)
    torch.compiler.reset()  # each config is another model, of which only some few may be compiled
    with torch.no_grad():
        compiled = torch.compile(m, fullgraph=True)
        torch.testing.assert_close(compiled(data()), m(data()), rtol=1e-5, atol=1e-5)
        exported = torch.export.export(m, (data(),))
    assert sum(str(node.target).startswith("kdq.") for node in exported.graph.nodes) >= 2
    torch.testing.assert_close(exported.module()(data()), m(data()), rtol=1e-5, atol=1e-5)


@every_config
def test_to_float_and_back(config: Config) -> None:
    layer: Any = quantized(config)[0]
    layer.activation = None
    linear = layer.to_float()
    assert torch.equal(linear.weight, layer.dequantized_weight())
    grid = {}
    if getattr(layer, "input_scale", None) is not None:
        grid = {"input_grid": AffineGrid(layer.input_scale, layer.input_zero_point)}
    again = type(layer).from_float(linear, config, **grid)
    error = (again.dequantized_weight() - linear.weight).norm() / linear.weight.norm()
    assert error < 1e-3


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [1, 7, 8, 33])
def test_bit_stream_round_trips_and_is_dense(bits: int, k: int) -> None:
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, k))
    if bits == 1:
        values = torch.where(values < 0, -1, 1)
    stream = pack_bits(values.to(torch.int8), bits)
    assert stream.shape == (5, -(-k * bits // 8))
    assert torch.equal(unpack_bits(stream, bits, k), values.to(torch.int8))
