"""What sparsity and MOON cost a training loop: time and memory beside the dense loop.

    python -m benchmarks.training [--device cuda] [--model resnet50] [--batch 128] [--out FILE.json]

Three loops over the same random data, in one process: `dense` is torch alone, `sparse` adds
`Sparsifier`, `moon` also the output for the unknown and `UnknownAwareLoss`. Their steps are
taken in turn, there and back (ABC CBA), and each round's median step is divided by that of the
dense loop; the table gives the median of the rounds with the central 95% of 2,000 bootstrap
resamples of them.

A timed step holds no topology update. Updates, votes and the batch-norm pass at the end are
timed apart, as parts, and spread over the steps between two of them; "a run in all" has each for
as much of a run as it takes place in. The parts of the optimizer's step are timed on gradients
that lie ready. Then comes the whole step of `moon train`, eager and, on CUDA, in graphs. Memory
is measured in a process of its own for each variant.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.training_loops import VARIANTS, Loop, add_arguments, gradients, pixels
from benchmarks.training_step import whole_steps
from benchmarks.training_view import show
from moon.errors import MoonError
from moon.files import write_json
from moon.runtime.bench_host import host
from moon.runtime.bench_watch import Watch

RESAMPLES = 2000
BLOCK_SECONDS, MIN_STEPS, MAX_STEPS = 0.5, 2, 100
PART_REPEATS = 10
# Shares of a run in which there are updates and votes, by the built-in recipes.
UPDATING, VOTING = 0.7, 0.2


class Steps(Protocol):
    """What can take turns with others."""

    def step(self) -> None: ...

    def seconds(self, calls: list[Callable[[], None]]) -> list[float]: ...


def main() -> int:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        result = measure(options)
    except MoonError as error:
        print(f"training: {error}", file=sys.stderr)
        return error.exit_code
    show(result)
    if options.out:
        write_json(options.out, result)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(found)
    found.add_argument("--rounds", type=int, default=10)
    found.add_argument("--steps", type=int, help="timed in a block; default: half a second's")
    found.add_argument("--interval", type=int, default=100, help="steps between updates")
    found.add_argument("--images", type=int, default=45_000, help="of an epoch")
    found.add_argument("--epochs", type=int, default=100)
    found.add_argument("--no-memory", action="store_true")
    found.add_argument("--no-whole-step", action="store_true")
    found.add_argument("--out", type=Path, help="write the figures as JSON")
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every figure, and the machine they were taken on."""
    watch = Watch()
    loops = {name: Loop(name, options) for name in VARIANTS}
    rounds = take_turns(loops, options.rounds, options.steps)
    ratios = {
        name: interval([s / d for s, d in zip(rounds[name], rounds["dense"], strict=True)])
        for name in VARIANTS[1:]
    }
    dense = median(rounds["dense"])
    parts = measure_parts(loops, options)
    disturbance = asdict(watch.stop())
    loops.clear()
    return {
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "step_seconds": {name: median(times) for name, times in rounds.items()},
        "ratio": ratios,
        "parts": spread(parts, dense, options),
        "in_all": in_all(ratios, parts, dense, options),
        "rounds": rounds,
        "whole_step": None if options.no_whole_step else whole_steps(options, take_turns),
        "memory": None if options.no_memory else measure_memory(options),
        "environment": {**environment(options), "disturbance": disturbance},
    }


# ---------------------------------------------------------------------------- time


def take_turns(loops: Mapping[str, Steps], rounds: int, steps: int | None) -> dict[str, Any]:
    """Median seconds of a step by variant and round.

    The first step of a block is not timed: it finds the caches filled by another variant.
    """
    warm = [min(loop.seconds([loop.step] * 4)) for loop in loops.values()]
    steps = steps or min(MAX_STEPS, max(MIN_STEPS, math.ceil(BLOCK_SECONDS / min(warm))))
    found: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds):
        print(f"round {turn + 1} of {rounds}, {steps} steps a block", file=sys.stderr)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for name in (*loops, *reversed(loops)):
            loop = loops[name]
            times[name] += loop.seconds([loop.step] * (steps + 1))[1:]
        for name, taken in times.items():
            found[name].append(median(taken))
    return found


def interval(ratios: Sequence[float]) -> dict[str, Any]:
    """The median of the rounds' ratios and its bootstrap interval."""
    values = np.asarray(ratios)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return {"ratio": float(np.median(values)), "ci95": [float(low), float(high)]}


def measure_parts(loops: dict[str, Loop], options: argparse.Namespace) -> dict[str, float]:
    """Seconds that each part adds, whenever it happens."""
    dense, sparse, moon = (loops[name] for name in VARIANTS)
    plain, masked, updating = time_optimizers(dense, sparse)
    return {
        "masking": masked - plain,
        "loss": time_loss(moon) - time_loss(dense),
        "update": updating - masked,
        "vote": repeat(sparse, sparse.vote),
        "batch norm": repeat(sparse, sparse.batch_norm),
    }


def time_optimizers(dense: Loop, sparse: Loop) -> tuple[float, float, float]:
    """Of `optimizer.step()`: without a sparsifier, with one, and with a topology update.

    The gradients are put back before each call, since masking changes them.
    """
    times: list[list[float]] = [[], [], []]
    kept = []
    for loop in (dense, sparse):
        loop.forward_backward()
        kept.append([gradient.clone() for gradient in gradients(loop)])

    def refill(which: int, loop: Loop) -> None:
        torch._foreach_copy_(gradients(loop), kept[which])

    for _ in range(PART_REPEATS):
        for which, loop, update in ((0, dense, False), (1, sparse, False), (1, sparse, True)):
            refill(which, loop)
            if update:
                loop.ask_update()
            times[which + update] += loop.seconds([loop.optimizer.step])
    plain, masked, updating = (median(taken) for taken in times)
    return plain, masked, updating


def time_loss(loop: Loop) -> float:
    """Forward and backward of the loss alone, on the logits of one batch."""
    with torch.no_grad(), loop.autocast():
        logits = loop.model(loop.images)
    logits.requires_grad_()

    def call() -> None:
        with loop.autocast():
            loss = loop.criterion(logits, loop.labels)
        loss.backward()

    return repeat(loop, call, 20)


def repeat(loop: Loop, call: Callable[[], None], times: int = PART_REPEATS) -> float:
    """Median seconds of a call after one that does not count."""
    return median(loop.seconds([call] * (times + 1))[1:])


def spread(
    parts: dict[str, float], dense: float, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Each part by itself, how often it happens, and its share of the dense steps meanwhile."""
    epoch = -(-options.images // options.batch)
    every = {
        "masking": (1, "every step"),
        "loss": (1, "every step"),
        "update": (options.interval, f"every {options.interval} steps, until {UPDATING:.0%}"),
        "vote": (epoch, f"every {epoch} steps, in the last {VOTING:.0%}"),
        "batch norm": (options.epochs, "for each batch of one epoch, at the end"),
    }
    return {
        name: {"seconds": taken, "when": every[name][1], "share": taken / every[name][0] / dense}
        for name, taken in parts.items()
    }


def in_all(
    ratios: dict[str, Any], parts: dict[str, float], dense: float, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """What a variant costs over the dense loop: while updating, while voting, over a run."""
    share = {name: part["share"] for name, part in spread(parts, dense, options).items()}
    found = {}
    for name, measured in ratios.items():
        votes = share["vote"] if name == "moon" else 0.0
        norm = share["batch norm"] if name == "moon" else 0.0
        extra = {
            "steps": 0.0,
            "updating": share["update"],
            "voting": votes,
            "run": UPDATING * share["update"] + VOTING * votes + norm,
        }
        found[name] = {
            phase: {
                "ratio": measured["ratio"] + more,
                "ci95": [bound + more for bound in measured["ci95"]],
            }
            for phase, more in extra.items()
        }
    return found


# -------------------------------------------------------------------------- memory


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """By means and variant, what `benchmarks.training_memory` printed."""
    means = (
        {"allocator": []}
        if options.device == "cuda"
        else {"tensors": ["--allocated"], "resident": []}
    )
    return {
        how: {name: _in_own_process(name, options, words) for name in VARIANTS}
        for how, words in means.items()
    }


def _in_own_process(variant: str, options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.training_memory", "--variant", variant, *words]
    for name in ("device", "threads", "model", "batch", "sparsity", "rule", "structure"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--size", str(pixels(options)), *["--contiguous"] * options.contiguous]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return dict(json.loads(done.stdout))


def environment(options: argparse.Namespace) -> dict[str, Any]:
    facts = {
        **host(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if options.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


if __name__ == "__main__":
    sys.exit(main())
