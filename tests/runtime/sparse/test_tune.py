"""Tuning: plans that are found are kept, sound and right."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moon.calibrated import model_hash
from moon.errors import UsageError
from moon.runtime.sparse import program
from moon.runtime.sparse import tune as tuner
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.isa import target
from moon.runtime.sparse.plan import Plan
from moon.runtime.sparse.sample import sample
from moon.runtime.sparse.trial import Stage, by_turns
from moon.runtime.sparse.tune import clearly, tune
from moon.runtime.sparse.tuning import Tuning

from .graphs import Graph, reference


def network() -> Graph:
    graph = Graph(3, 12, 12)
    y = graph.add("Relu", graph.conv("x", 16, 3))
    y = graph.add("Relu", graph.add("Add", y, graph.conv(y, 16, 16)))
    y = graph.conv(y, 16, 16, strides=[2, 2])
    graph.add("Softmax", graph.add("Flatten", y), axis=1)
    return graph


@pytest.fixture(scope="module")
def found(engine_cache: None) -> tuple[bytes, Tuning]:
    data = network().data()
    return data, tune(data, batch=2, threads=2, force=True, budget=1.0)


def test_every_convolution_has_a_plan_and_times(found: tuple[bytes, Tuning]) -> None:
    data, tuning = found
    cpu, _ = target()
    assert tuning.target.cpu == cpu and tuning.target.model == model_hash(data)
    assert sorted(tuning.batches) == [2]
    tuned = tuning.batches[2]
    assert tuned.threads == 2 and tuned.verdict in ("sparse", "onnxruntime")
    engine = SparseEngine(data, force=True)
    layers = [one.tensor for one in engine.profile(network().images(2), runs=1).layers if one.plan]
    assert sorted(tuned.plans) == sorted(tuned.measured.layers) == sorted(layers)
    assert len(layers) == 3
    assert min(tuned.measured.default_ms, tuned.measured.onnxruntime_ms or 1) > 0
    for before, after in tuned.measured.layers.values():
        assert 0 < after <= before
    assert Tuning.from_bytes(tuning.to_bytes()).batches[2].plans == tuned.plans


def test_results_agree_and_threads_change_no_bit(found: tuple[bytes, Tuning]) -> None:
    data, tuning = found
    x = network().images(2)
    one = SparseEngine(data, force=True, tuning=tuning).run(x)
    np.testing.assert_allclose(one, reference(data, x)[0], rtol=1e-4, atol=1e-6)
    assert np.array_equal(SparseEngine(data, threads=2, force=True, tuning=tuning).run(x), one)
    plans = tuning.batches[2].plans
    engine = SparseEngine(data, force=True, tuning=tuning)
    used = {layer.tensor: layer.plan for layer in engine.profile(x, runs=1).layers if layer.plan}
    assert used == plans


def made_up(monkeypatch: pytest.MonkeyPatch, fast: Plan, seconds: float) -> None:
    """Layers take a millisecond each, and with one plan other seconds."""
    prepared = Stage.prepared

    def prepare(self: Stage, plans: dict[str, Plan]) -> object:
        use = prepared(self, plans)

        def told() -> None:
            use()
            self.plans = plans  # type: ignore[attr-defined]

        return told

    def run(self: Stage) -> dict[str, float]:
        plans = self.plans  # type: ignore[attr-defined]
        return {name: seconds if one == fast else 1e-3 for name, one in plans.items()}

    monkeypatch.setattr(Stage, "prepared", prepare)
    monkeypatch.setattr(Stage, "run", run)
    monkeypatch.setattr(Stage, "seconds", lambda self: sum(run(self).values()))
    monkeypatch.setattr(tuner, "_whole", lambda model, engine, batch: None)


@pytest.mark.parametrize(("seconds", "kept"), [(5e-4, True), (0.985e-3, False), (2e-3, False)])
def test_only_what_is_clearly_better_is_kept(
    monkeypatch: pytest.MonkeyPatch, seconds: float, kept: bool
) -> None:
    graph = Graph(3, 8, 8)
    graph.conv("x", 8, 3)
    engine = SparseEngine(graph.data(), force=True)
    (own,) = [one.plan for one in engine.profile(graph.images(1), runs=1).layers]
    listed = [plan for _, plan in _candidates(engine) if plan.to_json() != own and plan.tile > 1]
    made_up(monkeypatch, listed[0], seconds)
    tuned = tune(graph.data(), force=True, budget=0.5).batches[1]
    assert (tuned.plans["t0"] == listed[0].to_json()) is kept
    assert (tuned.plans["t0"] == own) is not kept
    assert tuned.measured.onnxruntime_ms is None and tuned.verdict == "sparse"


def _candidates(engine: SparseEngine) -> list[tuple[float, Plan]]:
    from moon.runtime.sparse.conv_weights import ConvWeights
    from moon.runtime.sparse.costs import candidates

    (ready,) = engine.parts[0].programs.values()  # type: ignore[union-attr]
    ((step, _),) = ready.steps
    _, geometry = ready.convolutions["t0"]
    weights = ConvWeights(step.weight, step.groups).summary(geometry)  # type: ignore[union-attr]
    assert engine.machine is not None
    return candidates(geometry, weights, engine.machine.costs)


def test_what_is_clear() -> None:
    base = np.full(9, 1.0)
    assert clearly(0.9 * base, base) and not clearly(0.98 * base, base)
    noisy = 0.9 * base * np.linspace(0.7, 1.5, 9)
    assert not clearly(noisy, base)


def test_turns_alternate_and_the_least_counts() -> None:
    order: list[int] = []

    def side(i: int):  # type: ignore[no-untyped-def]
        times = iter(range(1, 1000))

        def ready():  # type: ignore[no-untyped-def]
            order.append(i)
            return lambda: {"a": float(next(times))}

        return ready

    first, second = by_turns([side(0), side(1)], 0.0, 3)
    assert order == [0, 1, 1, 0, 0, 1]
    # Of four runs of a turn the first finds other caches.
    assert first["a"].tolist() == second["a"].tolist() == [2.0, 6.0, 10.0]


def test_convolutions_are_made_once_while_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(3, 8, 8)
    graph.conv("x", 8, 3)
    engine = SparseEngine(graph.data(), force=True)
    stage, made, real = Stage(engine, sample(engine, 1)), [], program.Convolution

    def counted(weights: Any, bias: Any, geometry: Any, plan: Plan, **options: Any) -> Any:
        made.append(plan)
        return real(weights, bias, geometry, plan, **options)

    monkeypatch.setattr(program, "Convolution", counted)
    plans = {"t0": Plan(tile=1, together=1, reading="shift", block=9)}
    expected = engine.run(graph.images(1))
    for _ in range(2):
        stage.prepared(plans)()
        np.testing.assert_allclose(engine.run(graph.images(1)), expected, rtol=1e-5, atol=1e-5)
    assert made == list(plans.values())
    stage.kept.only([])
    stage.prepared(plans)
    assert len(made) == 2


def test_progress_is_told() -> None:
    told: list[tuple[int, int, str]] = []
    tune(network().data(), force=True, budget=0.3, progress=lambda *one: told.append(one))
    assert {what for *_, what in told} == {"trying plans", "comparing", "comparing whole runs"}
    assert all(0 <= done <= total == 1 for done, total, _ in told)


def test_what_cannot_be_tuned_is_named() -> None:
    graph = Graph(3, 8, 8)
    graph.conv("x", 8, 3)
    with pytest.raises(UsageError, match="nothing to tune: ONNX Runtime runs the whole model: it"):
        tune(graph.data())
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="budget"):
            tune(graph.data(), force=True, budget=budget)
    with pytest.raises(UsageError, match="0 images"):
        tune(graph.data(), force=True, batch=0)
    fixed = Graph(3, 8, 8, batch=4)
    fixed.conv("x", 8, 3)
    with pytest.raises(UsageError, match="for 4 images at a time, not 1"):
        tune(fixed.data(), force=True)


def test_samples_are_what_a_model_takes() -> None:
    graph = Graph(3, 8, 8)
    graph.conv("x", 8, 3)
    x = sample(SparseEngine(graph.data(), force=True), 3)["x"]
    assert x.shape == (3, 3, 8, 8) and x.dtype == np.float32 and np.isfinite(x).all()


def test_findings_are_json(found: tuple[bytes, Tuning]) -> None:
    plain = json.loads(found[1].to_bytes())
    assert list(plain["batches"]) == ["2"] and plain["schema_version"] == 1
