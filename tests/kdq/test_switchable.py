"""Switchable models: at every precision and plan they compute what its own student would, in training and on the
kernels; switching is all or nothing; copies and checkpoints hold everything."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.layers.switchable import SwitchableLinear, SwitchableNorm
from small_models import FOUR, INT8, MIXED, ONE, PRECISIONS, TWO, normed_mlp, randn

PLANS = pytest.mark.parametrize("plan", [*PRECISIONS, MIXED], ids=[*map(str, PRECISIONS), "mixed"])


def switchable(steps: int = 6) -> nn.Sequential:
    """A switchable model after some steps, so that no two precisions have equal scales, grids or norms."""
    model = normed_mlp()
    kdq.prepare_switchable_(model, PRECISIONS)
    loader = [randn(32, 12, seed=s) + 0.3 for s in range(steps)]
    kdq.SwitchableDistiller(normed_mlp(seed=1), model, [kdq.SoftTargets()], sandwich=2).fit(
        loader, 1, lr=0.02, progress=False
    )
    return model


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- preparation -----------------------------------------------------------------------------------------------------


def test_report_and_order() -> None:
    model = normed_mlp()
    report = kdq.prepare_switchable_(model, [TWO, ONE, INT8, kdq.Int8WeightOnly(), FOUR])
    assert set(report.changed) == {"0", "1", "3", "4.0", "4.1", "5"}
    assert not report.left
    assert "active=Int8WeightOnly" in str(model)
    assert kdq.precisions(model) == (kdq.Int8WeightOnly(), INT8, FOUR, TWO, ONE)
    assert kdq.precision_of(model) == dict.fromkeys(["1", "4.1", "5"], kdq.Int8WeightOnly())
    again = kdq.prepare_switchable_(model, PRECISIONS)
    assert not again.changed
    assert "already" in again.left["1"]
    assert "already" in again.left["3"]
    assert "SwitchableLinear" in kdq.quantize_(model, INT8).left["1"]


@pytest.mark.parametrize(
    ("precisions", "error", "message"),
    [
        (INT8, TypeError, "precisions"),
        ("Int8Dynamic", TypeError, "precisions"),
        ([INT8, "Binary"], TypeError, "config"),
        ([INT8], ValueError, "two different"),
        ([ONE, kdq.LowBit(weight_bits=1, act_bits=1)], ValueError, "two different"),
    ],
)
def test_wrong_precisions_change_nothing(precisions: Any, error: type[Exception], message: str) -> None:
    model = normed_mlp()
    with pytest.raises(error, match=message):
        kdq.prepare_switchable_(model, precisions)
    assert not any(isinstance(module, SwitchableLinear | SwitchableNorm) for module in model.modules())


def test_filter_and_weights_that_are_not_finite() -> None:
    model = normed_mlp()
    report = kdq.prepare_switchable_(model, PRECISIONS, lambda module, name: name != "5")
    assert report.left == {"5": "filter_fn is false"}
    assert type(model[5]) is nn.Linear
    with pytest.raises(ValueError, match="no linear layer"):
        kdq.prepare_switchable_(normed_mlp(), PRECISIONS, lambda module, _: not isinstance(module, nn.Linear))
    broken: Any = normed_mlp()
    broken[5].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="5: its weight"):
        kdq.prepare_switchable_(broken, PRECISIONS)
    assert type(broken[1]) is nn.Linear


def test_each_parameter_is_there_once() -> None:
    model = normed_mlp()
    weight = model[1].weight
    kdq.prepare_switchable_(model, PRECISIONS)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len({id(p) for p in model.parameters()}) == len(names)
    assert [name for name in names if name.startswith("1.")] == [
        "1.weight",
        "1.bias",
        *(f"1.variants.LowBit_4_8.{part}" for part in ("weight_scale", "input_grid.scale", "input_grid.zero_point")),
        *(f"1.variants.LowBit_2_4.{part}" for part in ("weight_scale", "input_grid.scale", "input_grid.zero_point")),
    ]
    assert model[1].weight is weight


# ---- parity ----------------------------------------------------------------------------------------------------------


@PLANS
def test_computes_as_a_dedicated_student(plan: Any) -> None:
    """The same parameters in a model that prepare_qat_ made: equal outputs, and equal gradients of the weights."""
    model = switchable()
    kdq.set_precision_(model, plan)
    own = normed_mlp()
    kdq.prepare_qat_(own, plan)
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, SwitchableNorm):
            state |= {f"{name}.{key}": t for key, t in module.variant().state_dict().items()}
        if isinstance(module, SwitchableLinear):
            state |= {f"{name}.{key}": t for key, t in module.variant().state_dict().items()}
            state |= {f"{name}.{key}": t for key, t in module.named_parameters(recurse=False)}
    own.load_state_dict(state)
    x = randn(9, 12, seed=5)
    for training in (False, True):
        ours, theirs = model.train(training)(x), own.train(training)(x)
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(y.square().sum(), m[1].weight)[0] for y, m in ((ours, model), (theirs, own))]
        assert torch.equal(*gradients)
    model.eval(), own.eval()
    real = kdq.extract(model, plan)
    kdq.convert_(own)
    assert same_state(real.state_dict(), own.state_dict()), "the same integers, scales and norms"
    assert torch.equal(real(x), own(x))


@PLANS
def test_extracted_kernels_agree(plan: Any) -> None:
    model = switchable().eval()
    before, active = trained_state(model), kdq.precision_of(model)
    real = kdq.extract(model, plan)
    assert same_state(trained_state(model), before)
    assert kdq.precision_of(model) == active
    assert not any(isinstance(module, SwitchableLinear | SwitchableNorm) for module in real.modules())
    assert type(real[0]) is nn.BatchNorm1d
    kdq.set_precision_(model, plan)
    x = randn(50, 12, seed=3)
    with torch.no_grad():
        for name in ("1", "4.1", "5"):  # layer by layer: a tie that rounds the other way would hide in later layers
            width = real.get_submodule(name).in_features
            inputs = randn(50, width, seed=4)
            expected = model.get_submodule(name)(inputs)
            torch.testing.assert_close(real.get_submodule(name)(inputs), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(real(x), model(x), rtol=1e-4, atol=1e-4)
    kdq.convert_(model)
    assert same_state(model.state_dict(), real.state_dict())


def test_precisions_differ() -> None:
    """What the other tests compare is not all the same."""
    model = switchable().eval()
    outputs = []
    for precision in PRECISIONS:
        kdq.set_precision_(model, precision)
        outputs.append(model(randn(9, 12)))
    means = [norm.running_mean for norm in model[3].variants.values()]
    for values in (outputs, means):
        assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(values) for b in values[:i])


def test_batch_norms_of_a_mixed_plan_are_re_estimated_as_documented() -> None:
    real: Any = kdq.extract(switchable(), MIXED)
    loader = [randn(64, 12, seed=s) * 3 - 1 for s in range(3)]
    torch.optim.swa_utils.update_bn(loader, real)
    inputs = [real[:3](x) for x in loader]
    torch.testing.assert_close(real[3].running_mean, torch.cat(inputs).mean(0), rtol=1e-4, atol=1e-4)


def test_extract_before_any_batch_is_an_error() -> None:
    model = normed_mlp()
    kdq.prepare_switchable_(model, PRECISIONS)
    with pytest.raises(RuntimeError, match="1: the activation scale is not initialized"):
        kdq.extract(model, TWO)


# ---- switching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (kdq.Int8Static(), ValueError, "has Int8Dynamic.*, but not Int8Static"),
        ({"1": ONE, "5": kdq.Int8Static()}, ValueError, "'5' has"),
        ({"1": ONE, "6": INT8}, ValueError, "'6' is neither .* there are, for example, '1', '4.1', '5'"),
        ({"1": ONE, "0": INT8}, ValueError, "'0'"),
        ({"*": "Binary"}, TypeError, "config"),
        ("Binary", TypeError, "config"),
    ],
)
def test_a_wrong_plan_changes_nothing(plan: Any, error: type[Exception], message: str) -> None:
    model = switchable(1)
    before = trained_state(model)
    with pytest.raises(error, match=message):
        kdq.set_precision_(model, plan)
    assert same_state(trained_state(model), before)
    with pytest.raises(ValueError, match="prepare_switchable_"):
        kdq.set_precision_(normed_mlp(), INT8)


def test_plans_of_names_and_patterns() -> None:
    model = switchable(1)
    kdq.set_precision_(model, {"4*": FOUR, "*": TWO, "5": ONE})
    assert kdq.precision_of(model) == {"1": TWO, "4.1": FOUR, "5": ONE}
    kdq.set_precision_(model, {"1": INT8})
    assert kdq.precision_of(model) == {"1": INT8, "4.1": FOUR, "5": ONE}
    kdq.set_precision_(model, kdq.LowBit(weight_bits=1, act_bits=1))
    assert set(kdq.precision_of(model).values()) == {ONE}


def test_norms_follow_the_layer_beside_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LayerNorm(8)
            self.linear = nn.Linear(8, 8)
            self.second = nn.LayerNorm(8)

    model = nn.Sequential(Block(), Block(), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8)))
    kdq.prepare_switchable_(model, PRECISIONS)
    kdq.set_precision_(model, {"0.linear": ONE, "1.linear": TWO, "3.0": FOUR})
    norms = {name: module.config for name, module in model.named_modules() if isinstance(module, SwitchableNorm)}
    assert norms == {"0.first": ONE, "0.second": ONE, "1.first": TWO, "1.second": TWO, "2": FOUR}


# ---- copies, checkpoints, modes --------------------------------------------------------------------------------------


def loaded(state: dict[str, Any], assign: bool) -> nn.Module:
    model = normed_mlp(seed=1)
    kdq.prepare_switchable_(model, PRECISIONS[::-1])
    model(randn(8, 12))
    model.load_state_dict(state, assign=assign)
    return model.eval()


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: loaded(trained_state(model), assign=False),
        lambda model: loaded(trained_state(model), assign=True),
    ],
    ids=["deepcopy", "pickle", "load_state_dict", "assign"],
)
def test_copies_hold_every_precision(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = switchable().eval(), randn(9, 12)
    kdq.set_precision_(model, MIXED)
    other = copied(model)
    assert kdq.precision_of(other) == MIXED
    for plan in (MIXED, *PRECISIONS):
        kdq.set_precision_(model, plan)
        kdq.set_precision_(other, plan)
        assert torch.equal(other(x), model(x))
    layer: Any = other.get_submodule("1")
    with torch.no_grad():
        layer.weight.mul_(-1)
    for precision in PRECISIONS:
        kdq.set_precision_(other, precision)
        kdq.set_precision_(model, precision)
        assert not torch.equal(other(x), model(x)), "one weight for all precisions, and its own"


def test_a_checkpoint_of_other_precisions_is_refused() -> None:
    state = trained_state(switchable(1))
    other = normed_mlp()
    kdq.prepare_switchable_(other, [INT8, FOUR, kdq.LowBit(weight_bits=3, act_bits=4), ONE])
    with pytest.raises(RuntimeError, match="LowBit_2_4"):
        other.load_state_dict(state)


def test_modes_and_dtypes() -> None:
    model, x = switchable().eval(), randn(9, 12)
    for precision in PRECISIONS:
        kdq.set_precision_(model, precision)
        expected = model(x)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model[1](x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="training twin"):
        kdq.save(model, "never written")
    half = normed_mlp().bfloat16()
    kdq.prepare_switchable_(half, PRECISIONS)
    for precision in PRECISIONS:
        kdq.set_precision_(half, precision)
        assert half(x.bfloat16()).dtype == torch.bfloat16


def test_a_model_turned_to_bfloat16_keeps_the_scales_of_every_precision() -> None:
    model, x = switchable(), randn(9, 12).bfloat16()
    before = trained_state(model)
    state = model.bfloat16().state_dict()
    grids = {name for name in state if name.endswith(("scale", "zero_point"))}
    assert len(grids) == 18
    assert all(state[name].dtype == torch.float32 and torch.equal(state[name], before[name]) for name in grids)
    assert model[1].weight.dtype == torch.bfloat16
    for precision in PRECISIONS:
        kdq.set_precision_(model, precision)
        assert model(x).dtype == torch.bfloat16


def test_compiles_at_every_precision() -> None:
    model, x = switchable().eval(), randn(9, 12)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for plan in (INT8, MIXED):
        kdq.set_precision_(model, plan)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("only", ["", "norm"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_run_the_active_norms(only: str, norm_first: bool) -> None:
    """Not the fused path, which would read parameters beside the switch, with and without padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 3)}).eval()
    kdq.prepare_switchable_(model, PRECISIONS, lambda _, name: only in name or name == "head")
    norms = [module for module in model.modules() if isinstance(module, SwitchableNorm)]
    assert len(norms) == 4
    x, padded = randn(2, 5, 8), torch.arange(5).expand(2, 5) >= torch.tensor([[3], [5]])
    seen: list[nn.Module] = []
    handles = [norm.register_forward_hook(lambda module, *_: seen.append(module)) for norm in norms]
    with torch.no_grad():
        for mask in (None, padded):
            seen.clear()
            assert torch.isfinite(encoder(x, src_key_padding_mask=mask)).all()
            assert set(seen) == set(norms)
        for handle in handles:
            handle.remove()
        real: Any = kdq.extract(model, INT8)
        torch.testing.assert_close(real["encoder"](x), encoder(x), rtol=1e-4, atol=1e-4)
