"""One model in every engine: loaded, compared, and timed by turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from engine_models import Model, for_deepsparse
from engine_processes import EngineProcess
from numpy.typing import NDArray

from moon.errors import BackendError, MoonError
from moon.runtime.bench_watch import Watch
from moon.runtime.onnxruntime import open_session
from moon.runtime.sparse.limits import Limits

MOON = "moon"
# Calls of a block that do not count, and seconds after which fewer do: the other engines have
# filled the caches, and some engines take eight calls until they are fast again.
WARM, WARM_SECONDS = 20, 0.15
PAUSE = 0.02  # seconds after a block of several threads, which go on spinning for a while
RESAMPLES = 2000
CLOCKS = ("wall", "cpu")
Figures = dict[str, Any]
Times = Mapping[str, NDArray[np.float64]]


def measure(
    model: Model,
    engines: Sequence[str],
    pythons: Mapping[str, str],
    options: Mapping[str, Any],
    limits: Limits | None,
    folder: Path,
    say: Callable[[str], None],
) -> Figures:
    """Every engine's figures, and why others were left out.

    Args:
        pythons: the interpreter of each engine.
        options: threads, batch, rounds, calls, clock.
        folder: for files.
        say: told a line for each engine left out.
    """
    images = np.random.default_rng(0).standard_normal((options["batch"], *model.shape))
    np.save(folder / "input.npy", images.astype(np.float32))
    expected = _reference(model, images.astype(np.float32))
    left_out: dict[str, str] = {}
    found: dict[str, Figures] = {}
    running: dict[str, EngineProcess] = {}
    with ExitStack() as stack:
        for engine in engines:
            try:
                found[engine] = _load(engine, model, pythons[engine], options, folder, stack)
                running[engine] = found[engine].pop("process")
                found[engine]["agrees"] = _difference(folder / f"{engine}.npy", expected)
            except MoonError as error:
                left_out[engine] = str(error)
                found.pop(engine, None)
        before = sum(process.ask("state")["cpu_s"] for process in running.values())
        watch, begun = Watch(), time.monotonic()
        times, dropped = _in_turn(running, options, limits)
        for engine, reason in dropped.items():
            left_out[engine] = reason
            del found[engine], running[engine]
        other, seconds = watch.stop().other_cpu, time.monotonic() - begun
        for engine, process in running.items():
            found[engine] |= process.ask("state")
        used = sum(found[engine]["cpu_s"] for engine in running) - before
    for engine, reason in left_out.items():
        say(f"{model.name}: {engine} left out: {reason}")
    for engine in found:
        by_clock = {clock: _figures(times[engine], times.get(MOON), clock) for clock in CLOCKS}
        found[engine] |= by_clock.pop(options["clock"])
        found[engine]["other_clock"] = by_clock
    if other is not None:
        # Those of the engines are none of the others; an engine that ended stays one.
        other = max(0.0, other - max(0.0, used) / (seconds * (os.cpu_count() or 1)))
    return {"engines": found, "left_out": left_out, "other_cpu": other}


def _reference(model: Model, images: NDArray[np.float32]) -> NDArray[Any]:
    session = open_session(model.path.read_bytes())
    logits: NDArray[Any] = session.run(None, {model.input: images})[model.index]
    return logits


def _load(
    engine: str,
    model: Model,
    python: str,
    options: Mapping[str, Any],
    folder: Path,
    stack: ExitStack,
) -> Figures:
    path, index = model.path, model.index
    if engine == "deepsparse":
        path, index = for_deepsparse(model, folder, batch=options["batch"]), 0
    settings = {"OMP_NUM_THREADS": str(options["threads"])}
    if engine == MOON:
        # Empty, so that the first process compiles its kernels, and the second finds them.
        settings["MOON_CACHE_DIR"] = str(folder / f"kernels-{model.name}")

    def start() -> EngineProcess:
        log = folder / f"{engine}.log"
        log.unlink(missing_ok=True)
        return EngineProcess(engine, python=python, log=log, settings=settings)

    order = {
        "model": str(path),
        "input": str(folder / "input.npy"),
        "output": str(folder / f"{engine}.npy"),
        "name": model.input,
        "index": index,
        "threads": options["threads"],
    }
    cold = {}
    if engine == MOON:
        with start() as process:
            cold = {"cold": _seconds(process.ask("load", **order))}
    process = stack.enter_context(start())
    found = process.ask("load", **order)
    return {"process": process, **found, **_state(process), **_seconds(found), **cold}


def _seconds(found: Mapping[str, Any]) -> Figures:
    return {"ready_s": found["import_s"] + found["load_s"] + found["first_call_s"]}


def _state(process: EngineProcess) -> Figures:
    return {"loaded_bytes": process.ask("state")["resident_bytes"]}


def _difference(path: Path, expected: NDArray[Any]) -> float:
    """The largest difference, over the largest value."""
    logits = np.load(path)
    if logits.shape != expected.shape or not np.isfinite(logits).all():
        raise BackendError(f"its logits are no {list(expected.shape)} finite numbers")
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def _in_turn(
    running: Mapping[str, EngineProcess], options: Mapping[str, Any], limits: Limits | None
) -> tuple[dict[str, Times], dict[str, str]]:
    """By engine, seconds by clock: of each call [rounds, calls], of each block's very first
    [rounds]. And why engines ended on the way."""
    blocks: dict[str, list[Figures]] = {engine: [] for engine in running}
    dropped: dict[str, str] = {}
    for i in range(-1, options["rounds"]):  # the first round warms up
        for engine in list(blocks)[:: -1 if i % 2 else 1]:
            try:
                block = running[engine].ask(
                    "run", warm=WARM, warm_s=WARM_SECONDS, calls=options["calls"]
                )
            except MoonError as error:
                dropped[engine] = str(error)
                del blocks[engine]
                continue
            if i >= 0:
                blocks[engine].append(block)
            if options["threads"] > 1:
                time.sleep(PAUSE)
        if limits is not None:
            limits.measure()
    return {
        engine: {
            **{clock: np.array([block[f"{clock}_s"] for block in found]) for clock in CLOCKS},
            **{f"first_{c}": np.array([block["first_s"][c] for block in found]) for c in CLOCKS},
        }
        for engine, found in blocks.items()
    }, dropped


def _figures(times: Times, moon: Times | None, clock: str) -> Figures:
    calls, blocks = times[clock], np.median(times[clock], axis=1)
    found: Figures = {
        "best_ms": float(calls.min()) * 1e3,
        "median_ms": float(np.median(calls)) * 1e3,
        "first_ms": float(np.median(times[f"first_{clock}"])) * 1e3,
        "blocks_ms": [round(float(value) * 1e3, 5) for value in blocks],
    }
    if moon is not None and moon is not times:
        found["times_moon"] = spread(blocks / np.median(moon[clock], axis=1))
    return found


def spread(values: NDArray[np.float64]) -> Figures:
    """The median, and the central 95% of what it is in resamples."""
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return {"median": float(np.median(values)), "ci95": [float(low), float(high)]}
