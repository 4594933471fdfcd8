from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from moon.bundle import Bundle
from moon.errors import BackendError, MoonError, UsageError
from moon.runtime.backend import open_backend
from moon.runtime.bench import bench
from moon.runtime.bench_result import SCHEMA_FILE
from moon.runtime.bench_settings import Plan, Settings
from moon.runtime.bench_stats import drift, histogram, interval, ratio, summary, unpaired, verdict
from moon.runtime.bench_subject import Subject, filled_model
from moon.runtime.unpack import weights
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("b") / "tiny", size=16)


@pytest.fixture(scope="module")
def result(bundle: Bundle) -> dict[str, Any]:
    return bench(bundle, queries=128, processes=0)


SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def check(found: dict[str, Any]) -> None:
    """The published schema describes every field of a result, and no other."""
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(found)))


def test_the_result_has_the_promised_fields_and_is_json(result: dict[str, Any]) -> None:
    promised = (
        "schema_version model backend host gpu config build_ms load_ms first_inference_ms "
        "latency_ms throughput energy baseline speedup parity warnings"
    )
    assert set(promised.split()) <= set(result)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    check(result)
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
    assert latency["n"] == 128 == sum(result["latency_histogram"]["counts"])
    assert len(result["block_p50_ms"]) == result["config"]["rounds"] == 32
    assert 0 < result["throughput"] <= 1.05e3 / latency["mean"]
    assert result["parity"]["max_abs"] == 0 and result["parity"]["gate_agreement"] == 1
    low, high = result["speedup"]["ci95"]
    assert low <= result["speedup"]["ratio"] <= high
    assert result["block_load"] == np.repeat(range(8), 4).tolist()
    medians = np.array(result["baseline"]["block_p50_ms"]) / result["block_p50_ms"]
    assert result["speedup"]["ratio"] == pytest.approx(np.exp(np.log(medians).mean()))
    assert result["baseline"]["name"] == "dense" and result["baseline"]["latency_ms"]["n"] == 128


def test_what_was_not_measured_is_null_with_its_reason(result: dict[str, Any]) -> None:
    for name in ("build_ms", "host_to_device_ms", "gpu"):
        assert result[name] is None and result["unavailable"][name]
    assert (result["energy"] is None) == ("energy" in result["unavailable"])


def test_too_few_queries_are_not_valid(result: dict[str, Any]) -> None:
    assert not result["valid"]
    assert any("128 queries are fewer than 1024" in line for line in result["warnings"])


def test_measuring_one_thing_twice_finds_no_speedup(bundle: Bundle) -> None:
    # Blocks alternate, so even a machine that is busy elsewhere slows both alike.
    found = bench(bundle, queries=960, baseline="onnxruntime", processes=0)["speedup"]
    assert found["ratio"] == pytest.approx(1, abs=0.25)


class Clock:
    """Time that passes only when somebody waits or works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-7  # or spinning would never end
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Slow:
    """A backend that takes a known time by such a clock."""

    def __init__(self, inner: Any, clock: Clock, seconds: float) -> None:
        self._inner, self._clock, self._seconds = inner, clock, seconds
        self.name, self.outputs = inner.name, inner.outputs

    def run(self, batch: Any, threshold: float | None = None) -> Any:
        self._clock.sleep(self._seconds)
        return self._inner.run(batch, threshold)

    def info(self) -> Any:
        return self._inner.info()


class OnADevice(Slow):
    """One that also tells the parts, and says it has a GPU."""

    def timed(self, batch: Any, threshold: float | None = None) -> Any:
        outputs = self.run(batch, threshold)
        spent = self._seconds * 1e3
        return outputs, SimpleNamespace(
            host_to_device_ms=0.2 * spent, compute_ms=0.5 * spent, device_to_host_ms=0.1 * spent
        )

    def info(self) -> Any:
        gpu = {"name": "Test", "cc": "8.7", "driver": "1.0", "cuda": "13.0"}
        return {**self._inner.info(), "gpu": gpu, "cuda_graph": True}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return _by_clock(monkeypatch, Slow)


def _by_clock(monkeypatch: pytest.MonkeyPatch, kind: type[Slow]) -> Clock:
    """What is measured takes 1 ms, the dense baseline 3."""
    made = Clock()
    monkeypatch.setattr("moon.runtime.bench_subject.time", made)
    monkeypatch.setattr("moon.runtime.bench.time", made)

    def opened(model: Any, *args: Any, **kwargs: Any) -> Any:
        seconds = 0.003 if isinstance(model, bytes) else 0.001
        return kind(open_backend(model, *args, **kwargs), made, seconds)

    monkeypatch.setattr("moon.runtime.bench_subject.open_backend", opened)
    return made


def test_a_slower_baseline_is_a_speedup(bundle: Bundle, clock: Clock) -> None:
    found = bench(bundle, queries=64, processes=0)
    assert found["speedup"]["ratio"] == pytest.approx(3, rel=0.01)
    assert found["speedup"]["ci95"] == pytest.approx([3, 3], rel=0.01)
    assert found["latency_ms"]["p50"] == pytest.approx(1, rel=0.01)
    assert found["baseline"]["latency_ms"]["p50"] == pytest.approx(3, rel=0.01)
    assert found["throughput"] == pytest.approx(1000, rel=0.01)
    assert found["baseline"]["throughput"] == pytest.approx(333.3, rel=0.01)


def test_the_usual_rate_is_half_of_what_the_slowest_can_do(bundle: Bundle, clock: Clock) -> None:
    found = bench(bundle, queries=64, processes=0, scenario="rate")
    assert found["config"]["rate"] == pytest.approx(0.5 / 0.003, rel=0.01)
    assert found["throughput"] == pytest.approx(0.5 / 0.003, rel=0.01)
    assert found["latency_ms"]["max"] == pytest.approx(1, rel=0.01)  # nobody ever waits


def test_open_loop_latency_counts_from_when_a_query_was_due(bundle: Bundle, clock: Clock) -> None:
    found = bench(bundle, queries=320, processes=0, scenario="rate", rate=1250.0, baseline="none")
    # Blocks of ten: due every 0.8 ms and done in 1, so the queue grows by 0.2 ms a query.
    assert found["latency_ms"]["min"] == pytest.approx(1, rel=0.01)
    assert found["latency_ms"]["max"] == pytest.approx(1 + 9 * 0.2, rel=0.01)
    assert any("could not keep up with 1250.0" in line for line in found["warnings"])


def test_drift_is_flagged(bundle: Bundle, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Slow.run

    def slow(self: Slow, batch: Any, threshold: float | None = None) -> Any:
        clock.sleep(0.0002)
        return quick(self, batch, threshold)

    def slower(done: int, total: int, what: str) -> None:
        if what == "measuring" and done == total // 2:
            monkeypatch.setattr(Slow, "run", slow)

    found = bench(bundle, queries=64, processes=0, baseline="none", progress=slower)
    assert found["drift"] == pytest.approx(0.2, rel=0.01)
    assert any("onnxruntime drifted by +20.0%" in line for line in found["warnings"])


def test_the_parts_of_a_latency_where_a_device_tells_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _by_clock(monkeypatch, OnADevice)
    found = bench(bundle, queries=64, processes=0)
    check(found)
    assert found["latency_ms"]["p50"] == pytest.approx(1, rel=0.01)
    parts = [found[f"{name}_ms"] for name in ("host_to_device", "compute", "device_to_host")]
    assert parts == pytest.approx([0.2, 0.5, 0.1])
    # Warming up and settling are left out of the parts as out of latencies, over all loadings.
    assert found["parts_ms"]["compute"]["n"] == found["latency_ms"]["n"] == 64
    assert found["config"]["transfers"] == "included" and found["config"]["cuda_graph"] is True
    gpu = found["gpu"]
    assert (gpu["name"], gpu["cc"], gpu["driver"]) == ("Test", "8.7", "1.0")
    without = bench(bundle, queries=64, processes=0, transfers=False)
    assert without["latency_ms"]["p50"] == pytest.approx(0.7, rel=0.01)
    assert without["config"]["transfers"] == "not included"


def test_time_bounds_what_is_measured(bundle: Bundle, clock: Clock) -> None:
    both = bench(bundle, processes=0, max_time=0.2)  # 1 and 3 ms a query
    assert both["config"]["queries"] == pytest.approx(50, abs=1)
    assert any("queries are fewer than 1024" in line for line in both["warnings"])
    longer = bench(bundle, queries=8, processes=0, min_time=0.4)
    assert longer["config"]["queries"] == pytest.approx(100, abs=1)


def test_what_is_made_of_the_time_asked_for() -> None:
    asked = Settings(backends=("a",))
    assert Plan.of(asked, [0.01, 0.03], None) == Plan(queries=1024, rounds=32, loads=8, rate=None)
    assert Plan.of(asked, [1e-4, 1e-4], None).queries == 10_000  # 2 s
    slow = Plan.of(Settings(backends=("a",), max_time=9.0), [1.0, 2.0], None)
    assert (slow.queries, slow.rounds, slow.loads) == (3, 3, 3)
    assert [slow.share(turn) for turn in range(3)] == [1, 1, 1]
    seven = Plan.of(Settings(backends=("a",), queries=112, loads=7), [0.1], None)
    assert seven.rounds == 28 and sum(map(seven.share, range(28))) == 112
    assert [turn for turn in range(28) if seven.starts_load(turn)] == [4, 8, 12, 16, 20, 24]
    assert Plan.of(asked, [0.001], None, load_s=30.0).loads == 4
    assert Plan.of(Settings(backends=("a",), loads=9), [0.001], None, load_s=30.0).loads == 9


def test_scenarios(bundle: Bundle) -> None:
    multi = bench(bundle, queries=32, processes=0, scenario="multi", baseline="none")
    check(multi)
    assert multi["config"]["samples"] == 8 and multi["speedup"] is None
    assert multi["baseline"] is None
    assert multi["throughput"] > 7e3 / multi["latency_ms"]["max"]
    rate = bench(bundle, queries=64, processes=0, scenario="rate", rate=200.0, baseline="none")
    assert rate["config"]["rate"] == 200.0
    assert 20 < rate["throughput"] <= 200.1
    found = bench(bundle, queries=64, processes=0, scenario="rate", rate=1e6, baseline="none")
    assert any("could not keep up" in line for line in found["warnings"])


def test_an_uncalibrated_bundle_is_measured_too(tmp_path: Path) -> None:
    found = bench(make_bundle(tmp_path / "b", calibrated=False), queries=32, processes=0)
    assert found["parity"]["gate_agreement"] is None and found["parity"]["within"]
    assert found["speedup"]["ratio"] > 0


def test_several_backends_stand_beside_the_first(bundle: Bundle) -> None:
    found = bench(bundle, queries=32, processes=0, backends=["onnxruntime", "fake"])
    check(found)
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
        ({"loads": 0}, UsageError, "loads must be 1 or more"),
        ({"max_time": 0}, UsageError, "more than 0"),
        ({"max_time": 1, "min_time": 2}, UsageError, "go ill together"),
        ({"transfers": False, "scenario": "rate"}, UsageError, "cannot leave transfers out"),
        ({"affinity": [999]}, UsageError, "may not use core 999"),
        ({"backends": ["fake"], "baseline": "dense"}, UsageError, "no dense baseline for it"),
        ({"baseline": "torch"}, BackendError, "not in this version"),
        ({"baseline": "nope"}, BackendError, "no backend is called nope"),
    ],
)
def test_wrong_use(bundle: Bundle, arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        bench(bundle, **{"processes": 0, **arguments})


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
    assert interval([np.log(2)]) == {"ratio": pytest.approx(2), "ci95": None}
    # By hand: mean 0, standard error 0.1, 4.303 of them with two degrees of freedom.
    wide = interval([-np.sqrt(0.03), 0.0, np.sqrt(0.03)])
    assert wide["ci95"] == [pytest.approx(np.exp(-0.4303)), pytest.approx(np.exp(0.4303))]
    assert unpaired([np.log(2)] * 5, [0.0] * 7)["ci95"] == [pytest.approx(2)] * 2
    assert [verdict({"ci95": ci95}) for ci95 in ([1.1, 1.2], [0.8, 0.9], [0.9, 1.1], None)] == [
        "faster", "slower", "no difference shown", "no difference shown",
    ]  # fmt: skip
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
    """Also where each loading of a model has a speed of its own, which rounds do not tell."""
    rng = np.random.default_rng(1)
    groups = np.arange(8).repeat(4).tolist()
    hits, blind = 0, 0
    for _ in range(400):
        layout = np.exp(rng.normal(0, 0.02, (2, 8))).repeat(4, axis=1)
        noise = layout * np.exp(rng.normal(0, 0.01, (2, 32)))
        low, high = ratio(1.5 * noise[0], noise[1], groups)["ci95"]
        hits += low <= 1.5 <= high
        low, high = ratio(1.5 * noise[0], noise[1])["ci95"]
        blind += low <= 1.5 <= high
    assert 0.92 <= hits / 400 <= 0.98
    assert blind / 400 < 0.85


def test_starts_are_measured_in_processes_of_their_own(bundle: Bundle) -> None:
    found = bench(bundle, queries=32, processes=2, baseline="none")
    check(found)
    start = found["start"]
    assert all(len(values) == 2 for values in start.values())
    assert found["load_ms"] == pytest.approx(np.median(start["load_ms"]))
    assert found["first_inference_ms"]["cold"] == pytest.approx(np.median(start["cold_ms"]))
    # numpy and ONNX Runtime: an order that neither kilobytes nor the test's own process have.
    assert 20e6 < found["peak_bytes"] < 300e6
    assert min(start["import_ms"]) > 10


def test_what_goes_wrong_in_such_a_process_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_bundle(tmp_path / "b")
    (made.path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BackendError, match=r"model\.onnx"):
        bench(made, queries=8, processes=1, baseline="none")
    monkeypatch.setattr("moon.runtime.bench_process.sys.executable", "false")
    with pytest.raises(BackendError, match="ended with 1: no word"):
        bench(make_bundle(tmp_path / "c"), queries=8, processes=1)


def test_a_model_is_loaded_again_at_other_places(bundle: Bundle) -> None:
    pixels = [bundle.preprocess.normalise(bundle.golden()["pixels"][:1])]
    subject = Subject("x", "onnxruntime", bundle, pixels, threads=1, spin=True)
    subject.load()
    first = subject.backend
    subject.load()
    assert subject.backend is not first and len(subject.loads_ms) == 2
    assert len(subject.first_ms) == 2 and subject.first_ms[1][0] > 0


def test_build_time_is_read_from_the_engines_record(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Built(Slow):
        def info(self) -> Any:
            return {**self._inner.info(), "engine": "engines/tensorrt-1-sm_87-fp16.engine.zst"}

    _by_clock(monkeypatch, Built)
    records = {"engines/tensorrt-1-sm_87-fp16.json": b'{"build_s": 12.5}'}
    whole = Bundle.file
    monkeypatch.setattr(
        Bundle, "file", lambda self, name: records[name] if name in records else whole(self, name)
    )
    found = bench(bundle, queries=8, processes=0, baseline="none")
    assert found["build_ms"] == 12500 and "build_ms" not in found["unavailable"]
    records["engines/tensorrt-1-sm_87-fp16.json"] = b"{}"
    found = bench(bundle, queries=8, processes=0, baseline="none")
    assert found["build_ms"] is None and "does not tell" in found["unavailable"]["build_ms"]


def test_what_takes_longer_than_thought_ends_between_loadings(bundle: Bundle, clock: Clock) -> None:
    def stuck(done: int, total: int, what: str) -> None:
        if what == "measuring" and done == 4:
            clock.sleep(10)

    found = bench(bundle, processes=0, max_time=0.4, progress=stuck)
    assert found["config"]["loads"] == 1 and found["config"]["rounds"] == 4
    assert len(found["block_p50_ms"]) == len(found["baseline"]["block_p50_ms"]) == 4
    check(found)
