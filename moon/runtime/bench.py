"""Latency one can trust: a bundle and a baseline, measured in turn in the same run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from moon.bundle import Bundle
from moon.errors import UsageError
from moon.progress import Progress, silent
from moon.runtime.backend import DEFAULT
from moon.runtime.bench_board import Board
from moon.runtime.bench_energy import Energy, open_energy
from moon.runtime.bench_host import host, pinned
from moon.runtime.bench_inputs import inputs_of
from moon.runtime.bench_process import Start, measure_start
from moon.runtime.bench_result import Measured, result_of
from moon.runtime.bench_settings import SCENARIOS, Plan, Settings
from moon.runtime.bench_subject import Subject, filled_model, uses_gpu
from moon.runtime.bench_watch import Watch

__all__ = ["SCENARIOS", "bench"]

_UTILISATION = 0.5
# Their engines are of the bundle's own model; no other graph can be run for comparison.
_OWN_MODEL_ONLY = ("tensorrt", "tensorrt_rtx", "fake")


def bench(
    bundle: Bundle | str | os.PathLike[str],
    *,
    backends: Sequence[str] = (DEFAULT,),
    baseline: str | None = None,
    batch: int = 1,
    threads: int = 1,
    scenario: str = "single",
    queries: int | None = None,
    warmup: int | None = None,
    settle: int = 2,
    rate: float | None = None,
    spin: bool = True,
    transfers: bool = True,
    affinity: Sequence[int] | None = None,
    loads: int | None = None,
    processes: int = 3,
    min_time: float | None = None,
    max_time: float | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a bundle's inference latency against a baseline.

    Args:
        bundle: the bundle or its folder; need not be calibrated.
        backends: what to measure; the first is the result's own, the rest are its ``others``.
        baseline: ``dense``, the same graph with its zeros filled at random, in the first
            backend; a backend's name; or ``none``. Default ``dense``, and ``onnxruntime`` where
            the first backend runs no graph but the bundle's.
        batch: images in a query (single and rate).
        threads: for one inference, the same for every subject; 0 for all cores.
        scenario: ``single``: one query after another; ``multi``: the same with 8 images in
            each; ``rate``: a query falls due at fixed intervals whether or not the last is
            done, and its latency counts from then.
        queries: of each subject; default 1,024, or as many as take 2 seconds.
        warmup: uncounted queries of each subject first; default a twentieth of ``queries``.
        settle: uncounted queries at the start of each block.
        rate: queries a second (rate); default half of what the slowest subject can do.
        spin: let idle threads of the backend spin.
        transfers: count copies to and from a device; False leaves them out of latencies.
        affinity: cores to keep the process on while measuring.
        loads: times that each model is loaded during the measurement; default 8, fewer where
            loading takes long.
        processes: fresh processes in which loading and first inferences are measured; 0 to
            measure them in this process, where others came before.
        min_time: seconds of queries, at least; more queries are made than asked for.
        max_time: seconds of queries, at most; fewer are made.
        progress: told how many processes and blocks are done.

    Returns:
        The result as ``moon/runtime/bench_schema.json`` describes it: figures in milliseconds,
        images a second and joules, ``speedup`` = baseline / subject with its 95% interval,
        ``warnings``, and ``valid``, false when a warning puts the figures in doubt. What could
        not be measured is null with its reason under ``unavailable``.

    Raises:
        UsageError: an argument is out of range.
        BackendError: a backend cannot run here.
    """
    settings = Settings(
        backends=tuple(backends), baseline=baseline, batch=batch, threads=threads,
        scenario=scenario, queries=queries, warmup=warmup, settle=settle, rate=rate, spin=spin,
        transfers=transfers, affinity=None if affinity is None else tuple(sorted(set(affinity))),
        loads=loads, processes=processes, min_time=min_time, max_time=max_time,
    )  # fmt: skip
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    with pinned(settings.affinity):
        return _run(opened, settings, progress)


def _run(bundle: Bundle, settings: Settings, progress: Progress) -> dict[str, Any]:
    facts = host()
    subjects = [_subject(name, bundle, name, bundle, settings) for name in settings.backends]
    reference = _baseline(bundle, settings)
    everyone = subjects + ([reference] if reference is not None else [])
    starts = [_start(bundle, one, settings, progress) for one in everyone]
    seconds = []
    for i, one in enumerate(everyone):
        progress(i, len(everyone), "loading and warming up")
        one.load()
        limit = settings.warm_limit_s
        allowed = None if limit is None else limit / len(everyone)
        seconds.append(one.warm_up(settings.warm_queries, allowed))
    rate = settings.rate
    if settings.scenario == "rate" and rate is None:
        rate = _UTILISATION / max(seconds)
    load_s = sum(one.loads_ms[0] for one in everyone) / 1e3
    plan = Plan.of(settings, seconds, rate, load_s)
    with _instruments(everyone) as (board, energy):
        watch = Watch()
        _measure(everyone, plan, settings, board, watch, energy, progress)
        measured = Measured(
            bundle=bundle, settings=settings, plan=plan, subjects=subjects, reference=reference,
            starts=starts, host=facts, disturbance=watch.stop(), board=board, energy=energy,
        )  # fmt: skip
        energy.close()
    return result_of(measured)


def _subject(
    name: str, model: Bundle | bytes, spelled: str, bundle: Bundle, settings: Settings
) -> Subject:
    return Subject(
        name=name, spelled=spelled, model=model, inputs=inputs_of(bundle, settings.samples),
        threads=settings.threads, spin=settings.spin, settle=settings.settle,
        transfers=settings.transfers,
    )  # fmt: skip


def _baseline(bundle: Bundle, settings: Settings) -> Subject | None:
    name, first = settings.baseline, settings.backends[0]
    own_only = first.split(":")[0] in _OWN_MODEL_ONLY
    if name is None:
        name = DEFAULT if own_only else "dense"
    if name == "none":
        return None
    if name != "dense":
        return _subject(name, bundle, name, bundle, settings)
    if own_only:
        raise UsageError(
            f"{first} runs no graph but the bundle's, so there is no dense baseline for it",
            remedy=f"Name another one, as in --baseline {DEFAULT}",
        )
    return _subject("dense", filled_model(bundle.model_bytes()), first, bundle, settings)


def _start(bundle: Bundle, one: Subject, settings: Settings, progress: Progress) -> Start | None:
    if not settings.processes:
        return None
    return measure_start(
        bundle.path,
        one.model if isinstance(one.model, bytes) else None,
        one.spelled,
        samples=settings.samples,
        threads=settings.threads,
        spin=settings.spin,
        processes=settings.processes,
        progress=progress,
    )


@contextmanager
def _instruments(everyone: Sequence[Subject]) -> Iterator[tuple[Board, Energy]]:
    """What tells of GPU and energy while measuring."""
    infos = [one.backend.info() for one in everyone]
    with ExitStack() as stack:
        board = Board.open(stack, [info for info in infos if uses_gpu(info)])
        yield board, open_energy(board.gpu, board.stats)


def _measure(
    subjects: Sequence[Subject],
    plan: Plan,
    settings: Settings,
    board: Board,
    watch: Watch,
    energy: Energy,
    progress: Progress,
) -> None:
    interval_s = None if plan.rate is None else 1 / plan.rate
    total, done = plan.rounds * len(subjects), 0
    again = max(settings.settle, min(settings.warm_queries, plan.queries // 20) // plan.loads)
    # What is not counted comes on top of the time asked for.
    until = None if settings.max_time is None else time.monotonic() + 3 * settings.max_time
    for turn in range(plan.rounds):
        # Which is loaded, and measured, first changes from round to round.
        order = subjects if turn % 2 == 0 else subjects[::-1]
        if plan.starts_load(turn):
            if until is not None and time.monotonic() > until:
                return
            for one in order:
                one.load()
                one.warm_up(again)
        for one in order:
            one.block(plan.share(turn), interval_s, energy)
            board.look()
            done += 1
            progress(done, total, "measuring")
        watch.look()
