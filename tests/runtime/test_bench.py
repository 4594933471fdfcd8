from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moon.bundle import Bundle
from moon.errors import BackendError, MoonError, UsageError
from moon.runtime.bench import bench
from moon.runtime.bench_compare import compare
from moon.runtime.bench_host import EnergyMeter, Watch, host
from moon.runtime.bench_stats import drift, histogram, ratio, summary, unpaired_ratio
from moon.runtime.bench_subject import filled_model, load
from moon.runtime.unpack import weights
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("b") / "tiny", size=16)


@pytest.fixture(scope="module")
def result(bundle: Bundle) -> dict[str, Any]:
    return bench(bundle, queries=96)


def test_the_result_has_the_promised_fields_and_is_json(result: dict[str, Any]) -> None:
    promised = (
        "schema_version model backend host gpu config build_ms load_ms first_inference_ms "
        "latency_ms throughput energy baseline speedup parity warnings"
    )
    assert set(promised.split()) <= set(result)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["latency_ms"]) == {"min", "mean", "p50", "p90", "p95", "p99", "max", "n"}
    assert set(result["model"]) >= {
        "name",
        "sha256",
        "params",
        "nnz",
        "sparsity",
        "pattern",
        "bytes",
    }
    assert set(result["backend"]) >= {"name", "version", "provider", "precision", "sparse_layers"}
    assert set(result["host"]) >= {"cpu", "isa", "cores", "affinity", "governor", "load"}
    assert set(result["parity"]) >= {"max_abs", "top1_agreement", "gate_agreement"}


def test_the_figures_agree_with_each_other(result: dict[str, Any]) -> None:
    latency = result["latency_ms"]
    order = [latency[name] for name in ("min", "p50", "p90", "p95", "p99", "max")]
    assert order == sorted(order) and order[0] > 0
    assert latency["n"] == 96 == sum(result["latency_histogram"]["counts"])
    assert len(result["block_p50_ms"]) == result["config"]["rounds"] == 32
    assert 0 < result["throughput"] <= 1.05e3 / latency["mean"]
    assert result["parity"]["max_abs"] == 0 and result["parity"]["gate_agreement"] == 1
    low, high = result["speedup"]["ci95"]
    assert low <= result["speedup"]["ratio"] <= high
    medians = np.array(result["baseline"]["block_p50_ms"]) / result["block_p50_ms"]
    assert result["speedup"]["ratio"] == pytest.approx(np.exp(np.log(medians).mean()))
    assert result["baseline"]["name"] == "dense" and result["baseline"]["latency_ms"]["n"] == 96


def test_what_was_not_measured_is_null_with_its_reason(result: dict[str, Any]) -> None:
    for name in ("build_ms", "host_to_device_ms", "gpu"):
        assert result[name] is None and result["unavailable"][name]
    assert (result["energy"] is None) == ("energy" in result["unavailable"])


def test_too_few_queries_are_not_valid(result: dict[str, Any]) -> None:
    assert not result["valid"]
    assert any("96 queries are fewer than 1024" in line for line in result["warnings"])


def test_measuring_one_thing_twice_finds_no_speedup(bundle: Bundle) -> None:
    # Blocks alternate, so even a machine that is busy elsewhere slows both alike.
    found = bench(bundle, queries=960, baseline="onnxruntime")["speedup"]
    assert found["ratio"] == pytest.approx(1, abs=0.25)


class Clock:
    """Time that passes only when somebody waits or works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-7  # or spinning would never end
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Timed:
    """A backend that takes a known time by such a clock."""

    def __init__(self, inner: Any, clock: Clock, seconds: float) -> None:
        self._inner, self._clock, self._seconds = inner, clock, seconds
        self.name, self.outputs = inner.name, inner.outputs

    def run(self, batch: Any, threshold: float | None = None) -> Any:
        self._clock.sleep(self._seconds)
        return self._inner.run(batch, threshold)

    def info(self) -> Any:
        return self._inner.info()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("moon.runtime.bench_subject.time", made)

    def timed(name: str, *args: Any, **kwargs: Any) -> Any:
        subject = load(name, *args, **kwargs)
        subject.backend = Timed(subject.backend, made, 0.003 if name == "dense" else 0.001)
        return subject

    monkeypatch.setattr("moon.runtime.bench.load", timed)
    return made


def test_a_slower_baseline_is_a_speedup(bundle: Bundle, clock: Clock) -> None:
    found = bench(bundle, queries=64)
    assert found["speedup"]["ratio"] == pytest.approx(3, rel=0.01)
    assert found["speedup"]["ci95"] == pytest.approx([3, 3], rel=0.01)
    assert found["latency_ms"]["p50"] == pytest.approx(1, rel=0.01)
    assert found["baseline"]["latency_ms"]["p50"] == pytest.approx(3, rel=0.01)
    assert found["throughput"] == pytest.approx(1000, rel=0.01)
    assert found["baseline"]["throughput"] == pytest.approx(333.3, rel=0.01)


def test_the_usual_rate_is_half_of_what_the_slowest_can_do(bundle: Bundle, clock: Clock) -> None:
    found = bench(bundle, queries=64, scenario="rate")
    assert found["config"]["rate"] == pytest.approx(0.5 / 0.003, rel=0.01)
    assert found["throughput"] == pytest.approx(0.5 / 0.003, rel=0.01)
    assert found["latency_ms"]["max"] == pytest.approx(1, rel=0.01)  # nobody ever waits


def test_open_loop_latency_counts_from_when_a_query_was_due(bundle: Bundle, clock: Clock) -> None:
    found = bench(bundle, queries=320, scenario="rate", rate=1250.0, baseline="none")
    # Blocks of ten: due every 0.8 ms and done in 1, so the queue grows by 0.2 ms a query.
    assert found["latency_ms"]["min"] == pytest.approx(1, rel=0.01)
    assert found["latency_ms"]["max"] == pytest.approx(1 + 9 * 0.2, rel=0.01)
    assert any("could not keep up with 1250.0" in line for line in found["warnings"])


def test_drift_is_flagged(bundle: Bundle, clock: Clock) -> None:
    def slower(done: int, total: int, what: str) -> None:
        clock.sleep(0)
        if done == total // 2:
            Timed.run = slow  # type: ignore[method-assign]

    def slow(self: Timed, batch: Any, threshold: float | None = None) -> Any:
        clock.sleep(0.0002)
        return quick(self, batch, threshold)

    quick = Timed.run
    try:
        found = bench(bundle, queries=64, baseline="none", progress=slower)
    finally:
        Timed.run = quick  # type: ignore[method-assign]
    assert found["drift"] == pytest.approx(0.2, rel=0.01)
    assert any("onnxruntime drifted by +20.0%" in line for line in found["warnings"])


def test_scenarios(bundle: Bundle) -> None:
    multi = bench(bundle, queries=32, scenario="multi", baseline="none")
    assert multi["config"]["samples"] == 8 and multi["speedup"] is None
    assert multi["baseline"] is None
    assert multi["throughput"] > 7e3 / multi["latency_ms"]["max"]
    rate = bench(bundle, queries=64, scenario="rate", rate=200.0, baseline="none")
    assert rate["config"]["rate"] == 200.0
    assert 20 < rate["throughput"] <= 200.1
    found = bench(bundle, queries=64, scenario="rate", rate=1e6, baseline="none")
    assert any("could not keep up" in line for line in found["warnings"])


def test_an_uncalibrated_bundle_is_measured_too(tmp_path: Path) -> None:
    found = bench(make_bundle(tmp_path / "b", calibrated=False), queries=32)
    assert found["parity"]["gate_agreement"] is None and found["parity"]["within"]
    assert found["speedup"]["ratio"] > 0


def test_several_backends_stand_beside_the_first(bundle: Bundle) -> None:
    found = bench(bundle, queries=32, backends=["onnxruntime", "fake"])
    assert found["backend"]["name"] == "onnxruntime"
    assert [other["backend"]["name"] for other in found["others"]] == ["fake"]
    assert found["others"][0]["speedup"]["ratio"] > 0
    assert not found["others"][0]["parity"]["within"]  # it makes its outputs up


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scenario": "burst"}, UsageError, "no scenario is called burst"),
        ({"batch": 0}, UsageError, "1 or more"),
        ({"queries": 0}, UsageError, "1 or more"),
        ({"backends": []}, UsageError, "one or more different"),
        ({"rate": 5.0}, UsageError, "needs the scenario rate"),
        ({"rate": -1.0, "scenario": "rate"}, UsageError, "positive"),
        ({"batch": 4, "scenario": "multi"}, UsageError, "always has 8"),
        ({"backends": ["tensorrt"]}, MoonError, "TensorRT"),
        ({"baseline": "torch"}, BackendError, "not in this version"),
        ({"baseline": "nope"}, BackendError, "no backend is called nope"),
    ],
)
def test_wrong_use(bundle: Bundle, arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        bench(bundle, **arguments)


def test_the_dense_baseline_has_no_zeros_and_the_same_rest(bundle: Bundle) -> None:
    model = bundle.model_bytes()
    filled = filled_model(model)
    before, after = weights(model), weights(filled)
    assert before.keys() == after.keys()
    for name, old in before.items():
        new, kept = after[name], old != 0
        assert np.all(new != 0) and np.array_equal(new[kept], old[kept])
        assert np.std(new[~kept]) == pytest.approx(np.std(old[kept]), rel=0.4)
    ops = [[n.op_type for n in onnx.load_model_from_string(m).graph.node] for m in (model, filled)]
    assert [op for op in ops[0] if op != "Constant"] == [op for op in ops[1] if op != "Constant"]


def test_statistics_by_hand() -> None:
    found = summary([4.0, 1.0, 3.0, 2.0])
    assert (found["min"], found["p50"], found["p90"], found["max"]) == (1, 2, 4, 4)
    assert (found["mean"], found["n"]) == (2.5, 4)
    assert summary(np.arange(1, 101))["p99"] == 99
    assert drift([1, 1, 1, 1.1, 1.1, 1.1]) == pytest.approx(0.1)
    assert drift([1.0]) == 0
    assert ratio([2, 4, 6], [1, 2, 3]) == {
        "ratio": pytest.approx(2), "ci95": [pytest.approx(2)] * 2,
    }  # fmt: skip
    assert sum(histogram([1.0, 1.0, 5.0])["counts"]) == 3
    assert sum(histogram([2.0])["counts"]) == 1


def test_a_slow_stretch_of_the_machine_does_not_move_a_paired_ratio() -> None:
    rng = np.random.default_rng(0)
    machine = np.where(np.arange(32) > 20, 3.0, 1.0)
    noise = rng.normal(1, 0.01, (2, 32))
    paired = ratio(2 * machine * noise[0], machine * noise[1])
    assert paired["ratio"] == pytest.approx(2, rel=0.01)
    assert paired["ci95"][1] - paired["ci95"][0] < 0.05


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        noise = np.exp(rng.normal(0, 0.1, (2, 32)))
        low, high = ratio(1.5 * noise[0], noise[1], seed=seed)["ci95"]
        hits += low <= 1.5 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_comparing_results(result: dict[str, Any]) -> None:
    same = compare(result, result)
    assert same["speedup"]["ratio"] == pytest.approx(1) and same["differences"] == []
    assert not same["comparable"] and same["invalid"] == ["a", "b"]  # too few queries
    good = {**result, "valid": True}
    half = {
        **good,
        "latency_ms": {k: v / 2 for k, v in good["latency_ms"].items()},
        "block_p50_ms": [v / 2 for v in good["block_p50_ms"]],
        "throughput": 2 * good["throughput"],
    }
    faster = compare(good, half)
    assert faster["speedup"]["ratio"] == pytest.approx(2) and faster["comparable"]
    assert faster["latency_ms"]["p90"]["ratio"] == pytest.approx(2)
    assert faster["throughput"]["ratio"] == pytest.approx(2)
    other = {
        **good,
        "config": {**good["config"], "threads": 4},
        "host": {**good["host"], "cpu": "Z"},
    }
    assert not compare(good, other)["comparable"]
    assert [line.split(":")[0] for line in compare(good, other)["differences"]] == [
        "threads", "host cpu",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="not a result of moon bench"):
        compare(good, {"schema_version": 1})
    assert unpaired_ratio([2.0] * 5, [1.0] * 7)["ci95"] == [pytest.approx(2)] * 2


def test_the_host_and_what_disturbs_it() -> None:
    facts = host()
    assert facts["cores"] >= 1 and facts["cpu"]
    watch = Watch()
    found = watch.stop()
    assert found.other_cpu is None or 0 <= found.other_cpu <= 1


def test_energy_counters_that_wrap_are_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("10000000\n")
    (zone / "energy_uj").write_text("9000000\n")
    monkeypatch.setattr("moon.runtime.bench_host._RAPL", tmp_path)
    meter = EnergyMeter()
    assert meter.readable
    before = meter.read()
    (zone / "energy_uj").write_text("2000000\n")
    assert meter.since(before) == pytest.approx(3.0)
    (zone / "energy_uj").unlink()
    assert not EnergyMeter().readable and "may not be read" in EnergyMeter().reason
