"""Two results against each other: verdicts, and why there is none."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from moon.errors import UsageError
from moon.runtime.bench_compare import compare
from moon.runtime.bench_stats import histogram, summary


def made(speed: float = 1.0, *, noise: float = 0.01, machine: float = 1.0, seed: int = 0) -> Any:
    """A result as bench makes them, of a subject that takes 1 / speed ms beside a 2 ms baseline."""
    rng = np.random.default_rng(seed)
    rounds = machine * np.exp(rng.normal(0, 0.05, 32))  # what slows both

    def one(ms: float, name: str) -> dict[str, Any]:
        layout = np.exp(rng.normal(0, noise, 8)).repeat(4)
        blocks = ms * rounds * layout * np.exp(rng.normal(0, noise, 32))
        return {
            "backend": {"name": name, "version": "1", "provider": "CPU", "precision": "fp32",
                        "spelled": name},
            "latency_ms": summary(blocks), "latency_histogram": histogram(blocks),
            "block_p50_ms": blocks.tolist(), "block_load": np.arange(8).repeat(4).tolist(),
            "throughput": 1e3 / blocks.mean(),
        }  # fmt: skip

    return {
        "schema_version": 1, "model": {"name": "m", "sha256": "a" * 64}, **one(1 / speed, "x"),
        "others": [one(0.5 / speed, "y")],
        "baseline": {"name": "dense", "model_sha256": "d" * 64, **one(2.0, "x")},
        "host": {"cpu": "C", "isa": [], "cores": 4, "affinity": [0], "governor": "performance"},
        "gpu": None, "config": {"scenario": "single", "samples": 1, "threads": 1}, "valid": True,
    }  # fmt: skip


def test_a_real_difference_is_shown_and_an_unreal_one_is_not() -> None:
    faster = compare(made(), made(1.2, seed=1))
    assert faster["verdict"] == "faster" and faster["speedup"]["by"] == "baseline"
    assert faster["speedup"]["ratio"] == pytest.approx(1.2, rel=0.03)
    assert compare(made(1.2, seed=1), made())["verdict"] == "slower"
    assert compare(made(), made(seed=1))["verdict"] == "no difference shown"
    assert faster["others"][0]["backend"] == "y" and faster["others"][0]["verdict"] == "faster"


def test_a_slower_machine_cancels_out_by_the_common_baseline() -> None:
    found = compare(made(), made(1.2, machine=1.5, seed=1))
    assert found["verdict"] == "faster"
    assert found["speedup"]["ratio"] == pytest.approx(1.2, rel=0.03)
    assert found["unadjusted"]["ratio"] == pytest.approx(0.8, rel=0.1)
    assert found["baseline_shift"] == pytest.approx(1 / 1.5, rel=0.1)
    assert "the machine changed" in found["notes"][0]


def test_the_verdict_errs_about_as_seldom_as_it_says() -> None:
    verdicts = [compare(made(seed=i), made(seed=i + 1000))["verdict"] for i in range(150)]
    wrong = sum(verdict != "no difference shown" for verdict in verdicts)
    assert wrong / 150 < 0.10


def test_another_baseline_is_no_yardstick() -> None:
    other = made(1.2, seed=1)
    other["baseline"]["model_sha256"] = "e" * 64
    found = compare(made(), other)
    assert found["speedup"]["by"] == "latency" and found["speedup"] == {
        **found["unadjusted"], "by": "latency",
    }  # fmt: skip
    assert found["baseline_shift"] is None and "no common baseline" in found["notes"][0]
    without = {**made(), "baseline": None}
    assert compare(without, without)["verdict"] == "no difference shown"


def test_why_results_are_not_comparable() -> None:
    other = copy.deepcopy(made())
    other["config"]["threads"] = 4
    other["host"]["cpu"] = "Z"
    other["gpu"] = {"name": "Orin", "power_mode": "15W"}
    found = compare(made(), {**other, "valid": False})
    assert found["verdict"] == "not comparable" and found["invalid"] == ["b"]
    assert [line.split(":")[0] for line in found["differences"]] == [
        "threads", "host cpu", "gpu name", "gpu power_mode",
    ]  # fmt: skip
    assert not found["comparable"] and found["notes"] == []


def test_what_changed_is_told_and_is_no_obstacle() -> None:
    other = made(1.2, seed=1)
    other["backend"]["version"] = "2"
    other["model"]["sha256"] = "b" * 64
    found = compare(made(), other)
    assert found["comparable"]
    assert found["changed"] == [f"model: {'a' * 12} and {'b' * 12}", "version: 1 and 2"]


def test_what_is_no_result() -> None:
    for wrong in ({"schema_version": 1}, {**made(), "schema_version": 2}, [1]):
        with pytest.raises(UsageError, match="not a result of moon bench"):
            compare(made(), wrong)  # type: ignore[arg-type]
