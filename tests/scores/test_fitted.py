"""What holds for every score of the table."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from moon.errors import UsageError
from moon.scores import (
    SCORE_TABLE,
    SCORES,
    FittedScore,
    Training,
    ebo,
    fit_score,
    gen,
    mls,
    msp,
    restore_score,
    unknown,
)
from moon.scores import fitted as fitted_module
from tests.scores.samples import D, K, draw, model, strange, training

NAMES = tuple(SCORE_TABLE)
OPTIONS: dict[str, dict[str, Any]] = {"knn": {"k": 5}, "nnguide": {"k": 5}}
PLAIN = ("msp", "ebo", "mls", "unknown", "gen")
# By definition these read the unknown logit.
OF_UNKNOWN = ("msp", "unknown", "temperature")


def fitted(name: str, unknown_index: int | None = K) -> FittedScore:
    return fit_score(name, training(unknown_index), **OPTIONS.get(name, {}))


def test_the_table_holds_every_score_and_each_says_what_it_needs() -> None:
    expected = "msp ebo mls unknown temperature gen klm knn vim fdbd rmds nci react scale nnguide"
    assert set(NAMES) == set(expected.split())
    for name, spec in SCORE_TABLE.items():
        assert spec.name == name and spec.paper and spec.kind.__doc__
        assert set(spec.reads) <= {"features", "logits"} and spec.reads
        assert set(spec.fits) <= {"features", "logits", "labels", "head"}
        assert bool(spec.constants) == (name not in PLAIN)
        assert (spec.fits == ()) == (name in PLAIN)
    assert SCORE_TABLE["knn"].options == ("k", "bank", "size", "seed", "dtype", "progress")
    assert set(SCORES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_score_says_it_fits_is_all_that_it_needs(name: str) -> None:
    spec, full = SCORE_TABLE[name], training(K)
    arrays = {"features": full.features, "logits": full.logits, "labels": full.labels}
    given: dict[str, Any] = {key: value for key, value in arrays.items() if key in spec.fits}
    if "head" in spec.fits:
        given |= {"weight": full.weight, "bias": full.bias}
    if not spec.fits:
        given = {"logits": full.logits}
    less = Training(unknown_index=K, **given)
    found = fit_score(name, less, **OPTIONS.get(name, {}))
    assert_same(found, fitted(name))
    for key in spec.fits:
        without = dict(given)
        for field in ("weight", "bias") if key == "head" else (key,):
            del without[field]
        with pytest.raises(UsageError, match=rf"{name}.*{'weight' if key == 'head' else key}"):
            fit_score(name, Training(unknown_index=K, **without), **OPTIONS.get(name, {}))


def assert_same(one: FittedScore, other: FittedScore) -> None:
    first, second = one.to_arrays(), other.to_arrays()
    assert list(first) == list(second)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


@pytest.mark.parametrize("name", NAMES)
def test_strange_features_score_lower(name: str) -> None:
    net = model(K)
    known, odd = draw(200, seed=5)[0], strange()
    score = fitted(name)
    inside = score.score(known, net.logits(known))
    outside = score.score(odd, net.logits(odd))
    assert inside.shape == (200,) and inside.dtype == np.float64
    assert (inside[:, None] > outside).mean() > 0.95


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OF_UNKNOWN])
@pytest.mark.parametrize("place", [0, 2, K])
def test_the_unknown_row_has_no_say_in_scores_of_classes(name: str, place: int) -> None:
    here, plain = model(place), model(None)
    x = np.concatenate([draw(20, seed=5)[0], strange(20)])
    ours = fitted(name, place).score(x, here.logits(x))
    np.testing.assert_allclose(ours, fitted(name, None).score(x, plain.logits(x)), rtol=1e-12)
    loud = here.logits(x)
    loud[:, place] += 1e4
    np.testing.assert_array_equal(fitted(name, place).score(x, loud), ours)


@pytest.mark.parametrize("name", OF_UNKNOWN)
def test_the_unknown_logit_lowers_the_scores_that_read_it(name: str) -> None:
    z = model(K).logits(draw(20)[0])
    loud = z.copy()
    loud[:, K] += 30
    score = fitted(name)
    assert (score.score(logits=loud) < score.score(logits=z)).all()


@pytest.mark.parametrize("name", ["msp", "ebo", "mls", "unknown", "gen"])
@pytest.mark.parametrize("place", [K, 0])
def test_scores_of_logits_alone_are_the_functions(name: str, place: int) -> None:
    function = {"msp": msp, "ebo": ebo, "mls": mls, "unknown": unknown, "gen": gen}[name]
    z = model(place).logits(draw(30)[0])
    np.testing.assert_array_equal(fitted(name, place).score(logits=z), function(z, place))
    # The last column by its other name.
    negative = fit_score(name, Training(logits=z, unknown_index=place - K - 1))
    assert_same(negative, fit_score(name, Training(logits=z, unknown_index=place)))


@pytest.mark.parametrize("name", NAMES)
def test_constants_survive_storing(name: str) -> None:
    score = fitted(name)
    file = io.BytesIO()
    np.savez(file, **score.to_arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        back = restore_score(name, dict(stored))
    assert type(back) is type(score) and back.name == name
    assert_same(back, score)
    assert score.nbytes == sum(array.nbytes for array in score.to_arrays().values()) > 0
    x = draw(10)[0]
    z = model(K).logits(x)
    np.testing.assert_array_equal(back.score(x, z), score.score(x, z))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.concatenate([draw(30)[0], strange(25)])
    z, score = model(K).logits(x), fitted(name)
    whole = score.score(x, z)
    monkeypatch.setattr(fitted_module, "ROWS", 7)
    np.testing.assert_allclose(score.score(x, z), whole, rtol=1e-12)
    alone = np.concatenate([score.score(x[i : i + 1], z[i : i + 1]) for i in range(55)])
    np.testing.assert_allclose(alone, whole, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_nan_and_spoils_no_other(name: str, bad: float) -> None:
    x = draw(6)[0]
    z, score = model(K).logits(x), fitted(name)
    clean = score.score(x, z)
    (x if "features" in score.reads else z)[2, 1] = bad
    found = score.score(x, z)
    assert np.isnan(found[2])
    np.testing.assert_allclose(np.delete(found, 2), np.delete(clean, 2), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-30, 1e4, 1e15])
def test_extreme_sizes_give_numbers(name: str, size: float) -> None:
    x = draw(8)[0] * size
    with np.errstate(all="raise", under="ignore"):
        found = fitted(name).score(x, model(K).logits(x))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", NAMES)
def test_float32_inputs_are_computed_in_float64(name: str) -> None:
    x = draw(8)[0].astype(np.float32)
    z, score = model(K).logits(x).astype(np.float32), fitted(name)
    ours = score.score(x, z)
    assert ours.dtype == np.float64
    np.testing.assert_array_equal(ours, score.score(x.astype(np.float64), z.astype(np.float64)))


@pytest.mark.parametrize("name", NAMES)
def test_fitting_in_blocks_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted(name).to_arrays()
    monkeypatch.setattr("moon.scores.training.rows.__defaults__", (37,))
    monkeypatch.setattr("moon.scores.training.blocks.__defaults__", (37,))
    x = draw(9)[0]
    z = model(K).logits(x)
    parts = fitted(name)
    for key, value in parts.to_arrays().items():
        assert value.shape == whole[key].shape
    np.testing.assert_allclose(parts.score(x, z), restore_score(name, whole).score(x, z), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_named(name: str) -> None:
    score, x = fitted(name), draw(5)[0]
    z = model(K).logits(x)
    for key in score.reads:
        width = D if key == "features" else K + 1
        good = {"features": x, "logits": z}
        with pytest.raises(UsageError, match=rf"score {name} reads .*{key}.* no {key} are given"):
            score.score(**{**good, key: None})
        with pytest.raises(UsageError, match=rf"{key} of shape \[N, {width}\], not \[5, 2\]"):
            score.score(**{**good, key: good[key][:, :2]})
        with pytest.raises(UsageError, match=rf"{key} of shape .* not \[{width}\]"):
            score.score(**{**good, key: good[key][0]})
    if len(score.reads) == 2:
        with pytest.raises(UsageError, match=r"same inputs, not of 5 and 4"):
            score.score(x, z[:4])
    assert score.score(x[:0], z[:0]).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_constants_are_refused(name: str) -> None:
    arrays = fitted(name).to_arrays()
    first = next(iter(arrays))
    with pytest.raises(UsageError, match=f"{name} has the constants {first}"):
        restore_score(name, {key: arrays[key] for key in arrays if key != first})
    with pytest.raises(UsageError, match=f"{name} has the constants"):
        restore_score(name, {**arrays, "extra": np.zeros(1)})
    for key, array in arrays.items():
        with pytest.raises(UsageError, match=f"{key} of the score {name} must be"):
            restore_score(name, {**arrays, key: array.astype("U5")})
        with pytest.raises(UsageError, match=f"{key} of the score {name} must have shape"):
            restore_score(name, {**arrays, key: array[None]})
        if array.dtype == np.float64:
            with pytest.raises(UsageError, match=f"{key} of the score {name} holds NaN"):
                restore_score(name, {**arrays, key: np.full_like(array, np.nan)})


def test_constants_that_do_not_fit_together_are_refused() -> None:
    arrays = fitted("vim").to_arrays()
    with pytest.raises(UsageError, match=r"residual of the score vim has shape .*and D is not 12"):
        restore_score("vim", {**arrays, "residual": arrays["residual"][:-1]})
    for known in ([0, 1, 2, 9], [0, 1, 2, -1], [0, 1, 2, 2]):
        with pytest.raises(UsageError, match=r"not columns"):
            restore_score("vim", {**arrays, "known": np.array(known)})
    with pytest.raises(UsageError, match=r"none of its logits"):
        restore_score("msp", {"outputs": np.array(3), "unknown": np.array(3)})
    gaps = fitted("fdbd").to_arrays()
    with pytest.raises(UsageError, match=r"positive"):
        restore_score("fdbd", {**gaps, "gaps": np.zeros((K, K))})
    scale = fitted("scale").to_arrays()
    with pytest.raises(UsageError, match=r"1 to 12 features, not 13"):
        restore_score("scale", {**scale, "top": np.array(13)})
    knn = fitted("knn").to_arrays()
    with pytest.raises(UsageError, match=r"at least 401 features"):
        restore_score("knn", {**knn, "k": np.array(401)})
    heat = fitted("temperature").to_arrays()
    with pytest.raises(UsageError, match=r"positive number, not 0"):
        restore_score("temperature", {**heat, "temperature": np.array(0.0)})


def test_constants_cannot_be_changed() -> None:
    score = fitted("knn")
    bank = score.to_arrays()["bank"]
    with pytest.raises(ValueError, match=r"read-only"):
        bank[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        score.k = 3  # type: ignore[attr-defined]


def test_unknown_names_and_options_are_named() -> None:
    with pytest.raises(UsageError, match=r"no score is called nope. Choose one of msp, "):
        fit_score("nope", training())
    with pytest.raises(UsageError, match=r"no score is called odin"):
        restore_score("odin", {})
    with pytest.raises(UsageError, match=r"msp has no option k. It has none"):
        fit_score("msp", training(), k=3)
    with pytest.raises(UsageError, match=r"gen has no option k. It has gamma, top"):
        fit_score("gen", training(), k=3)
    with pytest.raises(UsageError, match=r"needs a model with an unknown class"):
        fit_score("unknown", training(None))


def test_numpy_is_all_they_need() -> None:
    code = "import sys, moon.scores; print({m.split('.')[0] for m in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "scipy", "sklearn", "onnx", "onnxruntime"}
    assert "numpy" in found.stdout and not heavy & set(re.findall(r"\w+", found.stdout))
