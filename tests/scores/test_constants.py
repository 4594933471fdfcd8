"""Tiny cases by hand, defaults, invariances and refusals of the scores with constants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from moon.errors import CalibrationError, UsageError
from moon.scores import Training, fit_score, restore_score
from moon.scores.vim import principal_dimension
from tests.scores.samples import D, K, draw, model, strange, training

HEAD = np.array([[1.0, 0.0], [0.0, 1.0]])


def arrays(name: str, *args: Any, **options: Any) -> dict[str, np.ndarray]:
    return fit_score(name, *args, **options).to_arrays()


# knn


def test_knn_by_hand() -> None:
    # Unit features at 0, 90 and 180 degrees.
    bank = Training(features=[[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]])
    query = [[7.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    near = 2 * math.sin(math.pi / 8)
    assert fit_score("knn", bank, k=1).score(query) == pytest.approx([0, -near, -1])
    assert fit_score("knn", bank, k=2).score(query) == pytest.approx([-math.sqrt(2), -near, -1])
    assert fit_score("knn", bank, k=3).score(query)[0] == -2


def test_knn_does_not_see_the_length_of_features() -> None:
    x, plain = draw(20, seed=3)[0], fit_score("knn", training())
    longer = Training(features=np.asarray(training().features) * 37.0)
    np.testing.assert_allclose(plain.score(x * 0.01), plain.score(x), rtol=1e-12)
    np.testing.assert_allclose(fit_score("knn", longer).score(x), plain.score(x), rtol=1e-12)


def test_knn_finds_its_own_features_at_distance_zero() -> None:
    x = draw(30)[0]
    for dtype in ("float64", "float32"):
        found = fit_score("knn", Training(features=x), k=1, dtype=dtype).score(x)
        assert np.abs(found).max() < (1e-15 if dtype == "float64" else 1e-7)


def test_knn_in_float32_is_half_the_size_and_nearly_the_same() -> None:
    wide, narrow = (fit_score("knn", training(), dtype=d) for d in ("float64", "float32"))
    assert wide.nbytes - 8 == 2 * (narrow.nbytes - 8)
    x = np.concatenate([draw(50, seed=3)[0], strange(50)])
    np.testing.assert_allclose(narrow.score(x), wide.score(x), rtol=1e-5)


@pytest.mark.parametrize("bank", ["random", "k-center"])
def test_a_knn_bank_that_is_a_part_takes_that_share_of_k(bank: str) -> None:
    score = fit_score("knn", training(count=400), bank=bank, size=80)
    stored = score.to_arrays()
    assert stored["bank"].shape == (80, D) and stored["k"] == 10
    assert arrays("knn", training(), bank=bank, size=3)["k"] == 1
    assert arrays("knn", training(), bank=bank, size=80, k=7)["k"] == 7
    full = arrays("knn", training())
    rows = {row.tobytes() for row in full["bank"]}
    assert all(row.tobytes() in rows for row in stored["bank"]) and full["k"] == 50
    inside, outside = score.score(draw(100, seed=3)[0]), score.score(strange())
    assert (inside[:, None] > outside).mean() > 0.95


def test_knn_refuses_too_few_features() -> None:
    with pytest.raises(UsageError, match=r"knn with k = 50 needs at least 50 features.*holds 49"):
        fit_score("knn", training(count=49))
    fit_score("knn", training(count=50))
    with pytest.raises(UsageError, match=r"k of at least 1"):
        fit_score("knn", training(), k=0)
    with pytest.raises(UsageError, match=r"float64 or float32, not int8"):
        fit_score("knn", training(), dtype="int8")
    with pytest.raises(UsageError, match=r"bank of 1000 vectors cannot be chosen from 400"):
        fit_score("knn", training(), bank="random")


# nnguide


def test_nnguide_by_hand() -> None:
    # Energies log 2 and log 3 of the bank; the query's is log 4.
    z = np.log([[1.0, 1.0], [2.0, 1.0]])
    bank = Training(features=[[5.0, 0.0], [0.0, 5.0]], logits=z)
    query = ([[3.0, 4.0]], np.log([[1.0, 3.0]]))
    one, two = 0.6 * math.log(2), 0.8 * math.log(3)
    best = fit_score("nnguide", bank, k=1).score(*query)
    assert best == pytest.approx([math.log(4) * two])
    assert fit_score("nnguide", bank, k=2).score(*query)[0] == pytest.approx(
        math.log(4) * (one + two) / 2
    )


def test_nnguide_keeps_a_share_of_the_features_but_at_least_500() -> None:
    rng = np.random.default_rng(0)
    many = Training(features=rng.normal(size=(2000, 3)), logits=rng.normal(size=(2000, 2)))
    assert arrays("nnguide", many)["bank"].shape == (500, 3)
    assert arrays("nnguide", many, alpha=0.6)["bank"].shape == (1200, 3)
    assert arrays("nnguide", many, alpha=0.30001)["bank"].shape == (601, 3)
    assert arrays("nnguide", training())["bank"].shape == (400, D)
    assert arrays("nnguide", training())["k"] == 100
    assert arrays("nnguide", training(), dtype="float32")["bank"].dtype == np.float32
    some = arrays("nnguide", many)["bank"]
    unit = many.features / np.linalg.norm(many.features, axis=1, keepdims=True)
    whole = unit * np.log(np.exp(many.logits).sum(axis=1))[:, None]
    assert all(np.abs(whole - row).max(axis=1).min() < 1e-12 for row in some)
    first, again, other = (arrays("nnguide", many, seed=s)["bank"] for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_nnguide_refuses_wrong_arguments() -> None:
    with pytest.raises(UsageError, match=r"nnguide with k = 100 needs at least 100 features"):
        fit_score("nnguide", training(count=99))
    for alpha in (0.0, 1.5):
        with pytest.raises(UsageError, match=r"alpha is the bank's share"):
            fit_score("nnguide", training(), alpha=alpha)
    with pytest.raises(UsageError, match=r"float64 or float32"):
        fit_score("nnguide", training(), dtype="float16")


# vim


def test_vim_by_hand() -> None:
    # Training features along the first axis, with 1 to either side along the second.
    x = np.array([[10.0, 1.0], [-10.0, -1.0], [10.0, -1.0], [-10.0, 1.0]])
    z = x @ np.array([[0.5, 0.0], [-0.5, 0.0]]).T
    fit = Training(features=x, logits=z, weight=[[0.5, 0.0], [-0.5, 0.0]])
    stored = arrays("vim", fit, dimension=1)
    assert stored["alpha"] == pytest.approx(5)  # mean largest logit 5 over mean residual 1
    assert stored["origin"] == pytest.approx([0, 0])
    assert abs(stored["residual"]) == pytest.approx(np.array([[0], [1]]), abs=1e-12)
    found = fit_score("vim", fit, dimension=1).score([[3.0, -2.0]], [[0.0, 0.0]])
    assert found == pytest.approx([math.log(2) - 5 * 2])


def test_vim_needs_two_features() -> None:
    one = Training(features=[[1.0], [2.0]], logits=[[1.0, 0.0], [2.0, 0.0]], weight=[[1.0], [0.0]])
    with pytest.raises(UsageError, match="vim needs at least two features, and the last layer re"):
        fit_score("vim", one)


def test_vim_has_its_origin_where_the_logits_vanish() -> None:
    stored = arrays("vim", training(K))
    net = model(None)
    np.testing.assert_allclose(net.weight @ stored["origin"] + net.bias, 0, atol=0.1)


def test_vim_ignores_directions_of_the_head_that_are_rounding() -> None:
    # Rows that sum to zero but for float32's rounding, and biases that do not.
    fit, bias = training(), np.full(K, 3.0)
    rough = np.asarray(fit.weight).astype(np.float32).astype(np.float64)
    moved = Training(features=fit.features, logits=fit.logits, weight=rough, bias=bias)
    assert np.abs(arrays("vim", moved)["origin"]).max() < 1


@pytest.mark.parametrize(
    ("features", "dimension"),
    [(2048, 1000), (4096, 1000), (2047, 512), (768, 512), (767, 383), (512, 256), (3, 1)],
)
def test_the_dimension_of_vim(features: int, dimension: int) -> None:
    assert principal_dimension(features) == dimension


def test_vim_refuses_what_leaves_nothing_outside() -> None:
    assert arrays("vim", training())["residual"].shape == (D, D - D // 2)
    for d in (0, D):
        with pytest.raises(UsageError, match=f"has 1 to 11 dimensions of 12, not {d}"):
            fit_score("vim", training(), dimension=d)
    flat = np.outer(np.linspace(1, 2, 30), np.arange(1.0, 5.0))
    fit = Training(features=flat, logits=flat[:, :2], weight=np.eye(4)[:2])
    with pytest.raises(UsageError, match=r"lie within 1 dimensions.*smaller dimension"):
        fit_score("vim", fit, dimension=1)


# fdbd and nci


def test_fdbd_by_hand() -> None:
    fit = Training(features=[[1.0, 1.0], [-1.0, -1.0]], weight=[*HEAD.tolist(), [0.0, -1.0]])
    # z = 3, 4, -4: margins 1 over sqrt 2 and 8 over 2, and the length is 5.
    found = fit_score("fdbd", fit).score([[3.0, 4.0]], [[3.0, 4.0, -4.0]])
    assert found == pytest.approx([(1 / math.sqrt(2) + 8 / 2) / 2 / 5])


def test_fdbd_does_not_see_a_shift_of_all_logits_nor_the_size_of_the_head() -> None:
    x, net, fit = draw(20, seed=3)[0], model(K), training(K)
    score = fit_score("fdbd", fit)
    plain = score.score(x, net.logits(x))
    np.testing.assert_allclose(score.score(x, net.logits(x) + 1e3), plain, rtol=1e-9)
    large = Training(features=fit.features, weight=5 * fit.weight, unknown_index=K)
    np.testing.assert_allclose(
        fit_score("fdbd", large).score(x, 5 * net.logits(x)), plain, rtol=1e-12
    )


def test_fdbd_refuses_classes_without_a_boundary() -> None:
    with pytest.raises(UsageError, match=r"at least two known classes"):
        fit_score("fdbd", Training(features=HEAD, weight=HEAD, unknown_index=1))
    same = Training(features=HEAD, weight=[[1.0, 2.0], [0.0, 1.0], [1.0, 2.0]])
    with pytest.raises(UsageError, match=r"classes 0 and 2 have the same weights"):
        fit_score("fdbd", same)


def test_nci_by_hand() -> None:
    fit = Training(features=[[1.0, 1.0], [1.0, -1.0]], weight=2 * HEAD)
    # The centre is [1, 0]; the feature is 3 and -4 away from it; |x|_1 = 8.
    score = fit_score("nci", fit, alpha=0.5)
    assert score.score([[4.0, -4.0]], [[2.0, 1.0]]) == pytest.approx([2 * 3 / 5 + 0.5 * 8])
    assert score.score([[4.0, -4.0]], [[1.0, 2.0]]) == pytest.approx([2 * -4 / 5 + 0.5 * 8])
    assert arrays("nci", fit)["alpha"] == 1e-4
    with pytest.raises(UsageError, match=r"alpha of nci must be 0 or a positive number, not -1"):
        fit_score("nci", fit, alpha=-1)


@pytest.mark.parametrize("name", ["fdbd", "nci"])
def test_at_the_mean_feature_the_score_is_a_number(name: str) -> None:
    fit = Training(features=[[1.0, 1.0], [1.0, -1.0]], weight=HEAD)
    found = fit_score(name, fit).score([[1.0, 0.0]], [[1.0, 0.0]])
    assert np.isfinite(found).all()
    if name == "nci":
        assert found == pytest.approx([1e-4])


# rmds


def test_rmds_by_hand() -> None:
    # Two classes at -10 and 10 with variance 1; variance 101 in all around 0.
    x = np.array([[-11.0], [-9.0], [9.0], [11.0]])
    score = fit_score("rmds", Training(features=x, labels=[0, 0, 1, 1]))
    expected = [-9 + 13**2 / 101, -100.0, -4 + 8**2 / 101]
    assert score.score([[13.0], [0.0], [-8.0]]) == pytest.approx(expected)


def test_rmds_does_not_see_an_invertible_map_of_the_features() -> None:
    x, y = draw()
    query = draw(30, seed=3)[0]
    turn = np.random.default_rng(0).normal(size=(D, D))
    plain = fit_score("rmds", Training(features=x, labels=y))
    turned = fit_score("rmds", Training(features=x @ turn + 5, labels=y), rtol=1e-13)
    np.testing.assert_allclose(turned.score(query @ turn + 5), plain.score(query), rtol=1e-7)


def test_rmds_leaves_out_directions_without_variance() -> None:
    x, y = draw()
    dead = np.insert(x, [0, 5], 0.0, axis=1)
    twice = np.column_stack([dead, dead[:, 3]])
    plain = fit_score("rmds", Training(features=x, labels=y))
    less = fit_score("rmds", Training(features=twice, labels=y))
    assert less.to_arrays()["whiten"].shape == (D + 3, D)
    query, odd = draw(30, seed=3)[0], np.insert(strange(), [0, 5], 0.0, axis=1)
    wide = np.insert(query, [0, 5], 0.0, axis=1)
    np.testing.assert_allclose(
        less.score(np.column_stack([wide, wide[:, 3]])), plain.score(query), rtol=1e-8
    )
    assert np.isfinite(less.score(np.column_stack([odd, odd[:, 3]]))).all()


def test_rmds_with_fewer_images_than_features_gives_numbers() -> None:
    x, y = draw(8)
    score = fit_score("rmds", Training(features=x, labels=y))
    assert score.to_arrays()["whiten"].shape[1] == 4
    assert np.isfinite(score.score(strange())).all()


def test_rmds_refuses_missing_classes_and_constant_features() -> None:
    x, y = draw()
    kept = (y != 1) & (y != 3)
    net = model(K)
    with pytest.raises(UsageError, match=r"none has the label 1, 3. Give"):
        fit_score("rmds", net.training(x[kept], y[kept]))
    with pytest.raises(UsageError, match=r"none has the label 1. Give"):
        fit_score("rmds", Training(features=x[kept], labels=y[kept]))
    with pytest.raises(UsageError, match=r"label 0, 1, 2, 3, 4 and others"):
        fit_score("rmds", Training(features=[[1.0]], labels=[9]))
    with pytest.raises(UsageError, match=r"do not vary within the classes"):
        fit_score("rmds", Training(features=[[1.0], [2.0]], labels=[0, 1]))


# react and scale


def test_react_by_hand() -> None:
    fit = Training(features=[[0.0, 1.0], [2.0, 3.0]], weight=HEAD, bias=[0.0, 1.0])
    score = fit_score("react", fit, percentile=100 * 2 / 3)  # the third of four activations
    assert score.to_arrays()["clip"] == pytest.approx(2)
    expected = [np.logaddexp(2, 1.5), np.logaddexp(-9, 3)]
    assert score.score([[7.0, 0.5], [-9.0, 5.0]]) == pytest.approx(expected)


def test_react_at_100_is_the_energy_and_is_not_fooled_by_one_large_activation() -> None:
    x, net = draw(20)[0], model(K)
    whole = fit_score("react", training(K), percentile=100)
    energy = fit_score("ebo", training(K)).score(logits=net.logits(x))
    np.testing.assert_allclose(whole.score(x), energy, rtol=1e-12)
    spike = x.copy()
    spike[:, 0] = 1e6
    clipped = fit_score("react", training(K))
    assert (clipped.score(spike) < clipped.score(x) + 3 * np.abs(net.weight).max()).all()
    for percentile in (0.0, 101.0):
        with pytest.raises(UsageError, match=r"percentile of react"):
            fit_score("react", training(), percentile=percentile)


def test_scale_by_hand() -> None:
    fit = Training(weight=HEAD, bias=[1.0, 0.0])
    score = fit_score("scale", fit, percentile=50)
    # 4 / 3: the larger of the two is the top half. The zero vector is left as it is.
    factor = math.exp(4 / 3)
    expected = [np.logaddexp(3 * factor + 1, factor), np.logaddexp(1, 0)]
    assert score.score([[3.0, 1.0], [0.0, 0.0]]) == pytest.approx(expected)


def test_scale_refuses_percentiles_that_leave_no_feature() -> None:
    assert arrays("scale", training())["top"] == 2  # 12 - round(10.2)
    for percentile in (-1.0, 100.0):
        with pytest.raises(UsageError, match=r"percentile of scale"):
            fit_score("scale", training(), percentile=percentile)
    with pytest.raises(UsageError, match=r"leaves none of 12 features"):
        fit_score("scale", training(), percentile=99.0)


# klm and temperature


def test_klm_by_hand() -> None:
    p = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    score = fit_score("klm", Training(logits=np.log(p)))
    assert np.exp(score.to_arrays()["log_means"]) == pytest.approx(
        np.array([[0.7, 0.3], [0.1, 0.9]])
    )
    to_first = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    found = score.score(logits=np.log([[0.5, 0.5], [0.1, 0.9]]))
    assert found == pytest.approx([-to_first, 0.0], abs=1e-12)


def test_klm_is_finite_where_the_posteriors_underflow() -> None:
    z = np.array([[0.0, -2000.0, -3000.0], [-900.0, 0.0, -5000.0], [-1.0, -1.0, 0.0]])
    found = fit_score("klm", Training(logits=z)).score(logits=np.roll(z, 1, axis=1))
    assert np.isfinite(found).all() and (found <= 0).all()


def test_klm_names_the_classes_that_are_never_answered() -> None:
    z = np.zeros((3, 4))
    z[:, 2] = 1
    z[0, 0] = 9  # the unknown's own
    with pytest.raises(UsageError, match=r"none is answered with class 0, 2. Give more images"):
        fit_score("klm", Training(logits=z, unknown_index=0))


def test_temperature_by_hand() -> None:
    # Margin 4, and 3 of 4 right: the best T makes p = 3/4, so that 4 / T = log 3.
    fit = Training(logits=[[4.0, 0.0]] * 4, labels=[0, 0, 0, 1])
    score = fit_score("temperature", fit)
    assert score.to_arrays()["temperature"] == pytest.approx(4 / math.log(3))
    assert score.score(logits=[[4.0, 0.0], [0.0, 0.0]]) == pytest.approx([0.75, 0.5])


def test_temperature_counts_the_unknown_class_as_msp_does() -> None:
    # p of the right one of three: e / (e + 2) with e = exp(4 / T) is 3/4 at e = 6.
    fit = Training(logits=[[0.0, 4.0, 0.0]] * 8, labels=[0] * 6 + [1] * 2, unknown_index=0)
    found = fit_score("temperature", fit).to_arrays()["temperature"]
    assert found == pytest.approx(4 / math.log(6))


def test_temperature_of_stretched_logits_is_stretched() -> None:
    base = training(K)
    plain = float(arrays("temperature", base)["temperature"])
    for stretch in (1e-6, 0.1, 50.0, 1e6):
        wide = Training(logits=base.logits * stretch, labels=base.labels, unknown_index=K)
        found = float(arrays("temperature", wide)["temperature"])
        assert found == pytest.approx(plain * stretch, rel=1e-9)


def test_temperature_refuses_when_none_is_best() -> None:
    with pytest.raises(CalibrationError, match=r"all 2 images are answered rightly"):
        fit_score("temperature", Training(logits=HEAD, labels=[0, 1]))
    with pytest.raises(CalibrationError, match=r"do not favour the right classes"):
        fit_score("temperature", Training(logits=HEAD, labels=[1, 0]))


def test_a_small_temperature_and_large_logits_do_not_overflow() -> None:
    stored = arrays("temperature", Training(logits=[[4.0, 0.0]] * 4, labels=[0, 0, 0, 1]))
    cold = restore_score("temperature", {**stored, "temperature": np.array(1e-10)})
    assert cold.score(logits=[[1e300, 0.0], [1e300, 1e300]]) == pytest.approx([1, 0.5])
