from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.data.preprocess import Preprocess
from moon.errors import ExportError, UsageError
from moon.export.head import RESERVED, add_head, add_normalisation, carried_scores
from moon.export.session import Session
from moon.onnxfile import find_initializer, patch_scalar, patch_vector, read_scalar, read_vector
from moon.p_table import WIDTH
from moon.scores import SCORE_TABLE, SCORES, FittedScore, known_logits, restore_score

Logits = NDArray[np.float32]
L = 5


def passing(outputs: int = L) -> ModelProto:
    """A body whose logits are its input, [N, L, 1, 1] -> [N, L]."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["logits"])],
        "body",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", outputs, 1, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", outputs])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def head(unknown_index: int | None, **options: float | str) -> Session:
    model = add_head(passing(), outputs=L, unknown_index=unknown_index, **options)  # type: ignore[arg-type]
    onnx.checker.check_model(model, full_check=True)
    return Session(model)


HEADS = {u: head(u) for u in (None, 0, 2, 4)}


def gen(unknown: int) -> FittedScore:
    arrays = {"outputs": L, "unknown": unknown, "gamma": 0.1, "top": 4}
    return restore_score("gen", {name: np.array(value) for name, value in arrays.items()})


def feed(logits: Logits) -> dict[str, NDArray[np.float32]]:
    return {"input": logits[:, :, None, None]}


@given(
    st.sampled_from(list(HEADS)),
    hnp.arrays(np.float32, (3, L), elements=st.floats(-300, 300, width=32)),
)
def test_scores_are_those_of_numpy(unknown_index: int | None, logits: Logits) -> None:
    out = HEADS[unknown_index].run(feed(logits))
    for name in carried_scores(unknown_index):
        expected = SCORES[name](logits, unknown_index)
        # float32 keeps seven digits of a logit of 300.
        np.testing.assert_allclose(out[f"score_{name}"], expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(out["logits"], logits)
    np.testing.assert_array_equal(out["score"], out["score_ebo"])
    known = known_logits(logits, unknown_index)
    assert (known[np.arange(3), out["label"]] == known.max(axis=1)).all()


def test_scores_by_hand() -> None:
    out = HEADS[4].run(feed(np.log(np.array([[1, 2, 3, 0.5, 3.5]], np.float32))))
    assert out["label"].tolist() == [2]
    assert out["score_msp"][0] == pytest.approx(0.3)
    assert out["score_unknown"][0] == pytest.approx(-0.35)
    assert out["score_mls"][0] == pytest.approx(np.log(3))
    assert out["score_ebo"][0] == pytest.approx(np.log(6.5))


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[3e4, 2e4, 0, -3e4, 1], [-3e4, -3e4, -3e4, -3e4, -3e4]], np.float32)
    out = HEADS[4].run(feed(logits))
    np.testing.assert_allclose(out["score_ebo"], [3e4, -3e4 + np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(out["score_msp"], [1, 0.2], rtol=1e-6)


@pytest.mark.parametrize("unknown_index", [None, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("column", range(L))
def test_logits_that_are_not_finite_are_never_accepted(
    unknown_index: int | None, bad: float, column: int
) -> None:
    logits = np.zeros((1, L), np.float32)
    logits[0, column] = bad
    for name in carried_scores(unknown_index):
        out = head(unknown_index, gate_score=name, threshold=-1e30).run(feed(logits))
        unused = column == unknown_index and name in ("ebo", "mls")
        assert out["accept"].tolist() == [unused], name


def test_without_a_gate_nothing_is_accepted() -> None:
    out = HEADS[4].run(feed(np.full((2, L), 3e38, np.float32)))
    assert out["accept"].tolist() == [False, False]


def test_the_threshold_is_inclusive_and_can_be_overridden() -> None:
    logits = np.array([[1, 2, 0, 0, 0], [1, 3, 0, 0, 0]], np.float32)
    session = head(None, gate_score="mls", threshold=3.0)
    assert session.run(feed(logits))["accept"].tolist() == [False, True]
    lower = {**feed(logits), "threshold": np.array(2, np.float32)}
    assert session.run(lower)["accept"].tolist() == [True, True]


def test_another_gate_is_other_bytes_in_the_same_file() -> None:
    data = add_head(passing(), outputs=L, unknown_index=None).SerializeToString()
    patched = patch_scalar(patch_scalar(data, "threshold", 2.5), "gate_score", 2)
    assert len(patched) == len(data)
    out = Session(patched).run(feed(np.array([[0, 2, 0, 0, 0], [0, 3, 0, 0, 0]], np.float32)))
    np.testing.assert_array_equal(out["score"], out["score_mls"])
    assert out["accept"].tolist() == [False, True]


@pytest.mark.parametrize("unknown_index", [None, 0, 4])
def test_a_gate_by_class_is_other_bytes_in_the_same_file(unknown_index: int | None) -> None:
    data = add_head(passing(), outputs=L, unknown_index=unknown_index).SerializeToString()
    known = [i for i in range(L) if i != unknown_index]
    bars = np.arange(len(known), dtype=np.float32)  # class i is accepted from i on
    patched = patch_vector(patch_scalar(data, "threshold", np.nan), "thresholds", bars)
    patched = patch_scalar(patched, "gate_score", 2)
    assert len(patched) == len(data)
    logits = np.full((2 * len(known), L), -9, np.float32)
    for i, column in enumerate(known):
        logits[2 * i, column] = i
        logits[2 * i + 1, column] = np.nextafter(np.float32(i), np.float32(-9))
    session = Session(patched)
    out = session.run(feed(logits))
    assert out["label"].tolist() == [i for i in range(len(known)) for _ in range(2)]
    np.testing.assert_array_equal(out["accept"], [True, False] * len(known))
    # A scalar fed overrides all of them; NaN is none.
    for fed, expected in ((2.0, logits.max(axis=1) >= 2), (np.nan, out["accept"])):
        given = {**feed(logits), "threshold": np.array(fed, np.float32)}
        np.testing.assert_array_equal(session.run(given)["accept"], expected)
    logits[:] = np.nan
    assert not session.run(feed(logits))["accept"].any()


def test_a_new_graph_holds_its_threshold_for_every_class() -> None:
    data = add_head(passing(), outputs=L, unknown_index=4, threshold=1.5).SerializeToString()
    assert read_scalar(data, "threshold") == 1.5
    assert read_vector(data, "thresholds").tolist() == [1.5] * 4
    data = add_head(passing(), outputs=L, unknown_index=None).SerializeToString()
    assert read_vector(data, "thresholds").tolist() == [np.inf] * 5


def test_outputs_are_in_order_and_typed() -> None:
    model = add_head(passing(), outputs=L, unknown_index=4)
    assert [value.name for value in model.graph.output] == [
        "label",
        "accept",
        "score",
        "logits",
        "score_msp",
        "score_ebo",
        "score_mls",
        "score_unknown",
    ]
    assert [value.name for value in model.graph.input] == ["input", "threshold"]
    out = HEADS[4].run(feed(np.zeros((1, L), np.float32)))
    assert (out["label"].dtype, out["accept"].dtype) == (np.int64, np.bool_)


def test_fitted_scores_come_behind_the_plain_ones_in_one_order() -> None:
    assert carried_scores(None) == ("msp", "ebo", "mls")
    assert carried_scores(4, ("klm", "gen")) == ("msp", "ebo", "mls", "unknown", "gen", "klm")
    fitted = [gen(unknown=4)]
    model = add_head(passing(), outputs=L, unknown_index=4, fitted=fitted, gate_score="gen")
    names = [value.name for value in model.graph.output]
    assert names[3:] == [
        "logits",
        *(f"score_{name}" for name in ("msp", "ebo", "mls", "unknown", "gen")),
    ]
    out = Session(model).run(feed(np.eye(L, dtype=np.float32)))
    np.testing.assert_array_equal(out["score"], out["score_gen"])


def test_no_body_may_use_a_name_of_the_head() -> None:
    for unknown_index in (None, 4):
        fitted = [gen(unknown=-1 if unknown_index is None else 4)]
        model = add_head(
            passing(), outputs=L, unknown_index=unknown_index, fitted=fitted, p_values=True
        )
        made = {name for node in model.graph.node for name in node.output}
        made |= {tensor.name for tensor in model.graph.initializer}
        assert {name for name in made if not name.startswith("head/")} <= RESERVED
    for name in SCORE_TABLE:
        assert {f"score_{name}", f"p_{name}"} <= RESERVED


def calibrated(scores: NDArray[np.float32], unknown_index: int | None = None) -> bytes:
    """A graph whose p-values are of these scores, S rows of n <= 1024 each."""
    model = add_head(passing(), outputs=L, unknown_index=unknown_index, p_values=True)
    data = model.SerializeToString()
    rows, n = scores.shape
    kept = np.full((rows, WIDTH), np.inf, np.float32)
    kept[:, :n] = np.sort(scores, axis=1)
    levels = np.ones((rows, WIDTH + 1), np.float32)
    levels[:, : n + 1] = (1 + np.arange(n + 1)) / (n + 1)
    for name, values in (("p_scores", kept), ("p_levels", levels)):
        found = find_initializer(data, name)
        assert found.dims == values.shape
        end = found.offset + found.length
        data = data[: found.offset] + values.tobytes() + data[end:]
    return data


@given(
    hnp.arrays(np.float32, (3, 40), elements=st.floats(-3, 3, width=32)),
    hnp.arrays(np.float32, (6, L), elements=st.floats(-3, 3, width=32)),
)
@settings(max_examples=25, deadline=None)
def test_p_values_count_the_calibration_scores_that_are_at_most_it(
    scores: NDArray[np.float32], logits: Logits
) -> None:
    session = Session(calibrated(scores))
    out = session.run(feed(logits))
    scores[:, : len(logits)] = [out[f"score_{name}"] for name in ("msp", "ebo", "mls")]  # ties
    out = Session(calibrated(scores)).run(feed(logits))
    for row, name in zip(scores, ("msp", "ebo", "mls"), strict=True):
        below = (row[None] <= out[f"score_{name}"][:, None]).sum(axis=1)
        np.testing.assert_array_equal(out[f"p_{name}"], np.float32((1 + below) / 41))
        assert out[f"p_{name}"].dtype == np.float32


def test_p_values_of_no_number_and_of_a_graph_not_calibrated() -> None:
    logits = np.zeros((2, L), np.float32)
    logits[1] = np.nan
    new = add_head(passing(), outputs=L, unknown_index=4, p_values=True)
    onnx.checker.check_model(new, full_check=True)
    names = [value.name for value in new.graph.output]
    assert names[-8:] == [
        f"{kind}_{name}" for kind in ("score", "p") for name in ("msp", "ebo", "mls", "unknown")
    ]
    out = Session(new).run(feed(logits))
    for name in ("msp", "ebo", "mls", "unknown"):
        assert np.isnan(out[f"p_{name}"]).all()
    scores = np.full((4, 9), -np.inf, np.float32)
    out = Session(calibrated(scores, 4)).run(feed(logits))
    for name in ("msp", "ebo", "mls", "unknown"):
        np.testing.assert_array_equal(out[f"p_{name}"], np.float32([1, 0.1]))


def test_wrong_use_is_named() -> None:
    with pytest.raises(UsageError, match="carries the score ebo; it is not fitted"):
        carried_scores(None, ("ebo",))
    with pytest.raises(UsageError, match=r"no score called odin.*temperature, gen"):
        carried_scores(None, ("odin",))
    with pytest.raises(UsageError, match="the score gen is given twice"):
        add_head(passing(), outputs=L, unknown_index=4, fitted=[gen(unknown=4)] * 2)
    with pytest.raises(UsageError, match="no output but the unknown class"):
        add_head(passing(1), outputs=1, unknown_index=0)
    with pytest.raises(UsageError, match=r"unknown cannot be had.*msp, ebo, mls"):
        add_head(passing(), outputs=L, unknown_index=None, gate_score="unknown")
    with pytest.raises(UsageError, match="outside the 5 logits"):
        add_head(passing(), outputs=L, unknown_index=5)
    with pytest.raises(ExportError, match="does not end in a linear layer"):
        add_head(passing(), outputs=L, unknown_index=None, features=True)


def test_features_are_what_the_last_layer_reads() -> None:
    weight = np.eye(L, dtype=np.float32) * 2
    body = passing()
    body.graph.node[0].output[0] = "flat"
    body.graph.node.append(helper.make_node("MatMul", ["flat", "w"], ["logits"]))
    body.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model = add_head(body, outputs=L, unknown_index=None, features=True)
    logits = np.arange(L, dtype=np.float32)[None]
    out = Session(model).run(feed(logits))
    np.testing.assert_array_equal(out["features"], logits)
    np.testing.assert_array_equal(out["logits"], logits * 2)


def test_pixels_are_normalised_bit_for_bit() -> None:
    preprocess = Preprocess(crop=(1, 1), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = np.random.default_rng(0).integers(0, 256, (300, 1, 1, 3), dtype=np.uint8)
    model = add_normalisation(add_head(passing(3), outputs=3, unknown_index=None), preprocess)
    onnx.checker.check_model(model, full_check=True)
    got = Session(model).run({"input": pixels})["logits"]
    np.testing.assert_array_equal(got, preprocess.normalise(pixels)[:, :, 0, 0])
