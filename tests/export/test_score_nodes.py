from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.export.graph import initializers
from moon.export.head import CARRIED, add_head, carried_scores
from moon.export.score_nodes import SCORE_NODES
from moon.export.score_nodes_rmds import reduce_rmds
from moon.export.session import Session
from moon.scores import SCORE_TABLE, FittedScore, Training, fit_score, restore_score
from tests.export.test_head import passing

Floats = NDArray[Any]
FITTED = tuple(name for name in SCORE_TABLE if name not in CARRIED)
FORMS = ("Gemm", "Gemm-transposed", "Gemm-scaled", "MatMul", "MatMul-Add", "Add-MatMul")


def network(weight_LD: Floats, bias_L: Floats, form: str = "Gemm-transposed") -> ModelProto:
    """[N, D, 1, 1] -> features [N, D] -> logits by a last layer written in one of FORMS."""
    nodes = [helper.make_node("Flatten", ["input"], ["flat"])]
    weight, bias = weight_LD.astype(np.float32), bias_L.astype(np.float32)
    kept = weight if form == "Gemm-transposed" else np.ascontiguousarray(weight.T)
    if form == "Gemm-transposed":
        nodes.append(helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1))
    elif form == "Gemm":
        nodes.append(helper.make_node("Gemm", ["flat", "w", "b"], ["logits"]))
    elif form == "Gemm-scaled":
        kept, bias = kept / 2, bias * 2
        nodes.append(helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], alpha=2.0, beta=0.5))
    elif form == "MatMul":
        nodes.append(helper.make_node("MatMul", ["flat", "w"], ["logits"]))
    else:
        nodes.append(helper.make_node("MatMul", ["flat", "w"], ["product"]))
        both = ["product", "b"] if form == "MatMul-Add" else ["b", "product"]
        nodes.append(helper.make_node("Add", both, ["logits"]))
    graph = helper.make_graph(
        nodes,
        "body",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", weight.shape[1], 1, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(weight)])],
        [numpy_helper.from_array(kept, "w")]
        + ([numpy_helper.from_array(bias, "b")] if form != "MatMul" else []),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@dataclass(frozen=True)
class Sample:
    """A classifier of noisy directions, its training set, and the scores fitted to it."""

    training: Training
    features: Floats
    weight: Floats
    bias: Floats
    unknown_index: int | None

    @property
    def outputs(self) -> int:
        return len(self.weight)

    @property
    def answers(self) -> Floats:
        logits = np.asarray(self.training.logits)
        return logits[:, self.training.known].argmax(axis=1)

    def fit(self, names: tuple[str, ...] = FITTED, **options: Any) -> list[FittedScore]:
        given = {
            "knn": {"k": min(7, len(self.features))},
            "nnguide": {"k": min(7, len(self.features))},
            "scale": {"percentile": 85 if self.features.shape[1] > 8 else 40},
        }
        return [
            fit_score(n, self.training, **{**given.get(n, {}), **options.get(n, {})}) for n in names
        ]

    def body(self, form: str = "Gemm-transposed") -> ModelProto:
        return network(self.weight, self.bias, form)

    def graph(
        self, fitted: list[FittedScore], form: str = "Gemm-transposed", **options: Any
    ) -> ModelProto:
        return add_head(
            self.body(form),
            outputs=self.outputs,
            unknown_index=self.unknown_index,
            fitted=fitted,
            **{"features": True, **options},
        )


def sample(
    classes: int, width: int, unknown: int | None, *, seed: int = 0, count: int = 300
) -> Sample:
    rng = np.random.default_rng(seed)
    outputs = classes + (unknown is not None)
    known = np.delete(np.arange(outputs), [] if unknown is None else unknown)
    directions = rng.standard_normal((classes, width)) + 0.5
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    features = 2 * directions[labels] + 0.8 * rng.standard_normal((count, width))
    features = np.maximum(features, 0) if width > 2 else np.abs(features)
    weight = 0.3 * rng.standard_normal((outputs, width))
    weight[known] += directions
    # Rows of one length, and logits that are even on average, so that each class is answered.
    weight *= 2 / np.linalg.norm(weight, axis=1, keepdims=True)
    bias = -weight @ features.mean(axis=0)
    if unknown is not None:
        weight[unknown] /= 4
        bias[unknown] = -1
    features, weight, bias = (a.astype(np.float32) for a in (features, weight, bias))
    logits = features @ weight.T + bias
    answers = logits[:, known].argmax(axis=1)
    # Some answers are wrong, and every class is the right one of some.
    labels = np.where(np.arange(count) % 9 == 0, (answers + 1) % classes, answers)
    labels[:classes] = np.arange(classes)
    training = Training(
        features=features, logits=logits, labels=labels, weight=weight, bias=bias,
        unknown_index=unknown,
    )  # fmt: skip
    return Sample(training, features, weight, bias, unknown)


def feed(features: Floats) -> dict[str, Floats]:
    return {"input": features.astype(np.float32)[:, :, None, None]}


def hard(chosen: Sample) -> Floats:
    """Usual inputs, far ones, huge, tiny, zero and tied ones, and the training mean."""
    rng = np.random.default_rng(1)
    x, width = chosen.features, chosen.features.shape[1]
    mean = x.astype(np.float64).mean(axis=0)
    return np.concatenate(
        [
            x[:20],
            rng.standard_normal((10, width)),
            1e4 * x[:5],
            -1e4 * x[:3],
            1e-6 * x[:3],
            1e-30 * x[:3],
            np.zeros((1, width)),
            np.ones((1, width)),
            mean[None],
            mean[None] * (1 + 1e-4),
            (x[:1] + x[1:2]) / 2,
            np.eye(width)[:2],
        ]
    ).astype(np.float32) + np.float32(0)  # no negative zeros, whose sum's sign is anyone's


def errors(
    chosen: Sample, fitted: list[FittedScore], model: ModelProto, x: Floats
) -> dict[str, float]:
    """Largest error of each score, relative to max(1, |score|, spread)."""
    out = Session(model).run(feed(x))
    np.testing.assert_array_equal(out["features"], x)
    found = {}
    for score in fitted:
        expected = score.score(features=out["features"], logits=out["logits"])
        spread = float(
            score.score(features=chosen.training.features, logits=chosen.training.logits).std()
        )
        size = np.maximum(1, np.maximum(np.abs(expected), spread))
        found[score.name] = float((np.abs(out[f"score_{score.name}"] - expected) / size).max())
    return found


def assert_twins(
    chosen: Sample,
    fitted: list[FittedScore],
    model: ModelProto,
    x: Floats,
    tolerance: float = 1e-5,
) -> None:
    onnx.checker.check_model(model, full_check=True)
    for name, error in errors(chosen, fitted, model, x).items():
        assert error < tolerance, name


LAYOUTS = [
    (classes, width, unknown)
    for classes, width in ((2, 2), (2, 3), (4, 12), (10, 64), (12, 5))
    for unknown in (None, 0, classes // 2, classes)
]


def test_every_score_a_graph_can_carry_has_its_nodes() -> None:
    assert list(SCORE_NODES) == [name for name, spec in SCORE_TABLE.items() if spec.in_graph]
    assert carried_scores(3, FITTED[::-1]) == (*CARRIED, *FITTED)


@pytest.mark.parametrize(("classes", "width", "unknown"), LAYOUTS)
def test_twins_give_what_numpy_gives(classes: int, width: int, unknown: int | None) -> None:
    chosen = sample(classes, width, unknown)
    fitted = chosen.fit()
    assert_twins(chosen, fitted, chosen.graph(fitted), hard(chosen))


@given(
    classes=st.integers(2, 9),
    width=st.integers(2, 24),
    unknown=st.sampled_from(["none", "first", "last"]),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
@settings(max_examples=25, deadline=None)
def test_twins_hold_for_any_classifier(
    classes: int, width: int, unknown: str, seed: int, scale: float
) -> None:
    column = {"none": None, "first": 0, "last": classes}[unknown]
    chosen = sample(classes, width, column, seed=seed)
    assume(len(set(chosen.answers.tolist())) == classes)  # klm needs each
    fitted = chosen.fit()
    rng = np.random.default_rng(seed)
    x = scale * np.abs(rng.standard_normal((64, width))).astype(np.float32)
    assert_twins(chosen, fitted, chosen.graph(fitted), x, 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unknown", [None, 1])
def test_every_way_to_write_the_last_layer(form: str, unknown: int | None) -> None:
    chosen = sample(4, 12, unknown)
    if form == "MatMul":
        chosen = dataclasses.replace(chosen, bias=np.zeros_like(chosen.bias))
        logits = chosen.features @ chosen.weight.T
        training = dataclasses.replace(chosen.training, bias=None, logits=logits)
        chosen = dataclasses.replace(chosen, training=training)
    names = ("nci", "react", "scale", "fdbd")
    fitted = chosen.fit(names)
    assert_twins(chosen, fitted, chosen.graph(fitted, form), hard(chosen))


def test_one_feature() -> None:
    chosen = sample(2, 1, 2, seed=2)
    fitted = chosen.fit(tuple(name for name in FITTED if name != "vim"))
    assert_twins(chosen, fitted, chosen.graph(fitted), hard(chosen))


@pytest.mark.parametrize("unknown", [None, 0])
def test_one_known_class(unknown: int | None) -> None:
    chosen = sample(1, 12, unknown)
    own = {"bank": np.eye(12), "k": np.array(2)}
    energies = {"known": chosen.training.known, "outputs": np.array(chosen.outputs)}
    fitted = [
        *chosen.fit(("gen", "klm", "rmds", "nci", "react", "scale")),
        restore_score("knn", own),
        restore_score("nnguide", {**own, **energies}),
    ]
    assert_twins(chosen, fitted, chosen.graph(fitted), hard(chosen), 1e-4)


@pytest.mark.parametrize("count", [3000, 300])
def test_many_features(count: int) -> None:
    """With fewer images than features no covariance is regular."""
    chosen = sample(10, 512, 10, count=count)
    fitted = chosen.fit()
    assert_twins(chosen, fitted, chosen.graph(fitted), hard(chosen), 1e-4)
    held = initializers(chosen.graph(fitted))
    assert ("head/rmds/rest" in held) == (count < 512)


def test_options_that_change_the_formula() -> None:
    chosen = sample(6, 12, 2)
    for options in (
        {"klm": {"over_all": True}, "gen": {"top": 3, "gamma": 0.5}, "nci": {"alpha": 0.1}},
        {"gen": {"top": 1}, "react": {"percentile": 50.0}, "vim": {"dimension": 2}},
        {"knn": {"k": 300, "dtype": "float32"}, "nnguide": {"k": 300}},
    ):
        fitted = chosen.fit(tuple(options), **options)
        assert_twins(chosen, fitted, chosen.graph(fitted), hard(chosen))


def test_a_virtual_logit_that_counts_for_an_input() -> None:
    chosen = sample(4, 12, None)
    (vim,) = chosen.fit(("vim",))
    turned = restore_score("vim", {**vim.to_arrays(), "alpha": np.array(-0.5)})
    assert_twins(chosen, [turned], chosen.graph([turned]), hard(chosen))


def test_a_neighbour_at_no_distance_is_at_none() -> None:
    """Where a distance from the inner product would be 3e-4 off."""
    chosen = sample(4, 64, None)
    fitted = chosen.fit(("knn",), knn={"k": 1})
    out = Session(chosen.graph(fitted)).run(feed(chosen.features[:50]))
    assert (np.abs(out["score_knn"]) < 3e-7).all()
    nudged = chosen.features[:50] * (1 + 1e-5 * np.eye(64)[:50].astype(np.float32))
    assert_twins(chosen, fitted, chosen.graph(fitted), nudged, 1e-6)


def test_a_nearly_dead_feature_costs_rmds_few_numbers() -> None:
    chosen = sample(4, 40, None, count=2000)
    features = chosen.features.copy()
    features[:, 7] *= 1e-4
    training = dataclasses.replace(chosen.training, features=features)
    score = fit_score("rmds", training)
    constants = score.to_arrays()
    assert constants["whiten"].shape == (40, 39)
    parts = reduce_rmds(*(constants[name] for name in ("whiten", "means", "whiten_all")))
    assert 0 < parts.rest.shape[1] <= 6
    assert_twins(chosen, [score], chosen.graph([score]), hard(chosen), 1e-4)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_rmds_reduced_is_the_same_form(seed: int, within: int, overall: int) -> None:
    """Whatever the matrices are, of a fit or not."""
    rng = np.random.default_rng(seed)
    whiten, whiten_all = rng.standard_normal((6, within)), rng.standard_normal((6, overall))
    means, away = rng.standard_normal((3, within)), rng.standard_normal((20, 6))
    parts = reduce_rmds(whiten, means, whiten_all)
    inner = away @ parts.project
    got = ((inner * parts.roots) ** 2).sum(axis=1)
    got -= ((inner[:, None] - parts.means) ** 2).sum(axis=2).min(axis=1)
    got += ((away @ parts.rest) ** 2 * parts.signs).sum(axis=1)
    wanted = ((away @ whiten_all) ** 2).sum(axis=1)
    wanted -= (((away @ whiten)[:, None] - means) ** 2).sum(axis=2).min(axis=1)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def logits_graph(fitted: list[FittedScore], outputs: int, unknown: int | None) -> ModelProto:
    """The logits are the input, whatever last layer there is."""
    return add_head(passing(outputs), outputs=outputs, unknown_index=unknown, fitted=fitted)


@given(
    hnp.arrays(np.float32, (4, 5), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([None, 0, 2, 4]),
    st.sampled_from([1.0, 1e-30, 1e-3]),
)
@settings(max_examples=40, deadline=None)
def test_scores_of_logits_at_hard_ones(logits: Floats, unknown: int | None, scale: float) -> None:
    fitted = sample(5 - (unknown is not None), 12, unknown).fit(("temperature", "gen", "klm"))
    logits = logits * np.float32(scale)
    out = Session(logits_graph(fitted, 5, unknown)).run({"input": logits[:, :, None, None]})
    for score in fitted:
        got, expected = out[f"score_{score.name}"], score.score(logits=logits)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=score.name)


def test_a_confident_answer_is_told_from_a_more_confident_one() -> None:
    """Where 1 - p rounds to 0 in float32, and the other p's vanish."""
    fitted = sample(4, 12, None).fit(("gen",))
    gaps = np.array([17, 30, 88, 95, 103, 120, 200], np.float32)
    logits = np.zeros((7, 4), np.float32)
    logits[:, 1] = gaps
    out = Session(logits_graph(fitted, 4, None)).run({"input": logits[:, :, None, None]})
    np.testing.assert_allclose(out["score_gen"], fitted[0].score(logits=logits), rtol=1e-5)
    assert (np.diff(out["score_gen"]) > 0).all()
