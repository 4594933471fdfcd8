"""The sparse CPU engine beside ONNX Runtime, OpenVINO and DeepSparse, interleaved in one run.

    python benchmarks/engine.py [--models r18c,r50] [--sparsity 80,90,95,99] [--threads 1]
        [--batch 1] [--structure unstructured,block4x1] [--rounds 30] [--calls 5]
        [--engines moon,onnxruntime,openvino,deepsparse] [--python deepsparse=PYTHON]...
        [--json FILE] [--picture FILE.png] [MODEL.onnx or BUNDLE]...

r18c is ResNet-18 for images of 3x32x32 with 11 outputs, r50 ResNet-50 for 3x224x224 with 1001;
weights and masks are random, layer densities by ERK. They are made once and kept in runs/engine.
Files and bundles given are measured instead, with their score heads.

Each engine is a process that stays. In each round every engine runs a block: twenty calls that do
not count (fewer where they take 0.15 s), then --calls that do; every second round in reverse order.
`best` is the fastest call, `median` that of all, and `first` that of the blocks' very first calls,
which find the caches, and what the CPU learned of branches, as the other engines left them.
`times moon` is an engine's time over moon's, of the medians of both blocks of a round: the median
over the rounds, with the central 95% of 2,000 bootstrap resamples. `--clock cpu` counts the CPU
time of the process, for one thread on a busy machine, where long calls are interrupted more often
than short ones; the JSON has both.

`left` are the multiply-adds of weights that are not zero, GMAC/s those of the best call, and the
two shares are of what a core does in the same run (times the threads): multiply-adds in registers,
and with an operand of each from memory. `agrees` is the largest difference from ONNX Runtime's
logits, over the largest logit. `load` is import, load and first call; in `cold` moon has to compile
all of its kernels. `loaded` is the resident memory then, `peak` the most until the end.

An engine may need a Python environment of its own; the worker needs nothing of this project there:

    python3 -m venv ov && ov/bin/pip install openvino
    python3.11 -m venv ds && ds/bin/pip install "deepsparse==1.8.0" "setuptools<80"
    python benchmarks/engine.py --python openvino=ov/bin/python --python deepsparse=ds/bin/python

An engine that is not there, or fails, is left out with a line. DeepSparse silently runs what it
does not know by its own ONNX Runtime, so it gets a copy of each model that it does know, up to the
logits; where it took less than all of it, or its time does not follow the sparsity, a line says so.
DeepSparse is also up to three times as slow, by either clock, where other processes take turns with
it on a core: quote it from a quiet machine. `taskset` before the command keeps all to some cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_models import Model, made, opened
from engine_rounds import measure
from engine_view import draw, show
from engine_worker import ENGINES

from moon import __version__
from moon.errors import BackendError, MissingExtraError, MoonError, UsageError
from moon.files import write_bytes, write_json
from moon.runtime.bench_host import host
from moon.runtime.sparse.limits import Limits

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "engine"
BUSY = 0.1  # of all cores
TOLERANCE = 1e-4  # of the largest logit


def main(words: Sequence[str] | None = None) -> int:
    args = _arguments(words)
    try:
        result = run(args)
        show(result)
        if args.json:
            write_json(args.json, result)
        if args.picture:
            write_bytes(args.picture, draw(result))
    except MoonError as error:
        print(f"engine: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="MODEL", help=".onnx or bundle")
    parser.add_argument("--models", default="r18c,r50")
    parser.add_argument("--sparsity", default="80,90,95,99", metavar="PERCENT,...")
    parser.add_argument("--structure", default="unstructured", metavar="A,B")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=5, help="timed in a block")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="to keep the models in")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="FILE.png")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the models and measure them; times in milliseconds."""
    engines, pythons = _engines(args)
    if args.threads < 1 or args.batch < 1 or args.calls < 1 or args.rounds < 2:
        raise UsageError("--threads, --batch and --calls must be at least 1, --rounds 2")
    paths = _paths(args)
    limits, reason = _limits()
    keys = ("threads", "batch", "rounds", "calls", "clock")
    options = {key: getattr(args, key) for key in keys}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for path in paths:
            model = opened(path, Path(temporary))
            _say(f"{model.name}: {model.macs[1] / 1e6:.1f} million multiply-adds left")
            one = measure(model, engines, pythons, options, limits, Path(temporary), _say)
            found.append({**_facts(model), **one})
    gmacs = None if limits is None else {"isa": limits.isa, **limits.gmacs()}
    for one in found:
        _share(one, gmacs, args)
    return {
        "environment": {"moon": __version__, **host()},
        "options": options,
        "limits_of_one_core": gmacs,
        "notes": [*([reason] if reason else []), *doubts(found), *_busy(found)],
        "models": found,
    }


def _engines(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """What to run, and by which interpreter."""
    engines = list(dict.fromkeys(args.engines.split(",")))
    pairs = [text.partition("=") for text in args.python]
    for name in (*engines, *(name for name, _, _ in pairs)):
        if name not in ENGINES:
            raise UsageError(f"no engine {name!r}", remedy=f"There are {', '.join(ENGINES)}")
    for name, _, path in pairs:
        if not path:
            raise UsageError(f"--python {name} has no path", remedy=f"Write --python {name}=PATH")
    return engines, {
        **dict.fromkeys(engines, sys.executable), **{name: path for name, _, path in pairs}
    }  # fmt: skip


def _paths(args: argparse.Namespace) -> list[Path]:
    if args.files:
        for path in args.files:
            if not path.exists():
                raise UsageError(f"there is no {path}")
        return list(args.files)
    try:
        sparsities = [float(word) for word in args.sparsity.split(",")]
    except ValueError:
        raise UsageError(f"--sparsity {args.sparsity!r} is no list of percentages") from None
    if not all(0 <= value < 100 for value in sparsities):
        raise UsageError("--sparsity is in percent, from 0 to below 100")
    return [
        made(args.folder, family, sparsity, structure)
        for family in args.models.split(",")
        for structure in args.structure.split(",")
        for sparsity in sparsities
    ]


def _limits() -> tuple[Limits | None, str]:
    """What measures the FMA limits, or why there is none."""
    try:
        return Limits(), ""
    except (BackendError, MissingExtraError) as error:
        return None, f"no FMA limits: {error}"


def doubts(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where an answer is wrong, and where DeepSparse runs dense."""
    said = [
        f"{model['name']}: {engine} does not agree with ONNX Runtime"
        for model in models
        for engine, figures in model["engines"].items()
        if figures["agrees"] > TOLERANCE
    ]
    families = defaultdict(list)
    for model in models:
        figures = model["engines"].get("deepsparse")
        if figures is None:
            continue
        families[model["family"]].append((model["macs"]["left"], figures["best_ms"]))
        if figures["supported_share"] < 1:
            share = f"{figures['supported_share']:.0%}"
            said.append(f"{model['name']}: DeepSparse itself runs {share} of the operators only")
    for family, pairs in families.items():
        (few, quick), (many, slow) = min(pairs), max(pairs)
        if many > 2 * few and quick > 0.8 * slow:
            said.append(f"{family}: DeepSparse's time hardly follows the sparsity")
    return said


def _busy(models: Sequence[Mapping[str, Any]]) -> list[str]:
    most = max((model["other_cpu"] or 0.0 for model in models), default=0.0)
    if most <= BUSY:
        return []
    return [f"noisy: other processes used up to {most:.0%} of the cores meanwhile"]


def _facts(model: Model) -> dict[str, Any]:
    facts = asdict(model)
    dense, left = facts.pop("macs")
    facts["path"] = model.path.name
    return {**facts, "bytes": model.path.stat().st_size, "macs": {"dense": dense, "left": left}}


def _share(one: dict[str, Any], limits: dict[str, Any] | None, args: argparse.Namespace) -> None:
    """What each engine's best call reached, beside the limits of the whole run."""
    for figures in one["engines"].values():
        reached = one["macs"]["left"] * args.batch / figures["best_ms"] / 1e6
        figures["gmacs"] = reached
        if limits is not None:
            figures["share_of_limit"] = {
                kind: reached / (args.threads * limits[kind]) for kind in ("registers", "memory")
            }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
