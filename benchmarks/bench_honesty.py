"""Whether `moon bench` is to be believed: the same thing measured against itself.

The subject and the baseline are one model in one backend, so that every speed-up found is false.
Shown are how often the 95% interval holds 1 and how often the verdict is wrong, within a run and
between two runs (--compare), and how often the run called itself valid. With --disturb other
processes come and go meanwhile. `python -m benchmarks.bench_honesty BUNDLE --runs 100`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from moon.binomial import beta_interval
from moon.bundle import Bundle
from moon.errors import MoonError
from moon.files import write_json
from moon.runtime.bench import bench
from moon.runtime.bench_compare import compare
from moon.runtime.bench_host import host, parse_cores


def main(words: Sequence[str] | None = None) -> int:
    args = _arguments(words)
    try:
        result = run(args)
    except MoonError as error:
        print(f"bench_honesty: {error}", file=sys.stderr)
        return error.exit_code
    show(result)
    if args.json:
        write_json(args.json, result)
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--loads", type=int, default=8)
    parser.add_argument("--affinity", metavar="CORES")
    parser.add_argument("--disturb", type=int, default=0, metavar="N", help="other processes")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure so many times; every run's ratio, interval and verdict."""
    bundle = Bundle.open(args.bundle)
    affinity = None if args.affinity is None else parse_cores(args.affinity)
    found = []
    with disturbed(args.disturb):
        for i in range(args.runs):
            found.append(
                bench(
                    bundle, backends=[args.backend], baseline=args.backend, queries=args.queries,
                    loads=args.loads, affinity=affinity, processes=0,
                )
            )  # fmt: skip
            print(f"\r{i + 1}/{args.runs}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    speedups = [one["speedup"] for one in found]
    # Validity is told apart: a verdict must hold for what it does not doubt.
    pairs = [compare({**a, "valid": True}, {**b, "valid": True}) for a, b in pairwise(found)]
    return {
        "environment": host(),
        "options": vars(args),
        "p50_ms": float(np.median([one["latency_ms"]["p50"] for one in found])),
        "within": summary(speedups),
        "between, by the common baseline": summary([pair["speedup"] for pair in pairs]),
        "between, by latencies alone": summary([pair["unadjusted"] for pair in pairs]),
        "valid": sum(one["valid"] for one in found),
        "waited": float(np.mean([one["host"]["waited"] or 0.0 for one in found])),
        "other_cpu": float(np.mean([one["host"]["other_cpu"] or 0.0 for one in found])),
        "runs": speedups,
    }


def summary(speedups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of speed-ups that are all 1 in truth: coverage with its own 95% interval, and widths."""
    held = [one["ci95"][0] <= 1 <= one["ci95"][1] for one in speedups]
    hits, runs = sum(held), len(held)
    return {
        "runs": runs,
        "covered": hits / runs,
        "covered_ci95": [
            beta_interval(hits, runs - hits + 1)[0] if hits else 0.0,
            beta_interval(hits + 1, runs - hits)[1] if hits < runs else 1.0,
        ],
        "false_faster": sum(one["ci95"][0] > 1 for one in speedups) / runs,
        "false_slower": sum(one["ci95"][1] < 1 for one in speedups) / runs,
        "half_width": float(np.median([(one["ci95"][1] / one["ci95"][0]) ** 0.5 - 1
                                       for one in speedups])),
        "spread": float(np.std(np.log([one["ratio"] for one in speedups]))),
    }  # fmt: skip


@contextmanager
def disturbed(number: int) -> Iterator[None]:
    """Other processes on the same cores, each busy and idle in turn for random times."""
    others = [multiprocessing.Process(target=_disturb, daemon=True) for _ in range(number)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def _disturb() -> None:
    draw = random.Random()
    while True:
        until = time.monotonic() + draw.expovariate(1 / 0.2)
        block = np.ones((256, 256))
        while time.monotonic() < until:
            block = block @ block / 256
        time.sleep(draw.expovariate(1 / 0.4))


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['options']['backend']}, p50 {result['p50_ms']:.3f} ms, "
        f"valid {result['valid']} of {result['within']['runs']} runs, "
        f"waited {result['waited']:.0%}, others {result['other_cpu']:.0%}"
    )
    print(f"{'':34}{'interval holds 1':>22}{'false faster / slower':>24}{'half width':>12}")
    for name in ("within", "between, by the common baseline", "between, by latencies alone"):
        one = result[name]
        low, high = one["covered_ci95"]
        covered = f"{one['covered']:.0%} ({low:.0%} to {high:.0%})"
        wrong = f"{one['false_faster']:.1%} / {one['false_slower']:.1%}"
        print(f"{name:34}{covered:>22}{wrong:>24}{one['half_width']:>12.2%}")


if __name__ == "__main__":
    sys.exit(main())
