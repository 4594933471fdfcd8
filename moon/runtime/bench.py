"""Latency one can trust: a bundle and a baseline, measured in turn in the same run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.errors import UsageError
from moon.progress import Progress, silent
from moon.runtime.agreement import precision_of
from moon.runtime.backend import DEFAULT
from moon.runtime.bench_host import Disturbance, EnergyMeter, Watch, host
from moon.runtime.bench_stats import drift, ratio
from moon.runtime.bench_subject import SETTLE, Subject, filled_model, load
from moon.runtime.verify import golden_bars, golden_outputs, parity

__all__ = ["SCENARIOS", "bench"]

SCHEMA_VERSION = 1
# MLPerf's single stream asks for so many queries, its multi-stream for so many samples in each.
ENOUGH_QUERIES = 1024
MULTI_SAMPLES = 8
SCENARIOS = ("single", "multi", "rate")
_ROUNDS = 32
_POOL = 16
_DRIFT = 0.05
_BUSY = 0.10
_UTILISATION = 0.5


@dataclass(frozen=True, kw_only=True)
class _Config:
    """How it is measured; written into the result."""

    scenario: str
    batch: int
    samples: int
    threads: int
    queries: int
    warmup: int
    rounds: int
    settle: int
    spin: bool
    rate: float | None
    preprocessing: str = "not included"
    transfers: str = "from and to host memory, within the query where the backend has its own"
    order: str = "blocks of all subjects in turn, every second round reversed"


def bench(
    bundle: Bundle | str | os.PathLike[str],
    *,
    backends: Sequence[str] = (DEFAULT,),
    baseline: str = "dense",
    batch: int = 1,
    threads: int = 1,
    scenario: str = "single",
    queries: int = ENOUGH_QUERIES,
    warmup: int | None = None,
    rate: float | None = None,
    spin: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a bundle's inference latency against a baseline.

    Args:
        bundle: the bundle or its folder; need not be calibrated.
        backends: what to measure; the first is the result's own, the rest are its ``others``.
        baseline: ``dense``, the same graph with its zeros filled at random, in the first
            backend; a backend's name; or ``none``.
        batch: images in a query (single and rate).
        threads: for one inference, the same for every subject; 0 for all cores.
        scenario: ``single``: one query after another; ``multi``: the same with 8 images in
            each; ``rate``: a query falls due at fixed intervals whether or not the last is
            done, and its latency counts from then.
        queries: of each subject.
        warmup: uncounted queries of each subject first; default a twentieth of ``queries``.
        rate: queries a second (rate); default half of what the slowest subject can do.
        spin: let idle threads of the backend spin.
        progress: told how many blocks are done.

    Returns:
        The result as JSON holds it: figures in milliseconds, images a second and joules,
        ``speedup`` = baseline / subject with its 95% interval, ``warnings``, and ``valid``,
        false when a warning puts the figures in doubt. What could not be measured is null
        with its reason under ``unavailable``.

    Raises:
        UsageError: an argument is out of range.
        BackendError: a backend cannot run here.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    samples = MULTI_SAMPLES if scenario == "multi" else batch
    _check_arguments(backends, scenario, batch, queries, rate)
    warm = max(10, queries // 20) if warmup is None else warmup
    inputs = _inputs(opened, samples)
    subjects = [load(name, opened, name, inputs, threads=threads, spin=spin) for name in backends]
    reference = _baseline(opened, baseline, backends[0], inputs, threads, spin)
    everyone = subjects + ([reference] if reference is not None else [])
    slowest = max(subject.warm_up(warm) for subject in everyone)
    if scenario == "rate" and rate is None:
        rate = _UTILISATION / slowest
    rounds = min(_ROUNDS, queries)
    config = _Config(
        scenario=scenario, batch=batch, samples=samples, threads=threads, queries=queries,
        warmup=warm, rounds=rounds, settle=SETTLE, spin=spin,
        rate=rate if scenario == "rate" else None,
    )  # fmt: skip
    meter, before = EnergyMeter(), host()
    watch = Watch()
    _measure(everyone, config, meter, progress)
    disturbance = watch.stop()
    return _result(opened, subjects, reference, config, meter, before, disturbance)


def _check_arguments(
    backends: Sequence[str], scenario: str, batch: int, queries: int, rate: float | None
) -> None:
    if scenario not in SCENARIOS:
        raise UsageError(
            f"no scenario is called {scenario}", remedy=f"Choose one of {', '.join(SCENARIOS)}"
        )
    if not backends or len(set(backends)) != len(backends):
        raise UsageError("name one or more different backends")
    if batch < 1 or queries < 1:
        raise UsageError(f"batch and queries must be 1 or more, not {batch} and {queries}")
    if scenario == "multi" and batch not in (1, MULTI_SAMPLES):
        raise UsageError(f"the scenario multi always has {MULTI_SAMPLES} images in a query")
    if rate is not None and (scenario != "rate" or not (math.isfinite(rate) and rate > 0)):
        raise UsageError("a rate must be a positive number, and needs the scenario rate")


def _inputs(bundle: Bundle, samples: int) -> list[NDArray[Any]]:
    """Golden images as batches, prepared beforehand and used in turn."""
    pixels = bundle.golden()["pixels"]
    as_is = bundle.manifest.input.dtype == "uint8"
    batches = []
    for i in range(max(1, min(_POOL, len(pixels)))):
        chosen = pixels[(np.arange(samples) + i) % len(pixels)]
        batches.append(chosen if as_is else bundle.preprocess.normalise(chosen))
    return batches


def _baseline(
    bundle: Bundle,
    baseline: str,
    backend: str,
    inputs: list[NDArray[Any]],
    threads: int,
    spin: bool,
) -> Subject | None:
    if baseline == "none":
        return None
    if baseline == "dense":
        dense = filled_model(bundle.model_bytes())
        return load("dense", dense, backend, inputs, threads=threads, spin=spin)
    return load(baseline, bundle, baseline, inputs, threads=threads, spin=spin)


def _measure(
    subjects: list[Subject], config: _Config, meter: EnergyMeter, progress: Progress
) -> None:
    interval_s = None if config.rate is None else 1 / config.rate
    total = config.rounds * len(subjects)
    done = 0
    for turn in range(config.rounds):
        share = config.queries // config.rounds + (turn < config.queries % config.rounds)
        for subject in subjects if turn % 2 == 0 else reversed(subjects):
            subject.block(share, interval_s, meter)
            done += 1
            progress(done, total, "measuring")


def _result(
    bundle: Bundle,
    subjects: list[Subject],
    reference: Subject | None,
    config: _Config,
    meter: EnergyMeter,
    before: dict[str, Any],
    disturbance: Disturbance,
) -> dict[str, Any]:
    measured = [_subject(bundle, subject, reference, meter) for subject in subjects]
    everyone = subjects + ([reference] if reference is not None else [])
    warnings = _warnings(everyone, config, disturbance, before)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(bundle),
        **measured[0],
        "others": measured[1:],
        "baseline": None,
        "host": {**before, **asdict(disturbance)},
        "gpu": None,
        "config": asdict(config),
        "unavailable": _unavailable(meter),
        "warnings": warnings,
        "valid": not warnings,
    }
    if reference is not None:
        info = _backend(reference)
        figures = reference.figures(meter)
        result["baseline"] = {"name": reference.name, "backend": info, **figures}
    return result


def _subject(
    bundle: Bundle, subject: Subject, reference: Subject | None, meter: EnergyMeter
) -> dict[str, Any]:
    golden = bundle.golden()
    threads = subject.backend.info().get("threads", 1)
    found = parity(
        golden,
        golden_outputs(bundle, subject.name, threads),
        precision=precision_of(bundle.manifest.precision, subject.name),
        threshold=golden_bars(bundle, golden, subject.name),
    )
    speedup = None if reference is None else ratio(reference.medians(), subject.medians())
    return {
        "backend": _backend(subject),
        "build_ms": None,
        **subject.figures(meter),
        "speedup": speedup,
        "parity": found.to_json(),
    }


def _backend(subject: Subject) -> dict[str, Any]:
    return {"sparse_layers": {"eligible": None, "picked": None}, **subject.backend.info()}


def _model(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    layers = manifest.sparsity.layers.values()
    entry = manifest.files["model.onnx"]
    return {
        "name": manifest.name,
        "version": manifest.version,
        "sha256": entry.sha256,
        "params": sum(math.prod(layer.shape) for layer in layers),
        "nnz": sum(layer.nonzeros for layer in layers),
        "sparsity": manifest.sparsity.share,
        "pattern": manifest.sparsity.pattern,
        "bytes": entry.size,
    }


def _unavailable(meter: EnergyMeter) -> dict[str, str]:
    """Why the nulls of a result are null."""
    reasons = {
        "build_ms": "the backend builds no engine",
        "host_to_device_ms": "the backend takes host memory; what it copies is within compute_ms",
        "device_to_host_ms": "the backend gives host memory; what it copies is within compute_ms",
        "backend.sparse_layers": "where null, the backend computes sparse layers as dense ones",
        "gpu": "no backend measured here tells of one",
    }
    return reasons if meter.readable else {**reasons, "energy": meter.reason}


def _warnings(
    subjects: list[Subject],
    config: _Config,
    disturbance: Disturbance,
    before: dict[str, Any],
) -> list[str]:
    """What puts the figures in doubt; any of it makes the result invalid."""
    found = []
    if config.queries < ENOUGH_QUERIES:
        found.append(f"{config.queries} queries are fewer than {ENOUGH_QUERIES}")
    for subject in subjects:
        change = drift(subject.medians())
        if abs(change) > _DRIFT:
            found.append(f"{subject.name} drifted by {change:+.1%} between the halves")
        if config.rate is not None:
            found += _overload(subject, config.rate)
    if disturbance.throttled:
        found.append(f"the processor throttled {disturbance.throttled} times")
    if disturbance.other_cpu is not None and disturbance.other_cpu > _BUSY:
        found.append(f"other processes used {disturbance.other_cpu:.0%} of the processor")
    load, cores = before["load"], before["cores"]
    if load and cores and load[0] > cores:
        found.append(f"the load was {load[0]:.1f} on {cores} cores at the start")
    return found


def _overload(subject: Subject, rate: float) -> list[str]:
    served = sum(map(len, subject.blocks)) / sum(subject.spans)
    if served >= 0.9 * rate:
        return []
    return [f"{subject.name} could not keep up with {rate:.1f} queries a second"]
