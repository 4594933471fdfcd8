"""The sparse CPU engine beside itself, interleaved in one run: structures, batches, or threads.

    python benchmarks/engine_variants.py structure unstructured block4x1
    python benchmarks/engine_variants.py batch 1 2 4 8 16 32 64
    python benchmarks/engine_variants.py threads 1 2
        [--models r18c,r50] [--sparsity 80,90,95,99] [--rounds 20] [--calls 5] [--json FILE]

Models are those of benchmarks/engine.py, made once and kept in runs/engine. Each variant is an
engine of its own in one process; in each round each runs a block of calls, two more before it not
counted, every second round in reverse order. `ms` is the best call for each image. The ratio is the
first variant's time over the variant's, the geometric mean over the rounds of the blocks' medians,
with the central 95% of 2,000 bootstrap resamples.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from engine_models import made

from moon import __version__
from moon.errors import MoonError, UsageError
from moon.files import write_json
from moon.runtime.bench_host import host
from moon.runtime.bench_stats import ratio
from moon.runtime.bench_watch import Watch
from moon.runtime.sparse.engine import SparseEngine

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "engine"
KINDS = ("structure", "batch", "threads")
WARM = 2
PAUSE = 0.02  # seconds after a block of several threads, which go on looking for work for a while


class Variant:
    """An engine, a batch of images, and what was measured of them."""

    def __init__(self, label: str, model: Path, batch: int, threads: int) -> None:
        self.label, self._batch, self._threads = label, batch, threads
        self._engine = SparseEngine(model, threads=threads)
        shape = self._engine.inputs[0].shape[1:]
        images = np.random.default_rng(0).standard_normal((batch, *shape))
        self._images = images.astype(np.float32)
        self._blocks: list[list[float]] = []

    def block(self, calls: int) -> None:
        """A few calls, timed; milliseconds an image."""
        for _ in range(WARM):
            self._engine.run(self._images)
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            self._engine.run(self._images)
            found.append((time.perf_counter() - start) * 1e3 / self._batch)
        self._blocks.append(found)
        if self._threads > 1:
            time.sleep(PAUSE)

    @property
    def medians(self) -> list[float]:
        """Of the blocks."""
        return [float(np.median(block)) for block in self._blocks]

    def figures(self, first: Variant) -> dict[str, Any]:
        """As JSON has it."""
        best = min(min(block) for block in self._blocks)
        faster = None if first is self else ratio(first.medians, self.medians)
        return {"variant": self.label, "best_ms_per_image": best, "times_first": faster}


def main(words: Sequence[str] | None = None) -> int:
    args = _arguments(words)
    try:
        result = run(args)
        if args.json:
            write_json(args.json, result)
    except MoonError as error:
        print(f"engine_variants: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("variants", nargs="+", help="the first is what the others are held against")
    parser.add_argument("--models", default="r18c,r50")
    parser.add_argument("--sparsity", default="80,90,95,99", metavar="PERCENT,...")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=5, help="timed in a block")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="to keep the models in")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every model, and print a line for each variant."""
    if args.rounds < 2 or args.calls < 1:
        raise UsageError("--rounds must be at least 2, --calls 1")
    try:
        sparsities = [float(word) for word in args.sparsity.split(",")]
    except ValueError:
        raise UsageError(f"--sparsity {args.sparsity!r} is no list of percentages") from None
    watch, found = Watch(), {}
    print(f"{'model':<10}{args.kind:>14}{'ms an image':>13}  times {args.variants[0]}")
    for family in args.models.split(","):
        for sparsity in sparsities:
            variants = [_variant(args, family, sparsity, word) for word in args.variants]
            for i in range(args.rounds):
                for variant in variants[:: -1 if i % 2 else 1]:
                    variant.block(args.calls)
            name = f"{family}-{sparsity:g}"
            found[name] = [variant.figures(variants[0]) for variant in variants]
            for one in found[name]:
                print(_line(name, one), flush=True)
    other = watch.stop().other_cpu
    if other is not None and other > 1 / (os.cpu_count() or 1) / 5:
        print(f"noisy: other processes used {other:.0%} of the cores meanwhile")
    options = {key: getattr(args, key) for key in ("kind", "variants", "rounds", "calls")}
    environment = {"moon": __version__, **host(), "other_cpu": other}
    return {"environment": environment, "options": options, "models": found}


def _variant(args: argparse.Namespace, family: str, sparsity: float, word: str) -> Variant:
    chosen: dict[str, Any] = {"structure": "unstructured", "batch": 1, "threads": 1}
    try:
        chosen[args.kind] = type(chosen[args.kind])(word)
    except ValueError:
        raise UsageError(f"{args.kind} {word!r} is not a number") from None
    if chosen["batch"] < 1 or chosen["threads"] < 1:
        raise UsageError(f"{args.kind} must be at least 1")
    model = made(args.folder, family, sparsity, chosen["structure"])
    return Variant(word, model, chosen["batch"], chosen["threads"])


def _line(name: str, one: dict[str, Any]) -> str:
    line = f"{name:<10}{one['variant']:>14}{one['best_ms_per_image']:>13.3f}"
    if one["times_first"] is None:
        return line
    low, high = one["times_first"]["ci95"]
    return f"{line}  {one['times_first']['ratio']:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
