from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from moon.data.items import Source
from moon.data.load import data_sha256
from moon.data.source import open_source
from moon.errors import CalibrationError, DataError, ExportError, UsageError
from moon.export.classifier import classifier_input, classifier_weights
from moon.export.fit_images import FitImages
from moon.export.fit_settings import asked_scores
from moon.export.fitting import Fitting, fit_scores
from moon.export.graph import copied
from moon.export.head import CARRIED
from moon.export.session import Session
from moon.scores import SCORE_TABLE

from .conftest import CLASSES, PREPROCESS, TEST, TRAIN


def fit(
    body: ModelProto,
    *,
    score: str = "ebo",
    carry: tuple[str, ...] = (),
    training: Source | None = None,
    held_out: Source | None = None,
    limit: int | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    classes: tuple[str, ...] = CLASSES,
    unknown_index: int | None = 10,
) -> Fitting:
    return fit_scores(
        body,
        FitImages(training, held_out, limit),
        score=score,
        carry=carry,
        settings=settings or {},
        classes=classes,
        preprocess=PREPROCESS,
        unknown_index=unknown_index,
    )


@pytest.fixture(scope="module")
def images() -> tuple[Source, Source]:
    return open_source(TRAIN), open_source(TEST)


def without_classifier(body: ModelProto) -> ModelProto:
    """The same logits through one operator more, as models that end in no linear layer have it."""
    model = copied(body)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Identity", ["before"], ["logits"], name="last"))
    return model


def test_all_is_every_score_a_graph_can_compute() -> None:
    every = asked_scores("ebo", ["all"])
    assert every == tuple(name for name in SCORE_TABLE if name not in CARRIED)
    assert asked_scores("ebo", []) == asked_scores("msp", ["mls"]) == ()
    assert asked_scores("vim", ["knn", "msp", "knn"]) == ("knn", "vim")


def test_names_that_are_no_score_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no score is called vmi.*vim"):
        asked_scores("vmi", [])
    with pytest.raises(UsageError, match="no score is called everything"):
        asked_scores("ebo", ["everything"])
    with pytest.raises(UsageError, match="needs a gradient"):
        asked_scores("odin", [])


def test_every_score_is_fitted_to_the_training_images(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    training, held_out = images
    found = fit(body, carry=("all",), training=training, held_out=held_out)
    assert [one.name for one in found.scores] == list(asked_scores("ebo", ["all"]))
    assert not found.left_out
    for name, facts in found.record.items():
        if name in ("gen", "scale"):
            assert "images" not in facts
        elif name == "temperature":
            assert (facts["images"], facts["source"]) == (len(held_out) // 2, TEST)
        else:
            assert (facts["images"], facts["source"]) == (len(training), TRAIN)
    knn = next(one for one in found.scores if one.name == "knn").to_arrays()
    assert knn["bank"].shape[0] == 1000
    assert int(knn["k"]) == 5


def test_constants_are_those_of_the_models_own_answers(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    """Against features computed here, one image at a time."""
    training = images[0].select(np.arange(60))
    found = fit(body, carry=("react",), training=training)
    probe = copied(body)
    name = classifier_input(probe)
    assert name is not None
    probe.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = Session(probe)
    features = []
    for i in range(60):
        pixels = PREPROCESS.pixels(training.item(i))[None]
        features.append(session.run({"input": PREPROCESS.normalise(pixels)})[name])
    (react,) = found.scores
    expected = np.percentile(np.concatenate(features), 90)
    np.testing.assert_allclose(react.to_arrays()["clip"], expected, rtol=1e-5)


def test_the_last_layer_is_read_as_it_is_applied(body: ModelProto) -> None:
    head = classifier_weights(body)
    assert head is not None
    weight, bias = head
    probe = copied(body)
    name = classifier_input(probe)
    assert name is not None
    probe.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    rng = np.random.default_rng(0)
    out = Session(probe).run({"input": rng.normal(size=(5, 1, 8, 8)).astype(np.float32)})
    logits = out[name] @ weight.T + (0 if bias is None else bias)
    np.testing.assert_allclose(logits, out["logits"], atol=1e-4)


def test_images_that_fix_a_temperature_do_not_set_the_threshold(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    held_out = images[1]
    found = fit(body, score="temperature", held_out=held_out)
    assert found.held_out is not None
    assert len(found.held_out) == len(held_out) - len(held_out) // 2
    rest = {found.held_out.name(i) for i in range(len(found.held_out))}
    used = [i for i in range(len(held_out)) if held_out.name(i) not in rest]
    assert len(used) == len(held_out) // 2
    assert found.record["temperature"]["data_sha256"] == data_sha256(held_out, used)
    without = fit(body, held_out=held_out)
    assert without.held_out is held_out


def test_a_limit_draws_the_same_images_each_time(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    one = fit(body, carry=("klm",), training=images[0], limit=200)
    two = fit(body, carry=("klm",), training=images[0], limit=200)
    other = fit(body, carry=("klm",), training=images[0])
    assert one.record == two.record != other.record
    assert one.record["klm"]["images"] == 200
    with pytest.raises(UsageError, match="1 or more, not 0"):
        fit(body, limit=0)


def test_settings_reach_the_fit(body: ModelProto, images: tuple[Source, Source]) -> None:
    settings = {"knn": {"bank": "random", "size": 64, "k": 3}}
    found = fit(body, score="knn", training=images[0], settings=settings)
    knn = found.scores[0].to_arrays()
    assert knn["bank"].shape[0] == 64
    assert int(knn["k"]) == 3
    assert found.record["knn"]["options"] == {"dtype": "float32", **settings["knn"]}
    with pytest.raises(UsageError, match="the score knn has no option sizes"):
        fit(body, score="knn", training=images[0], settings={"knn": {"sizes": 1}})
    with pytest.raises(UsageError, match="settings for the score vim, which is not fitted"):
        fit(body, score="knn", training=images[0], settings={"vim": {"dimension": 3}})


def test_images_that_are_not_there(body: ModelProto, images: tuple[Source, Source]) -> None:
    with pytest.raises(UsageError, match=r"vim is fitted to the training images.*--fit SOURCE"):
        fit(body, score="vim")
    with pytest.raises(UsageError, match=r"temperature is fitted to held-out images.*--data"):
        fit(body, score="temperature", training=images[0])
    some = fit(body, carry=("all",))
    assert [one.name for one in some.scores] == ["gen", "scale"]
    assert "none are given" in some.left_out["vim"]
    both = fit(body, carry=("all",), training=images[0])
    assert set(both.left_out) == {"temperature"}


def test_images_of_other_classes_are_refused(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    other = dataclasses.replace(
        images[0], class_names=tuple(f"digit {name}" for name in images[0].class_names or ())
    )
    with pytest.raises(DataError, match="classes the bundle does not know"):
        fit(body, carry=("all",), training=other)


def test_unlabelled_images_do_for_scores_without_classes(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    unlabelled = dataclasses.replace(images[0], labels=None, class_names=None)
    assert fit(body, score="vim", training=unlabelled).scores
    with pytest.raises(UsageError, match="rmds is fitted to labels"):
        fit(body, score="rmds", training=unlabelled)


def test_a_model_without_a_linear_end_has_scores_of_logits(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    model = without_classifier(body)
    with pytest.raises(ExportError, match=r"vim reads features, and .*temperature"):
        fit(model, score="vim", training=images[0])
    found = fit(model, carry=("all",), training=images[0], held_out=images[1])
    assert [one.name for one in found.scores] == ["temperature", "gen", "klm"]
    assert "does not end in a linear layer" in found.left_out["knn"]


def test_a_temperature_that_nothing_fixes(body: ModelProto, images: tuple[Source, Source]) -> None:
    session = Session(body)
    held_out = images[1]
    assert held_out.labels is not None
    pixels = np.stack([PREPROCESS.pixels(held_out.item(i)) for i in range(len(held_out))])
    logits = session.run_batches("input", PREPROCESS.normalise(pixels))["logits"]
    right = np.flatnonzero(logits[:, :10].argmax(axis=1) == held_out.labels)
    with pytest.raises(CalibrationError, match="answered rightly"):
        fit(body, score="temperature", held_out=held_out.select(right))


@pytest.mark.parametrize(
    ("settings", "rows", "k"),
    [
        ({"size": 30}, 30, 5),  # of fewer images than the usual bank
        ({"size": 30, "k": 2}, 30, 2),
        ({"bank": "random", "size": 30}, 30, 12),  # the same share as 50 of all
        ({"bank": "all"}, 120, 50),
        ({}, 120, 50),
    ],
)
def test_the_settings_of_a_bank_go_together(
    body: ModelProto, images: tuple[Source, Source], settings: dict[str, Any], rows: int, k: int
) -> None:
    training = images[0].select(np.arange(120))
    found = fit(body, carry=("knn",), training=training, settings={"knn": settings})
    (knn,) = found.scores
    assert knn.to_arrays()["bank"].shape[0] == rows
    assert int(knn.to_arrays()["k"]) == k
    assert settings.items() <= found.record["knn"]["options"].items()


@pytest.mark.parametrize(
    ("score", "settings", "said"),
    [
        ("knn", {"size": 500.5}, "size of the score knn must be a whole number, not 500.5"),
        ("knn", {"seed": -1}, "seed of the score knn must be a whole number of 0 or more"),
        ("knn", {"progress": 1}, "progress is no setting"),
        ("knn", {"bank": "all", "size": 30}, "no size of its own"),
        ("gen", {"gamma": "half"}, "gamma of the score gen must be a number, not 'half'"),
        ("gen", {"gamma": float("nan")}, "gen.gamma must be a finite number"),
        ("klm", {"over_all": "no"}, "over_all of the score klm must be true or false"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    body: ModelProto,
    images: tuple[Source, Source],
    score: str,
    settings: dict[str, Any],
    said: str,
) -> None:
    training = images[0].select(np.arange(120))
    with pytest.raises(UsageError, match=said):
        fit(body, carry=(score,), training=training, settings={score: settings})


def test_images_that_fit_a_score_cannot_calibrate_it(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    training, held_out = images
    mixed = training.select(np.arange(100))
    with pytest.raises(CalibrationError, match="fitted to 100 of the 100 held-out images"):
        fit(body, carry=("react",), training=training, held_out=mixed)
    # What reads no training image takes nothing from them.
    assert fit(body, carry=("gen",), training=training, held_out=mixed).held_out is mixed
    fit(body, carry=("react",), training=training, held_out=held_out)


def test_a_temperature_left_out_costs_no_images(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    held_out = images[1].select(np.arange(1))
    found = fit(body, carry=("all",), training=images[0], held_out=held_out)
    assert "too few images to fit a temperature" in found.left_out["temperature"]
    assert found.held_out is held_out
    with pytest.raises(CalibrationError, match="too few images to fit a temperature"):
        fit(body, carry=("temperature",), held_out=held_out)


def test_a_gates_score_is_checked_before_any_image(body: ModelProto) -> None:
    with pytest.raises(UsageError, match="a gate compares one score"):
        asked_scores("all", [])
    for asked in ({"score": "unknown"}, {"carry": ("unknown",)}):
        with pytest.raises(UsageError, match="needs a model with an unknown class"):
            fit(body, unknown_index=None, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fdbd", "nci", "react", "vim", "knn", "rmds", "klm"])
def test_too_few_images_to_fit_to_are_refused(
    body: ModelProto, images: tuple[Source, Source], name: str
) -> None:
    said = rf"{name} cannot be fitted to 19 of .* for 10 classes it takes 20, 2 each.*Raise --fit-l"
    with pytest.raises(CalibrationError, match=said):
        fit(body, carry=(name,), training=images[0], limit=19)
    few = images[0].select(np.arange(19))
    with pytest.raises(CalibrationError, match=r"fitted to 19 of .*Give more with --fit"):
        fit(body, carry=(name,), training=few)
    found = fit(body, carry=("all",), training=few)
    assert "cannot be fitted to 19" in found.left_out[name]


def test_twenty_images_of_ten_classes_fit_a_mean(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    found = fit(body, carry=("fdbd", "nci", "react"), training=images[0], limit=20)
    assert [facts["images"] for facts in found.record.values()] == [20, 20, 20]


def test_a_temperature_takes_ten_images(body: ModelProto, images: tuple[Source, Source]) -> None:
    with pytest.raises(CalibrationError, match="too few images to fit a temperature to some, at"):
        fit(body, score="temperature", held_out=images[1].select(np.arange(19)))


def test_foreign_classes_are_told_of_the_source_they_are_in(
    body: ModelProto, images: tuple[Source, Source]
) -> None:
    names = tuple(f"digit {name}" for name in images[0].class_names or ())
    training, held_out = (dataclasses.replace(one, class_names=names) for one in images)
    with pytest.raises(DataError, match="items of the training source"):
        fit(body, carry=("react",), training=training)
    with pytest.raises(DataError, match="items of the in-distribution source"):
        fit(body, carry=("temperature",), held_out=held_out)


def test_an_empty_name_is_said_to_be_empty() -> None:
    for score, carry in (("ebo", [""]), (" ", [])):
        with pytest.raises(UsageError, match="the name of a score is empty"):
            asked_scores(score, carry)


def test_a_score_can_be_taken_out_again(body: ModelProto, images: tuple[Source, Source]) -> None:
    found = fit(body, carry=("knn", "temperature"), training=images[0], held_out=images[1])
    assert [(one.part, one.scores) for one in found.fitted_to] == [
        ("held-out", ("temperature",)),
        ("training", ("knn",)),
    ]
    less = found.without("temperature", "it is too warm")
    assert [one.name for one in less.scores] == list(less.record) == ["knn"]
    assert less.left_out == {"temperature": "it is too warm"}
    assert [one.scores for one in less.fitted_to] == [("knn",)]
    assert less.held_out is images[1], "its images calibrate again"
