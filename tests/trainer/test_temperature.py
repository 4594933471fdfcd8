from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from moon.errors import CalibrationError, UsageError
from moon.evaluation.reliability import ece
from moon.trainer.models import build
from moon.trainer.temperature import fit_temperature, fold_temperature_


def sampled(
    temperature: float, seed: int = 0, rows: int = 400, outputs: int = 5
) -> tuple[Tensor, Tensor]:
    """Logits that are ``temperature`` times those the labels were drawn by."""
    draw = torch.Generator().manual_seed(seed)
    values = 2 * torch.randn(rows, outputs, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(values.softmax(1), 1, generator=draw)[:, 0]
    return temperature * values, labels


def test_two_classes_by_hand() -> None:
    # Three of four are right at a margin of 6: sigmoid(6 / T) = 3 / 4, so T = 6 / ln 3.
    logits = torch.tensor([[6.0, 0.0], [0.0, 6.0], [10.0, 4.0], [6.0, 0.0]])
    fitted = fit_temperature(logits, torch.tensor([0, 1, 0, 1]))
    assert fitted.temperature == pytest.approx(6 / math.log(3), rel=1e-12)
    assert fitted.nll_after == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4, rel=1e-12)
    wide, narrow = math.log1p(math.exp(6)), math.log1p(math.exp(-6))
    assert fitted.nll_before == pytest.approx((3 * narrow + wide) / 4, rel=1e-12)
    assert fitted.ece_before == pytest.approx(1 / (1 + math.exp(-6)) - 0.75, rel=1e-12)
    assert fitted.ece_after == pytest.approx(0, abs=1e-12)
    assert fitted.samples == 4


@pytest.mark.parametrize("temperature", [1e-6, 0.04, 1.0, 3.0, 1e6])
def test_it_finds_the_temperature_of_the_draws(temperature: float) -> None:
    logits, labels = sampled(temperature, rows=20_000)
    fitted = fit_temperature(logits, labels)
    assert fitted.temperature == pytest.approx(temperature, rel=0.03)
    assert fitted.ece_after < 0.02
    if temperature != 1.0:
        assert fitted.ece_before > 0.1


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.integers(2, 6))
def test_no_other_temperature_is_better(seed: int, factor: float, outputs: int) -> None:
    logits, labels = sampled(factor, seed=seed, rows=30, outputs=outputs)
    try:
        fitted = fit_temperature(logits, labels)
    except CalibrationError:
        assume(False)

    def nll(log_t: float) -> float:
        return F.cross_entropy(logits / math.exp(log_t), labels).item()

    best = minimize_scalar(nll, bracket=(math.log(factor), math.log(factor) + 1), tol=1e-10)
    assert fitted.nll_after <= best.fun + 1e-9
    assert fitted.nll_after <= fitted.nll_before + 1e-12
    assert fitted.nll_after == pytest.approx(nll(math.log(fitted.temperature)), rel=1e-9)
    scale = torch.tensor(1 / fitted.temperature, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(scale * logits, labels), scale)
    assert abs(slope.item()) * scale.item() < 1e-9


def test_shifts_do_not_matter_and_scales_multiply() -> None:
    logits, labels = sampled(2.0)
    fitted = fit_temperature(logits, labels).temperature
    shift = torch.linspace(-1e6, 1e6, 400, dtype=torch.float64)[:, None]
    assert fit_temperature(logits + shift, labels).temperature == pytest.approx(fitted, rel=1e-8)
    assert fit_temperature(7 * logits, labels).temperature == pytest.approx(7 * fitted, rel=1e-9)
    single = fit_temperature(logits.float(), labels.int()).temperature
    assert single == pytest.approx(fitted, rel=1e-5)


@pytest.mark.parametrize("unknown", [0, 2, 5, -1])
def test_the_unknown_is_left_out_or_not(unknown: int) -> None:
    logits, labels = sampled(2.0)
    at = unknown % 6
    others = torch.full((400, 1), 3.0, dtype=torch.float64)
    wide = torch.cat([logits[:, :at], others, logits[:, at:]], dim=1)
    shifted = labels + (labels >= at).long()
    known = fit_temperature(wide, shifted, unknown_index=unknown)
    assert known == fit_temperature(logits, labels)
    over = fit_temperature(wide, shifted, unknown_index=unknown, over_unknown=True)
    assert over == fit_temperature(wide, shifted)
    assert over.temperature != pytest.approx(known.temperature, rel=1e-2)


def test_ece_is_that_of_the_reports() -> None:
    logits, labels = sampled(3.0)
    fitted = fit_temperature(logits, labels)
    for scaled, expected in ((logits, fitted.ece_before),
                             (logits / fitted.temperature, fitted.ece_after)):  # fmt: skip
        confidence, answer = scaled.softmax(1).max(1)
        assert expected == pytest.approx(ece(confidence.numpy(), (answer == labels).numpy()))


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e30, 0.0], [0.0, 1e30], [1e30, 0.0], [0.0, 1e30]])
    fitted = fit_temperature(logits, torch.tensor([0, 1, 0, 0]))
    assert fitted.temperature == pytest.approx(1e30 / math.log(3), rel=1e-6)
    assert fitted.nll_after == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    assert math.isfinite(fitted.nll_before)
    tiny = fit_temperature(logits.double() * 1e-80, torch.tensor([0, 1, 0, 0]))
    assert tiny.temperature == pytest.approx(1e-50 / math.log(3), rel=1e-6)


def test_a_dozen_steps_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = sampled(40.0)
    exact = fit_temperature(logits, labels).temperature
    monkeypatch.setattr("moon.scores.temperature.STEPS", 12)
    assert fit_temperature(logits, labels).temperature == pytest.approx(exact, rel=1e-12)


def test_no_best_temperature() -> None:
    logits, labels = sampled(1.0)
    with pytest.raises(CalibrationError, match="all 400 held-out images are answered rightly"):
        fit_temperature(logits, logits.argmax(1))
    with pytest.raises(CalibrationError, match="do not favour the right classes"):
        fit_temperature(-logits, labels)
    with pytest.raises(CalibrationError, match="answered rightly"):
        fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), {}, r"not \[3\] and \[3\]"),
        (torch.zeros(3, 2), torch.zeros(2).long(), {}, r"not \[3, 2\] and \[2\]"),
        (torch.zeros(0, 2), torch.zeros(0).long(), {}, r"not \[0, 2\]"),
        (torch.zeros(3, 2), torch.zeros(3), {}, r"not torch\.float32"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), {}, "label 2 is not one of"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), {}, "label -1 is not one of"),
        (torch.zeros(3, 3), torch.tensor([0, 2, 1]), {"unknown_index": -1}, "label 2 is not"),
        (torch.zeros(3, 3), torch.tensor([0, 1, 1]), {"unknown_index": 3}, "outside the 3"),
        (torch.tensor([[0.0, float("nan")]]), torch.tensor([0]), {}, "NaN or infinite"),
    ],
)
def test_bad_input(logits: Tensor, labels: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_temperature(logits, labels, **options)


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_folding_divides_the_logits_and_keeps_the_zeros(name: str) -> None:
    model = build(name, outputs=6, size=(16, 16), seed=1).eval()
    head = model.head if name == "cnn" else model.fc
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight[torch.rand_like(head.weight) < 0.9] = 0.0
        head.bias += torch.arange(6)
    before = copy.deepcopy(model)
    x = torch.randn(3, 3, 16, 16)
    fold_temperature_(model, 2.5)
    assert torch.allclose(model(x), before(x) / 2.5, rtol=1e-5, atol=1e-6)
    for (key, new), old in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(new != 0, old != 0)
        assert torch.equal(new, old) == (not key.startswith(("head.", "fc.")))


def test_folding_without_a_bias_and_in_a_wrapper() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    before = model[1].weight.detach().clone()
    fold_temperature_(nn.DataParallel(model), 4.0)
    assert torch.equal(model[1].weight, before / 4)


def test_models_that_do_not_end_in_a_linear_layer() -> None:
    ends = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 2, 1))
    with pytest.raises(UsageError, match="last one is a Conv1d, 2"):
        fold_temperature_(ends, 2.0)
    with pytest.raises(UsageError, match="neither Conv nor Linear"):
        fold_temperature_(nn.ReLU(), 2.0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="parametrization"):
        fold_temperature_(normed, 2.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan"), 1e60, 1e-60])
def test_temperatures_out_of_range(temperature: float) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="temperature"):
        fold_temperature_(model, temperature)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
