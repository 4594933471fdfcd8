"""`moon bench` against other clocks: ONNX Runtime's own profiler, and a plain loop.

For one model, in turn in one run: a loop around `session.run` with nothing of moon's, ONNX
Runtime's profile of such a loop (its `model_run` events, timed in C++), and `moon bench`. All
three measure what `onnxruntime_perf_test` calls latency, and `trtexec` where nothing is copied.
moon must agree with the loop to within --allowed, Python around the call included, and not exceed
the profiler by more: profiling notes every node, which costs a small model more than it takes.
`python -m benchmarks.bench_agreement BUNDLE`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from moon.bundle import Bundle
from moon.errors import MoonError
from moon.files import write_json
from moon.runtime.bench import bench
from moon.runtime.bench_host import host
from moon.runtime.bench_inputs import inputs_of
from moon.runtime.bench_stats import interval, summary

PERCENTILES = ("p50", "p90", "p95", "p99")
# Of the loop's median, and in any case so many microseconds: a dictionary of outputs is made.
ALLOWED, ALLOWED_US = 0.03, 20.0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--allowed", type=float, default=ALLOWED, metavar="SHARE")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(words)
    try:
        result = run(Bundle.open(args.bundle), args.rounds, args.queries)
    except MoonError as error:
        print(f"bench_agreement: {error}", file=sys.stderr)
        return error.exit_code
    show(result)
    if args.json:
        write_json(args.json, result)
    return 0 if agrees(result, args.allowed) else 1


def run(bundle: Bundle, rounds: int, queries: int) -> dict[str, Any]:
    """Percentiles and throughput by each clock, medians over rounds."""
    inputs = inputs_of(bundle, 1)
    found: dict[str, list[dict[str, float]]] = {"loop": [], "profiler": [], "moon": []}
    for _ in range(rounds):
        found["loop"].append(_loop(_session(bundle), inputs, queries))
        found["profiler"].append(_profiled(bundle, inputs, queries))
        found["moon"].append(_moon(bundle, queries))
    figures = {
        name: {key: float(np.median([one[key] for one in ones])) for key in ones[0]}
        for name, ones in found.items()
    }
    ratios = [
        np.log(one["p50"] / other["p50"])
        for one, other in zip(found["moon"], found["loop"], strict=True)
    ]
    return {
        "environment": host(), "rounds": rounds, "queries": queries, "clocks": figures,
        "moon_to_loop": interval(ratios),
    }  # fmt: skip


def agrees(result: dict[str, Any], allowed: float) -> bool:
    """Whether moon's median is the loop's, and no more than the profiler's."""
    moon, loop, profiler = (result["clocks"][name]["p50"] for name in ("moon", "loop", "profiler"))
    slack = max(allowed * loop, ALLOWED_US / 1e3)
    return bool(abs(moon - loop) <= slack and moon <= profiler + slack)


def _session(bundle: Bundle, folder: str | None = None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if folder is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
    return ort.InferenceSession(bundle.model_bytes(), options, providers=["CPUExecutionProvider"])


def _loop(session: Any, inputs: list[Any], queries: int) -> dict[str, float]:
    name = session.get_inputs()[0].name
    outputs = [one.name for one in session.get_outputs()]
    for i in range(50):
        session.run(outputs, {name: inputs[i % len(inputs)]})
    times = []
    start = time.perf_counter()
    for i in range(queries):
        began = time.perf_counter()
        session.run(outputs, {name: inputs[i % len(inputs)]})
        times.append((time.perf_counter() - began) * 1e3)
    return _figures(times, queries / (time.perf_counter() - start))


def _profiled(bundle: Bundle, inputs: list[Any], queries: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        session = _session(bundle, folder)
        throughput = _loop(session, inputs, queries)["throughput"]
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event["dur"] / 1e3 for event in events if event.get("name") == "model_run"]
    return _figures(runs[-queries:], throughput)


def _moon(bundle: Bundle, queries: int) -> dict[str, float]:
    found = bench(bundle, baseline="none", queries=queries, processes=0)
    return {
        **{name: found["latency_ms"][name] for name in PERCENTILES},
        "throughput": found["throughput"],
    }


def _figures(times_ms: list[float], throughput: float) -> dict[str, float]:
    whole = summary(times_ms)
    return {**{name: whole[name] for name in PERCENTILES}, "throughput": throughput}


def show(result: dict[str, Any]) -> None:
    clocks = result["clocks"]
    print(f"{'':10}" + "".join(f"{name:>12}" for name in (*PERCENTILES, "queries/s")))
    for name, one in clocks.items():
        cells = "".join(f"{one[key]:>12.4f}" for key in PERCENTILES)
        print(f"{name:10}{cells}{one['throughput']:>12,.0f}")
    found = result["moon_to_loop"]
    low, high = found["ci95"] or [found["ratio"]] * 2
    print(
        f"moon's median is {found['ratio']:.3f} of the loop's, 95% interval {low:.3f} to {high:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
