"""The file of plans: what is written is read, and whatever else is written does no harm."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moon.errors import BundleError
from moon.runtime.sparse import worth
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.plan import Plan
from moon.runtime.sparse.tuning import (
    Measured,
    Target,
    Tuned,
    Tuning,
    Verdict,
    file_name,
    is_tuning,
)

from .graphs import Graph

TARGET = Target("znver4", "avx512", "ab" * 32, "cd" * 32)
PLAN = {"tile": 4, "together": 1, "reading": "shift", "block": 64}


def tuned(
    plans: dict[str, dict[str, Any]] | None = None, verdict: Verdict = "sparse", threads: int = 1
) -> Tuned:
    measured = Measured(default_ms=2.0, tuned_ms=1.5, onnxruntime_ms=None, layers={"y": (9.0, 8.0)})
    given = {"y": PLAN} if plans is None else plans
    return Tuned(threads=threads, plans=given, verdict=verdict, measured=measured)


def tuning(**batches: Tuned) -> Tuning:
    found = {int(name[1:]): one for name, one in batches.items()}
    return Tuning(target=TARGET, moon="0.1.0", batches=found or {1: tuned()})


def test_what_is_written_is_read() -> None:
    one = tuning(n8=tuned(threads=2), n1=tuned())
    data = one.to_bytes()
    assert Tuning.from_bytes(data) == one
    assert data == tuning(n1=tuned(), n8=tuned(threads=2)).to_bytes()
    assert one.plans(8) == {"y": Plan(**PLAN)} and one.plans(2) == {}


def test_names_of_files() -> None:
    assert file_name("znver4", "avx2") == "engines/sparse-znver4-avx2.json"
    odd = file_name("../a b/ü", "sse")
    assert odd == "engines/sparse-..-a-b---sse.json" and is_tuning(odd)
    for name in ("engines/trt.json", "engines/sparse-a/b.json", "sparse-a.json", "gate.json"):
        assert not is_tuning(name)


def test_a_verdict_hands_over_where_all_say_so() -> None:
    slow = tuned(verdict="onnxruntime")
    assert tuning(n1=slow, n8=slow).hands_over
    assert not tuning(n1=slow, n8=tuned()).hands_over
    assert not Tuning(target=TARGET, moon="", batches={}).hands_over


def test_other_numbers_of_images_are_kept() -> None:
    older = tuning(n1=tuned(threads=4), n8=tuned())
    found = tuning(n1=tuned()).with_batches(older)
    assert sorted(found.batches) == [1, 8] and found.batches[1].threads == 1
    other = Tuning(target=Target("x", "sse", "", ""), moon="", batches=older.batches)
    assert sorted(tuning(n1=tuned()).with_batches(other).batches) == [1]


def test_what_differs_is_named() -> None:
    assert TARGET.differs(TARGET) == ""
    assert TARGET.differs(Target("a", "avx512", "b", "c")) == "another CPU"
    assert TARGET.differs(Target("znver4", "avx2", "", "")) == "another instruction set"
    other = Target("znver4", "avx512", "", TARGET.model)
    assert TARGET.differs(other) == "another version of the engine"
    assert TARGET.differs(Target("znver4", "avx512", TARGET.kernels, "")) == "another model"


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    plain = copy.deepcopy(json.loads(tuning().to_bytes()))
    change(plain)
    return json.dumps(plain).encode()


def plan_of(plain: dict[str, Any]) -> dict[str, Any]:
    plan: dict[str, Any] = plain["batches"]["1"]["plans"]["y"]
    return plan


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "schema": lambda p: p.update(schema_version=2),
    "a true schema": lambda p: p.update(schema_version=True),
    "no cpu": lambda p: p.pop("cpu"),
    "more fields": lambda p: p.update(code="rm"),
    "a list of batches": lambda p: p.update(batches=[]),
    "a batch of zero": lambda p: p["batches"].update({"0": p["batches"]["1"]}),
    "a batch of many digits": lambda p: p["batches"].update({"9" * 5000: p["batches"]["1"]}),
    "a batch with a sign": lambda p: p["batches"].update({"+1": p["batches"]["1"]}),
    "a verdict": lambda p: p["batches"]["1"].update(verdict="run"),
    "a time of text": lambda p: p["batches"]["1"]["measured"].update(tuned_ms="1"),
    "one time": lambda p: p["batches"]["1"]["measured"]["layers_us"].update(y=[1]),
    "a tile of text": lambda p: plan_of(p).update(tile="4"),
    "a tile of half": lambda p: plan_of(p).update(tile=0.5),
    "a true tile": lambda p: plan_of(p).update(tile=True),
    "a tile of none": lambda p: plan_of(p).update(tile=0),
    "a block without end": lambda p: plan_of(p).update(block=1 << 80),
    "a block below": lambda p: plan_of(p).update(block=-1),
    "a reading": lambda p: plan_of(p).update(reading="../x"),
    "a field of a plan": lambda p: plan_of(p).update(kernel="conv"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_plan_is_refused(what: str) -> None:
    assert Tuning.from_bytes(changed(lambda plain: None))
    with pytest.raises(BundleError):
        Tuning.from_bytes(changed(HOSTILE[what]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{" * 10 + b"}" * 10,
        b"1" * 6000,
        b" " * ((1 << 24) + 1),
        b'{"schema_version": NaN}',
        b"[]",
    ],
    ids=range(8),
)
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        Tuning.from_bytes(data)


READINGS = ("direct", "frame", "shift", "rows", "gather")


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 16, 1 << 30])
def test_plans_that_cannot_be_are_passed_over(reading: str, together: int, tile: int) -> None:
    graph = Graph(12, 24, 24)
    y = graph.add("Relu", graph.conv("x", 20, 12))
    graph.conv(y, 8, 20, 3, strides=[2, 2])
    x = graph.images(2)
    expected = SparseEngine(graph.data(), force=True).run(x)
    for block in (1, 1 << 30):
        plan = {"tile": tile, "together": together, "reading": reading, "block": block}
        given = tuning(n2=tuned(dict.fromkeys(["t1", "t2", "gone"], plan)))
        found = SparseEngine(graph.data(), force=True, tuning=given).run(x)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_columns_too_far_away_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only building the convolution finds it, and not ``sound``."""
    from moon.runtime.sparse import program

    graph = Graph(4, 8, 8)
    graph.conv("x", 8, 4)
    x, real, refused = graph.images(1), program.Convolution, []

    def fussy(weights: Any, bias: Any, geometry: Any, plan: Plan, **options: Any) -> Any:
        if plan.block == 3:
            refused.append(plan)
            raise ValueError("a column lies too far away")
        return real(weights, bias, geometry, plan, **options)

    monkeypatch.setattr(program, "Convolution", fussy)
    plans = {"t0": {"tile": 1, "together": 1, "reading": "shift", "block": 3}}
    engine = SparseEngine(graph.data(), force=True, tuning=tuning(n1=tuned(plans)))
    assert refused and engine.isa
    np.testing.assert_allclose(
        engine.run(x), SparseEngine(graph.data(), force=True).run(x), rtol=1e-5, atol=1e-5
    )


def test_plans_serve_one_number_of_images_and_any_number_of_threads() -> None:
    graph = Graph(3, 9, 9)
    graph.conv("x", 8, 3)
    plan = {"tile": 2, "together": 1, "reading": "shift", "block": 5}
    given, x = tuning(n2=tuned({"t0": plan}, threads=2)), graph.images(2)
    one = SparseEngine(graph.data(), force=True, tuning=given)
    assert [layer.plan for layer in one.profile(x, runs=1).layers] == [plan]
    assert [layer.plan for layer in one.profile(x[:1], runs=1).layers] != [plan]
    for threads in (2, 3):
        other = SparseEngine(graph.data(), threads=threads, force=True, tuning=given)
        assert np.array_equal(other.run(x), one.run(x))


def test_a_verdict_is_followed_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worth, "LEAST_SAVED", 0)
    graph = Graph(64, 8, 8)
    graph.conv("x", 64, 64)
    given = tuning(n1=tuned(verdict="onnxruntime"))
    assert SparseEngine(graph.data(), force=True, tuning=given).isa
    assert SparseEngine(graph.data(), tuning=tuning()).isa
    told: list[str] = []
    handed = SparseEngine(graph.data(), tuning=given, warn=told.append)
    assert handed.isa == "" and "faster when both were measured" in handed.handed_over
    assert "faster when both were measured" in told[0]
