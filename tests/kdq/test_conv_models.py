"""Models with convolutions: everything that takes linear layers takes these too, or says why not."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import kdq
from conv_cases import CONFIGS, FOUR, METHODS, X, conv, net, prepared
from kdq.configs import Config
from small_models import randn

every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


# ---- quantize_, prepare_qat_, convert_ -------------------------------------------------------------------------------


def test_what_has_no_kernels_is_left_with_a_reason() -> None:
    class Custom(nn.Conv2d):
        pass

    left = {
        "depthwise": (nn.Conv2d(4, 8, 3, groups=4), r"it has 4 groups \(depthwise\)"),
        "grouped": (nn.Conv2d(4, 8, 3, groups=2), "it has 2 groups;"),
        "reflect": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
        "uneven": (nn.Conv2d(4, 8, 2, padding="same"), 'padding "same" is not the same on both sides'),
        "long": (nn.Conv2d(4096, 1, 4), "65536 weights each"),
        "custom": (Custom(4, 8, 3), "Custom is a subclass of nn.Conv2d"),
        "wide": (nn.Conv2d(4, 8, 3).double(), "float64"),
        "normed": (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), "parametrized"),
        "other": (nn.Conv1d(4, 8, 3), "Conv1d has no quantized form"),
        "transposed": (nn.ConvTranspose2d(4, 8, 3), "ConvTranspose2d has no quantized form"),
    }
    model = nn.ModuleDict({name: layer for name, (layer, _) in left.items()})
    model["taken"] = nn.Conv2d(4, 8, (3, 2), padding="valid")
    for change in (kdq.quantize_, kdq.prepare_qat_):
        report = change(copy.deepcopy(model), kdq.Int8Dynamic())
        assert report.changed == {"taken": kdq.Int8Dynamic()}
        assert report.left.keys() == left.keys()
        for name, (_, reason) in left.items():
            assert re.search(reason, report.left[name]), name


@pytest.mark.parametrize("config", [kdq.Int8WeightOnly(), kdq.Codebook()], ids=str)
def test_configs_without_convolution_kernels(config: Config) -> None:
    reason = f"{type(config).__name__} has no convolution kernels; use Int8Dynamic, Int8Static, LowBit or Binary"
    for change in (kdq.quantize_, kdq.prepare_qat_, kdq.convert_):
        for chosen in [{"0": config, "*": config}] if change is kdq.convert_ else [config, {"0": config, "*": config}]:
            model = net()
            report = change(model, chosen)
            assert report.changed == {"9": config}
            assert report.left["0"] == report.left["5"] == reason
            assert type(model[0]) is nn.Conv2d
    model = net()
    kdq.prepare_qat_(model, FOUR)
    report = kdq.lower_precision_(model, config)
    assert report.left["0"] == reason
    assert report.changed == {"9": config}


def test_one_config_covers_linear_layers_and_convolutions() -> None:
    model = net()
    report = kdq.quantize_(model, kdq.Int8Dynamic())
    assert report.changed == dict.fromkeys(("0", "5", "9"), kdq.Int8Dynamic())
    assert report.fused == {}  # a norm stands between
    assert "already quantized (Int8Conv2d)" in kdq.quantize_(model, kdq.Int8Dynamic()).left["0"]
    model = net()
    report = kdq.prepare_qat_(model, {"0": FOUR, "5": kdq.Binary()})
    assert report.changed == {"0": FOUR, "5": kdq.Binary()}
    model(X)
    assert kdq.lower_precision_(model, {"0": kdq.Int8Dynamic()}).changed == {"0": kdq.Int8Dynamic()}
    assert kdq.convert_(model.eval(), {"9": kdq.Codebook()}).changed == {
        "0": kdq.Int8Dynamic(),
        "5": kdq.Binary(),
        "9": kdq.Codebook(),
    }
    assert [type(model[at]).__name__ for at in (0, 5, 9)] == ["Int8Conv2d", "BinaryConv2d", "CodebookLinear"]


def test_calibration_is_asked_for_and_methods_need_training() -> None:
    with pytest.raises(ValueError, match="calibration: '0' gets Int8Static"):
        kdq.quantize_(nn.Sequential(conv()), kdq.Int8Static())
    with pytest.raises(ValueError, match="plan: '0' gets Int8Static"):
        kdq.convert_(nn.Sequential(conv()), {"0": kdq.Int8Static()})
    with pytest.raises(ValueError, match="which has to be trained"):
        kdq.quantize_(nn.Sequential(conv()), METHODS[0], calibration=[X])
    broken = conv()
    with torch.no_grad():
        broken.weight[0] = torch.nan
    with pytest.raises(ValueError, match="0: its weight contains NaN or inf; nothing was changed"):
        kdq.quantize_(nn.Sequential(broken), kdq.Int8Dynamic())
    with pytest.raises(ValueError, match="the model itself is a Conv2d"):
        kdq.quantize_(conv(), kdq.Int8Dynamic())


def test_hooks_and_shared_convolutions() -> None:
    hooked = conv()
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in kdq.quantize_(nn.Sequential(hooked), kdq.Int8Dynamic()).left["0"]
    model = nn.ModuleDict({"a": conv()})
    model["b"] = model["a"]
    assert set(kdq.quantize_(model, kdq.Int8Dynamic()).changed) == {"a", "b"}
    assert model["a"] is model["b"]


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.GELU(), nn.SiLU()], ids=lambda m: type(m).__name__)
def test_activations_move_in(activation: nn.Module) -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(7), activation, nn.Flatten()).train()
    model(X)
    kdq.fold_batch_norm_(model.eval())
    plain = copy.deepcopy(model)
    kdq.quantize_(plain, kdq.Int8Dynamic(), fuse_activations=False)
    report = kdq.quantize_(model, kdq.Int8Dynamic())
    assert report.fused == {"0": type(activation).__name__.lower()}
    assert type(model[2]) is nn.Identity
    torch.testing.assert_close(model(X), plain(X), rtol=1e-5, atol=1e-5)
    x = X.clone().requires_grad_()
    torch.testing.assert_close(model(x), plain(X), rtol=1e-5, atol=1e-5)
    restored = model[0].to_float()
    assert [type(m) for m in restored] == [nn.Conv2d, type(activation)]
    binary = nn.Sequential(conv(), nn.ReLU())
    assert kdq.quantize_(binary, kdq.Binary()).fused == {}


def test_signs_behind_a_relu_warn() -> None:
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), conv())
    with pytest.warns(UserWarning, match="'2' is a Binary layer and stands behind a ReLU"):
        kdq.quantize_(copy.deepcopy(model), kdq.Binary())
    kdq.prepare_qat_(model, kdq.Binary())
    with pytest.warns(UserWarning, match="'2' is a Binary layer and got a first batch without a negative value"):
        model(X)


# ---- files -----------------------------------------------------------------------------------------------------------


@every_config
def test_round_trip_through_a_file(config: Config, tmp_path: Path) -> None:
    model = net().eval()
    kdq.fold_batch_norm_(model)
    kdq.quantize_(model, config, calibration=[X])
    kdq.save(model, tmp_path / "m")
    rebuilt = kdq.load(tmp_path / "m")
    assert torch.equal(rebuilt(X), model(X))
    assert str(rebuilt) == str(model)
    into = net(seed=1).eval()
    kdq.fold_batch_norm_(into)
    assert torch.equal(kdq.load(tmp_path / "m", into)(X), model(X)), "its padding is called 'same'"


def test_files_refuse_other_convolutions(tmp_path: Path) -> None:
    model = nn.Sequential(conv())
    kdq.quantize_(model, FOUR, calibration=[X])
    kdq.save(model, tmp_path / "m")
    kdq.load(tmp_path / "m", model)
    for other in (conv(stride=1), conv(padding_mode="reflect"), nn.Linear(5, 7)):
        before = nn.Sequential(other)
        with pytest.raises(ValueError, match="'0' is a convolution 5, 7, .* the model has"):
            kdq.load(tmp_path / "m", before)
        assert before[0] is other


def test_files_hold_no_more_than_their_bits(tmp_path: Path) -> None:
    """Three channels would leave most of each position's word empty."""
    for config, bits in ((kdq.Binary(), 1), (kdq.LowBit(weight_bits=2, act_bits=4), 2), (kdq.Int8Dynamic(), 8)):
        model = nn.Sequential(nn.Conv2d(3, 512, 8, bias=False))
        kdq.quantize_(model, config, calibration=[randn(1, 3, 9, 9)])
        kdq.save(model, tmp_path / "m")
        assert 0 < (tmp_path / "m").stat().st_size - 512 * 3 * 64 * bits / 8 < 4096


def test_float_convolutions_and_pools_are_described_in_full(tmp_path: Path) -> None:
    layers = [
        conv(padding_mode="circular", dilation=1),
        nn.MaxPool2d(2, 1, dilation=2, ceil_mode=True),
        nn.AvgPool2d(2),
    ]
    model = nn.Sequential(*layers).eval()
    kdq.save(model, tmp_path / "m")
    assert torch.equal(kdq.load(tmp_path / "m")(X), model(X))


# ---- the other tools -------------------------------------------------------------------------------------------------


def test_report_and_bias_correction() -> None:
    reference = net().eval()
    kdq.fold_batch_norm_(reference)
    model = copy.deepcopy(reference)
    low = kdq.LowBit(weight_bits=2, act_bits=8)
    report = kdq.quantize_(model, {"0": low, "5": low}, calibration=[X])
    assert report.fused == {"0": "relu"}
    kinds = {layer.name: layer.kind for layer in kdq.report(model, reference, [X]).layers}
    assert kinds == {"0": "LowBitConv2d + relu", "5": "LowBitConv2d"}
    corrected = kdq.correct_bias_(model, reference, [X])
    assert set(corrected.changed) == {"0", "5"}
    model[0].activation = None
    torch.testing.assert_close(model[0](X).mean((0, 2, 3)), reference[0](X).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [kdq.Int8Static(), FOUR, kdq.Binary()], ids=str)
def test_transfer_between_twins(config: Config) -> None:
    teacher, student, plain = nn.Sequential(prepared(config)), nn.Sequential(prepared(config, conv(seed=1))), conv()
    assert kdq.transfer_(teacher, student, {"0": "0"}).changed == {"0": "from '0' with its scales"}
    assert torch.equal(student(X), teacher(X))
    student = nn.Sequential(prepared(kdq.LowBit(weight_bits=3, act_bits=3), conv(seed=1)))
    assert kdq.transfer_(teacher, student, 1).changed == {"0": "from '0', scales fitted anew"}
    assert torch.equal(student[0].weight, plain.weight)
    target = nn.Sequential(conv(seed=1))
    kdq.transfer_(teacher, target, {"0": "0"})
    assert torch.equal(target[0].weight, plain.weight)


def test_clipped_latent_weights() -> None:
    twin = prepared(kdq.Binary())
    with torch.no_grad():
        twin.weight.mul_(100)
    kdq.clip_weights_(twin)
    assert float(twin.weight.detach().abs().max()) == 1


def test_tools_for_linear_layers_leave_convolutions_with_a_reason() -> None:
    four, two = FOUR, kdq.LowBit(weight_bits=2, act_bits=4)
    report = kdq.prepare_switchable_(net(), [four, two])
    assert "a convolution" in report.left["0"]
    assert "9" in report.changed
    assert "a convolution" in kdq.prune_(net(), 0.5).left["5"]
    with pytest.raises(ValueError, match="no layer to prune: 0: a convolution"):
        kdq.prune_(nn.Sequential(conv()), 0.5)
    assert "a convolution" in kdq.reconstruct_(net().eval(), four, [X], steps=2).left["0"]
    assert "a convolution" in kdq.equalize_(net().eval()).left["0"]
    assert "a convolution" in kdq.smooth_(net().eval(), [X]).left["5"]
    signs = nn.Sequential(conv(), nn.Flatten())
    kdq.quantize_(signs, kdq.Binary())
    assert "a convolution" in kdq.fold_binary_chain_(signs).left["0"]
    model = net().eval()
    plan = kdq.search_precision(
        model, None, [X], budget=kdq.Budget(average_bits=4), candidates=[four, two], sensitivity="weight_sqnr"
    )
    assert list(plan) == ["9"]
    report = kdq.quantize_(model, plan, calibration=[X])
    assert set(report.changed) == {"9"}
    assert "no pattern" in report.left["0"]
