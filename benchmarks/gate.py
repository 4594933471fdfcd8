"""Does a gate keep its promise? Calibrate on random halves of a set, measure on the others.

    python benchmarks/gate.py BUNDLE --data SOURCE --reject 0.05 --splits 20

The images go through the model once. Each split calibrates a threshold on one half as
`moon calibrate` does and counts what it rejects of the other. A reject rate a is promised on
average over calibrations, so one split may exceed it by chance: the check allows
a + 3 sqrt(a (1 - a) (1 / n_calibration + 1 / n_test)), for each split and for their mean.

SOURCE must be in-distribution images that were not trained on.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.data.load import stream
from moon.data.source import open_source
from moon.errors import DataError, MoonError, UsageError
from moon.files import write_json
from moon.gate_calibration import calibrate_conformal, calibrate_pac
from moon.runtime.predictor import Predictor


def main(words: Sequence[str] | None = None) -> int:
    args = parser().parse_args(words)
    try:
        result = run(args)
        if args.out:
            write_json(args.out, result)
    except MoonError as error:
        print(f"gate.py: error: {error}", file=sys.stderr)
        return error.exit_code
    show(result)
    return 0 if result["passed"] else 1


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("bundle", metavar="BUNDLE")
    found.add_argument("--data", required=True, metavar="SOURCE")
    found.add_argument("--reject", default="0.05", metavar="A", help="rate promised")
    found.add_argument("--splits", type=int, default=20)
    found.add_argument("--method", choices=("conformal", "pac"), default="conformal")
    found.add_argument("--delta", default="0.05", help="chance a pac promise may fail")
    found.add_argument("--score", metavar="NAME", help="default: the bundle's gate score")
    found.add_argument("--backend", default="onnxruntime")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--out", metavar="FILE.json")
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score the images, split them so many times, and check every split."""
    if args.splits < 1:
        raise UsageError(f"--splits must be at least 1, got {args.splits}")
    bundle = Bundle.open(args.bundle)
    score = args.score or bundle.gate_score
    scores_N = graph_scores(bundle, args.data, score, args.backend)
    splits = measure(
        scores_N, args.reject, args.splits, method=args.method, delta=args.delta, seed=args.seed
    )
    rejects = [split["reject"] for split in splits]
    mean, bound = float(np.mean(rejects)), splits[0]["bound"]
    return {
        "schema_version": 1,
        "bundle": {"path": str(bundle.path), "version": bundle.manifest.version},
        "data": args.data,
        "score": score,
        "method": args.method,
        "reject": float(args.reject),
        "delta": float(args.delta) if args.method == "pac" else None,
        "seed": args.seed,
        "n": len(scores_N),
        "mean": mean,
        "sd": float(np.std(rejects, ddof=1)) if len(rejects) > 1 else None,
        "min": min(rejects),
        "max": max(rejects),
        "bound": bound,
        "mean_within": mean <= bound,
        "splits_within": sum(split["within"] for split in splits),
        "passed": mean <= bound and all(split["within"] for split in splits),
        "splits": splits,
        "environment": environment(args.backend),
    }


def graph_scores(bundle: Bundle, data: str, score: str, backend: str) -> NDArray[np.float32]:
    """The score of every image as the deployed graph computes it, float32 [N]."""
    if score not in bundle.manifest.scores:
        raise UsageError(
            f"the bundle does not carry the score {score}",
            remedy=f"Choose one of {', '.join(bundle.manifest.scores)}",
        )
    source = open_source(data)
    if len(source) < 2:
        raise DataError(f"{data} holds {len(source)} images, too few to split")
    # The threshold decides nothing here, but an uncalibrated bundle needs one to run.
    predictor = Predictor.open(bundle, backend=backend, threshold=0.0, warn=lambda _: None)
    batches = stream(source, bundle.preprocess, 64)
    return np.concatenate([predictor.raw(pixels)[f"score_{score}"] for _, pixels in batches])


def measure(
    scores_N: NDArray[np.float32], reject: str, splits: int, *, method: str, delta: str, seed: int
) -> list[dict[str, Any]]:
    """Threshold, reject rate and check of each random split into halves."""
    rng = np.random.default_rng(seed)
    half, rate = len(scores_N) // 2, float(reject)
    found = []
    for _ in range(splits):
        shuffled = rng.permutation(scores_N)
        calibration, test = shuffled[:half], shuffled[half:]
        if method == "pac":
            gate = calibrate_pac(calibration, reject, delta)
        else:
            gate = calibrate_conformal(calibration, reject)
        rejected = float(np.mean(~gate.accepts(test)))
        bound = rate + 3 * math.sqrt(rate * (1 - rate) * (1 / len(calibration) + 1 / len(test)))
        found.append(
            {
                "n_calibration": len(calibration),
                "n_test": len(test),
                "threshold": gate.threshold,
                "reject": rejected,
                "bound": bound,
                "within": rejected <= bound,
            }
        )
    return found


def environment(backend: str) -> dict[str, Any]:
    packages = {name: version(name) for name in ("numpy", "onnxruntime")}
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "backend": backend,
        **packages,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['bundle']['path']}: {result['method']} at {result['reject']:g}, "
          f"score {result['score']}, {result['n']:,} images of {result['data']}")  # fmt: skip
    print(f"{'split':>6} {'threshold':>12} {'rejected':>9} {'at most':>8}")
    for i, split in enumerate(result["splits"], 1):
        verdict = "ok" if split["within"] else "TOO MANY"
        print(f"{i:>6} {split['threshold']:>12.6g} {split['reject']:>8.2%} "
              f"{split['bound']:>7.2%}  {verdict}")  # fmt: skip
    sd = "" if result["sd"] is None else f", sd {result['sd']:.2%}"
    verdict = "ok" if result["mean_within"] else "TOO MANY"
    print(f"{'mean':>6} {'':>12} {result['mean']:>8.2%} {result['bound']:>7.2%}  {verdict}{sd}, "
          f"{result['min']:.2%} to {result['max']:.2%}")  # fmt: skip
    print(f"{result['splits_within']} of {len(result['splits'])} splits within the bound: "
          f"{'passed' if result['passed'] else 'FAILED'}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
