"""The drift test's promises and its delays, simulated and on a bundle's own scores.

    python -m benchmarks.drift [--runs 300] [--out FILE.json]
    python -m benchmarks.drift --bundle BUNDLE --id SOURCE --ood NAME=SOURCE ... [--out FILE.json]

A run draws a calibration set, sets the gate at 5% as `moon calibrate` does, and sends traffic
through the test: in-distribution images only, to count false alarms; or so many of those
and then one unknown image in ten, to count the images until the alarm. Without a bundle scores
are uniform and nine in ten unknown images are rejected. With one, its scores of the ID source
are split anew in each run, and traffic is drawn from the part that did not calibrate.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.drift import DELTA, DETECTOR_ALARM, E_VALUE_ALARM, DriftTest
from moon.files import write_json
from moon.gate_calibration import calibrate_conformal

ALPHA = 0.05
LEVELS = (20.0, 100.0, E_VALUE_ALARM)
QUIET = (0, 10_000, 100_000)
SHARE = 0.1
LONGEST = 30_000
Floats = NDArray[np.float64]
# Draws so many scores of traffic.
Traffic = Callable[[int], Floats]
# Draws a calibration set, and in-distribution traffic to go with it.
Drawn = Callable[[np.random.Generator], tuple[Floats, Traffic]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--images", type=int, default=20_000, help="of ID traffic in a run")
    parser.add_argument("--calibration", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--id", help="held-out in-distribution images")
    parser.add_argument("--ood", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if (options.bundle is None) != (options.id is None):
        parser.error("--bundle and --id go together")
    known, unknown = sources(options)
    found: dict[str, Any] = {"runs": options.runs, "images": options.images, "by_n": {}}
    for n in options.calibration:
        drawn = from_scores(known, n) if known is not None else from_nothing(n)
        found["by_n"][n] = {
            "false": false_alarms(drawn, options.runs, options.images),
            "delays": {
                name: {quiet: delays(drawn, scores, quiet, options.runs // 10) for quiet in QUIET}
                for name, scores in unknown.items()
            },
        }
        show(n, found["by_n"][n])
    if options.out:
        write_json(options.out, found)


def false_alarms(drawn: Drawn, runs: int, images: int) -> dict[str, Any]:
    """How often in-distribution traffic reaches each level within so many images."""
    rng = np.random.default_rng(0)
    tops, falls = [], []
    for _ in range(runs):
        scores, traffic = drawn(rng)
        gate = calibrate_conformal(scores, ALPHA)
        rejected = ~gate.accepts(traffic(images))
        e_values, detectors = DriftTest.of(gate).path(rejected, gate.threshold)
        tops.append(float(e_values.max()))
        falls.append(bool((detectors >= math.log(DETECTOR_ALARM)).any()))
    return {
        "e_value": {level: float(np.mean(np.array(tops) >= math.log(level))) for level in LEVELS},
        "promised": {level: 1 / level + DELTA for level in LEVELS},
        "detector": float(np.mean(falls)),
        "detector_promised": min(1.0, images / DETECTOR_ALARM + DELTA),
    }


def delays(drawn: Drawn, unknown: Floats | None, quiet: int, runs: int) -> dict[str, Any]:
    """Images until each alarm once one in ten is unknown; inf for never within `LONGEST`."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(runs):
        scores, traffic = drawn(rng)
        gate = calibrate_conformal(scores, ALPHA)
        test = DriftTest.of(gate)
        before = test.watch(~gate.accepts(traffic(quiet)), gate.threshold)
        rejected = ~gate.accepts(traffic(LONGEST))
        at = rng.random(LONGEST) < SHARE
        if unknown is None:
            rejected[at] = rng.random(int(at.sum())) < 0.9
        else:
            rejected[at] = ~gate.accepts(rng.choice(unknown, int(at.sum())))
        paths = test.path(rejected, gate.threshold, before)
        found.append(
            [first(path, c) for path, c in zip(paths, (E_VALUE_ALARM, DETECTOR_ALARM), strict=True)]
        )
    return {
        name: [float(np.quantile(column, q, method="lower")) for q in (0.5, 0.9)]
        for name, column in zip(("e_value", "detector"), np.array(found).T, strict=True)
    }


def first(path: Floats, level: float) -> float:
    reached = np.flatnonzero(path >= math.log(level))
    return float(reached[0] + 1) if len(reached) else math.inf


def from_nothing(n: int) -> Drawn:
    """Uniform scores."""
    return lambda rng: (rng.uniform(size=n), lambda images: rng.uniform(size=images))


def from_scores(known: Floats, n: int) -> Drawn:
    """A bundle's own, split anew each time."""

    def draw(rng: np.random.Generator) -> tuple[Floats, Traffic]:
        order = rng.permutation(len(known))
        rest = known[order[n:]]
        return known[order[:n]], lambda images: rng.choice(rest, images)

    return draw


def sources(options: argparse.Namespace) -> tuple[Floats | None, dict[str, Floats | None]]:
    """Scores of the known and of each unknown set; None where none are needed."""
    if options.bundle is None:
        return None, {"nine in ten rejected": None}
    from moon.data.load import stream
    from moon.data.source import open_source
    from moon.runtime.predictor import Predictor

    predictor = Predictor.open(options.bundle)

    def scores(source: str) -> Floats:
        batches = stream(open_source(source), predictor.bundle.preprocess, 128)
        parts = [predictor.raw(pixels)["score"] for _, pixels in batches]
        return np.concatenate(parts).astype(np.float64)

    known = scores(options.id)
    gate = predictor.gate
    unknown = {}
    for word in options.ood:
        name, _, source = word.partition("=")
        unknown[name] = scores(source)
        if gate is not None and gate.per_class is None:
            share = np.mean(~gate.accepts(unknown[name]))
            print(f"{name}: {share:.1%} of {len(unknown[name]):,} rejected")
    return known, unknown


def show(n: int, found: dict[str, Any]) -> None:
    false = found["false"]
    print(f"\ncalibrated on {n:,}: runs of ID traffic that reach")
    for level in LEVELS:
        share, most = false["e_value"][level], false["promised"][level]
        print(f"    e-value {level:>9,.0f}   {share:6.2%}   promised at most {most:.2%}")
    share, most = false["detector"], false["detector_promised"]
    print(f"    detector {DETECTOR_ALARM:>8,.0f}   {share:6.2%}   promised at most {most:.2%}")
    print("  images to the alarm, median (90%), one in ten unknown")
    for name, by_quiet in found["delays"].items():
        for quiet, one in by_quiet.items():
            e, d = one["e_value"], one["detector"]
            print(
                f"    {name:<22} after {quiet:>7,} ID:  "
                f"e-value {e[0]:>6,.0f} ({e[1]:,.0f})   detector {d[0]:>6,.0f} ({d[1]:,.0f})"
            )


if __name__ == "__main__":
    main()
