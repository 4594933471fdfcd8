from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moon.choice import Candidate, Choice, OodSet
from moon.errors import BundleError
from moon.gate import Gate
from moon.gate_calibration import calibrate_conformal

CHOICE = Choice(
    score="msp",
    reason="it is the present score",
    n=40,
    data_sha256="a" * 64,
    source_sha256="b" * 64,
    backend="onnxruntime",
    ood=(
        OodSet(name="noise", group="far", n=40),
        OodSet(name="jigsaw", group="near", n=40, counted=False),
        OodSet(name="x.npz#test", group="given", n=9, data_sha256="c" * 64),
    ),
    candidates=(
        Candidate(score="ebo", auroc=0.9, sets={"noise": 0.9, "jigsaw": 0.5}, behind=0.0,
                  behind_ci95=(0.0, 0.0), tied=True),
        Candidate(score="msp", auroc=0.89, sets={"noise": 0.89, "jigsaw": 0.5}, behind=0.01,
                  behind_ci95=(-0.01, 0.03), tied=True),
    ),
    excluded={"knn": "3 of 40 scores are NaN or infinite"},
)  # fmt: skip


def bad(cause: str) -> BundleError:
    return BundleError(f"gate.json: {cause}")


@pytest.fixture
def gate() -> Gate:
    scores = np.linspace(0, 1, 40, dtype=np.float32)
    return replace(calibrate_conformal(scores, 0.1, score="msp"), choice=CHOICE)


def test_a_gate_keeps_its_choice(gate: Gate) -> None:
    plain = json.loads(json.dumps(gate.to_json(), allow_nan=False))
    assert Gate.from_json(plain) == gate
    assert plain["choice"] == gate.to_json(stored=False)["choice"] == CHOICE.to_json()


def test_a_gate_without_a_choice_reads_as_it_always_did(gate: Gate) -> None:
    plain = replace(gate, choice=None).to_json()
    assert "choice" not in plain
    assert Gate.from_json(plain).choice is None


def test_every_source_that_had_a_part_is_named_once() -> None:
    assert CHOICE.used_sha256 == ("a" * 64, "b" * 64, "c" * 64)
    assert replace(CHOICE, source_sha256="a" * 64).used_sha256 == ("a" * 64, "c" * 64)


def test_the_gates_score_is_the_one_chosen(gate: Gate) -> None:
    with pytest.raises(BundleError, match="the score ebo is not the one chosen, msp"):
        replace(gate, score="ebo")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("score",), "mls", "the score mls is none of its candidates"),
        (("score",), 1, "score in choice must be text"),
        (("n",), "many", "n in choice must be a whole number"),
        (("ood",), {}, "ood in choice must be a list"),
        (("ood", 0, "group"), "middle", "noise is not described"),
        (("ood", 0, "counted"), 1, "noise is not described"),
        (("ood", 0, "n"), 0, "noise is not described"),
        (("candidates", 0, "auroc"), "good", "auroc in choice.candidates must be a number"),
        (("candidates", 0, "behind_ci95"), [0.1], "figures of ebo are incomplete"),
        (("candidates", 0, "tied"), "yes", "figures of ebo are incomplete"),
        (("candidates", 0, "sets"), {"noise": None}, "noise in choice.candidates.sets"),
        (("excluded",), {"knn": 3}, "knn in choice.excluded must be text"),
        (("more",), 1, "choice has an unknown field more"),
    ],
)
def test_what_is_wrong_is_refused(path: tuple[Any, ...], value: object, message: str) -> None:
    plain = json.loads(json.dumps(CHOICE.to_json()))
    at = plain
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(BundleError, match=message):
        Choice.from_json(plain, bad)
