"""Does a gate keep its promise? Calibrate on random halves of a set, measure on the others.

    python benchmarks/gate.py BUNDLE --data SOURCE --reject 0.05 --splits 20
    python benchmarks/gate.py BUNDLE --data SOURCE --method pac --per-class

The images go through the model once. Each split calibrates on one half as `moon calibrate`
does and counts what the gate rejects of the other. A reject rate a is promised on average over
calibrations (conformal), or for a share 1 - delta of them (pac); what is counted on the other
half varies by chance as well. The check allows
a + 3 sqrt(a (1 - a) (1 / n_calibration + 1 / n_test)), for each split and for their mean. With
--per-class the same is counted among the images predicted as each class, and the means are
checked: of many classes in many splits a few exceed three deviations by chance. Given the images,
splits are independent draws with a mean of at most a, so from ten splits on a class's mean may
exceed a by no more than four of its own standard errors.

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
from moon.class_calibration import calibrate_per_class
from moon.data.load import stream
from moon.data.source import open_source
from moon.errors import DataError, MoonError, UsageError
from moon.files import write_json
from moon.gate import Gate
from moon.gate_calibration import Promise, calibrate_conformal, calibrate_pac
from moon.runtime.predictor import Predictor

# From so many splits on, their own spread says how far a class's mean may be off by chance.
_MANY, _ERRORS = 10, 4


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
    found.add_argument("--per-class", action="store_true", help="a threshold a predicted class")
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
    scores_N, labels_N = graph_scores(bundle, args.data, score, args.backend)
    splits = measure(
        scores_N,
        args.reject,
        args.splits,
        method=args.method,
        delta=args.delta,
        seed=args.seed,
        labels_N=labels_N if args.per_class else None,
        classes=bundle.classes,
    )
    rejects = [split["reject"] for split in splits]
    mean, bound = float(np.mean(rejects)), splits[0]["bound"]
    classes = by_class(splits, bundle.classes, float(args.reject)) if args.per_class else None
    passed = mean <= bound and all(split["within"] for split in splits)
    return {
        "schema_version": 1,
        "bundle": {"path": str(bundle.path), "version": bundle.manifest.version},
        "data": args.data,
        "score": score,
        "method": args.method,
        "per_class": args.per_class,
        "reject": float(args.reject),
        "delta": float(args.delta) if args.method == "pac" else None,
        "seed": args.seed,
        "n": len(scores_N),
        "mean": mean,
        "sd": deviation(rejects),
        "min": min(rejects),
        "max": max(rejects),
        "over": float(np.mean([reject > float(args.reject) for reject in rejects])),
        "bound": bound,
        "mean_within": mean <= bound,
        "splits_within": sum(split["within"] for split in splits),
        "classes": classes,
        "passed": passed and all(row["within"] for row in (classes or {}).values()),
        "splits": splits,
        "environment": environment(args.backend),
    }


def graph_scores(
    bundle: Bundle, data: str, score: str, backend: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The score and predicted class of every image as the deployed graph computes them, [N]."""
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
    outputs = [predictor.raw(pixels) for _, pixels in stream(source, bundle.preprocess, 64)]
    return (
        np.concatenate([output[f"score_{score}"] for output in outputs]),
        np.concatenate([output["label"] for output in outputs]),
    )


def measure(
    scores_N: NDArray[np.float32],
    reject: str,
    splits: int,
    *,
    method: str,
    delta: str,
    seed: int,
    labels_N: NDArray[np.int64] | None = None,
    classes: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Thresholds, reject rates and check of each random split into halves.

    With ``labels_N``, the predicted classes, thresholds are by class.
    """
    rng = np.random.default_rng(seed)
    half, rate = len(scores_N) // 2, float(reject)
    found = []
    for _ in range(splits):
        order = rng.permutation(len(scores_N))
        known, new = order[:half], order[half:]
        if labels_N is not None:
            promise = Promise.of(reject, delta if method == "pac" else None)
            gate = calibrate_per_class(scores_N[known], labels_N[known], classes, promise)
        elif method == "pac":
            gate = calibrate_pac(scores_N[known], reject, delta)
        else:
            gate = calibrate_conformal(scores_N[known], reject)
        labels_M = None if labels_N is None else labels_N[new]
        rejected_M = ~gate.accepts(scores_N[new], labels_M)
        rejected = float(np.mean(rejected_M))
        split = {
            "n_calibration": len(known),
            "n_test": len(new),
            "threshold": gate.threshold,
            "reject": rejected,
            "bound": allowed(rate, len(known), len(new)),
            "within": rejected <= allowed(rate, len(known), len(new)),
        }
        if labels_M is not None:
            split["classes"] = in_classes(gate, rejected_M, labels_M, rate)
        found.append(split)
    return found


def allowed(rate: float, n_calibration: int, n_test: int) -> float:
    """The promised rate and three standard deviations of what is counted."""
    return rate + 3 * math.sqrt(rate * (1 - rate) * (1 / n_calibration + 1 / n_test))


def in_classes(
    gate: Gate, rejected_M: NDArray[np.bool_], labels_M: NDArray[np.int64], rate: float
) -> dict[str, Any]:
    """By class, and for the pooled ones together: threshold, images, rejects and check."""
    thresholds = gate.per_class
    assert thresholds is not None
    groups = {name: [name] for name in thresholds.own}
    if thresholds.pooled:
        groups["pooled"] = list(thresholds.pooled)
    found = {}
    for name, members in groups.items():
        indices = [thresholds.classes.index(member) for member in members]
        chosen = np.isin(labels_M, indices)
        n_test = int(chosen.sum())
        if not n_test:
            continue
        threshold = thresholds.of(indices[0])
        reject, bound = float(rejected_M[chosen].mean()), allowed(rate, threshold.n, n_test)
        found[name] = {
            "n_calibration": threshold.n,
            "n_test": n_test,
            "threshold": threshold.value,
            "reject": reject,
            "bound": bound,
            "within": reject <= bound,
        }
    return found


def by_class(
    splits: Sequence[dict[str, Any]], classes: Sequence[str], rate: float
) -> dict[str, Any]:
    """The mean of each class over the splits in which it had a threshold of its own."""
    found = {}
    for name in (*classes, "pooled"):
        rows = [split["classes"][name] for split in splits if name in split["classes"]]
        if not rows:
            continue
        rejects = [row["reject"] for row in rows]
        mean, bound = float(np.mean(rejects)), float(np.mean([row["bound"] for row in rows]))
        if len(rows) >= _MANY:
            error = float(np.std(rejects, ddof=1)) / math.sqrt(len(rows))
            bound = min(bound, rate + _ERRORS * error)
        found[name] = {
            "splits": len(rows),
            "n_calibration": float(np.mean([row["n_calibration"] for row in rows])),
            "mean": mean,
            "sd": deviation(rejects),
            "min": min(rejects),
            "max": max(rejects),
            "bound": bound,
            "within": mean <= bound,
            "splits_within": sum(row["within"] for row in rows),
        }
    return found


def deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


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
    each = " by predicted class" if result["per_class"] else ""
    print(f"{result['bundle']['path']}: {result['method']} at {result['reject']:g}{each}, "
          f"score {result['score']}, {result['n']:,} images of {result['data']}")  # fmt: skip
    print(f"{'split':>6} {'threshold':>12} {'rejected':>9} {'at most':>8}")
    for i, split in enumerate(result["splits"], 1):
        verdict = "ok" if split["within"] else "TOO MANY"
        threshold = "by class" if result["per_class"] else f"{split['threshold']:.6g}"
        print(f"{i:>6} {threshold:>12} {split['reject']:>8.2%} "
              f"{split['bound']:>7.2%}  {verdict}")  # fmt: skip
    sd = "" if result["sd"] is None else f", sd {result['sd']:.2%}"
    verdict = "ok" if result["mean_within"] else "TOO MANY"
    print(f"{'mean':>6} {'':>12} {result['mean']:>8.2%} {result['bound']:>7.2%}  {verdict}{sd}, "
          f"{result['min']:.2%} to {result['max']:.2%}, "
          f"{result['over']:.0%} of the splits over {result['reject']:g}")  # fmt: skip
    if result["classes"]:
        show_classes(result["classes"])
    print(f"{result['splits_within']} of {len(result['splits'])} splits within the bound: "
          f"{'passed' if result['passed'] else 'FAILED'}")  # fmt: skip


def show_classes(classes: dict[str, Any]) -> None:
    width = max(12, *map(len, classes))
    print(f"{'predicted as':>{width}} {'images':>7} {'rejected':>9} {'at most':>8}")
    for name, row in classes.items():
        verdict = "ok" if row["within"] else "TOO MANY"
        sd = "" if row["sd"] is None else f", sd {row['sd']:.2%}"
        print(f"{name:>{width}} {row['n_calibration']:>7.0f} {row['mean']:>8.2%} "
              f"{row['bound']:>7.2%}  {verdict}{sd}, {row['min']:.2%} to {row['max']:.2%}, "
              f"{row['splits_within']} of {row['splits']} splits within")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
