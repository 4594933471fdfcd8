"""What was measured, as a result of ``moon bench`` holds it (``bench_schema.json``)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moon.bundle import Bundle
from moon.files import sha256_bytes
from moon.runtime.agreement import precision_of
from moon.runtime.bench_board import Board
from moon.runtime.bench_energy import Energy
from moon.runtime.bench_host import host_notes
from moon.runtime.bench_process import Start
from moon.runtime.bench_settings import ENOUGH_QUERIES, Plan, Settings
from moon.runtime.bench_stats import drift, ratio, verdict
from moon.runtime.bench_subject import Subject, uses_gpu
from moon.runtime.bench_watch import Disturbance
from moon.runtime.verify import golden_bars, parity, run_golden

__all__ = ["SCHEMA_FILE", "SCHEMA_VERSION", "Measured", "result_of"]

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("bench_schema.json")
_DRIFT = 0.05


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that a run left.

    Attributes:
        starts: of the subjects and the reference, in this order; None where not measured.
        host: of :func:`moon.runtime.bench_host.host`, before.
    """

    bundle: Bundle
    settings: Settings
    plan: Plan
    subjects: Sequence[Subject]
    reference: Subject | None
    starts: Sequence[Start | None]
    host: dict[str, Any]
    disturbance: Disturbance
    board: Board
    energy: Energy

    @property
    def everyone(self) -> list[Subject]:
        return [*self.subjects, *([self.reference] if self.reference is not None else [])]


def result_of(run: Measured) -> dict[str, Any]:
    """The result, ready to be written as JSON."""
    unavailable: dict[str, str] = {}
    measured = [_compared(run, i, unavailable) for i in range(len(run.subjects))]
    reference = None
    if run.reference is not None:
        name = run.reference.name
        figures, missing = _figures(run, len(run.subjects))
        for field, reason in missing.items():
            unavailable.setdefault(field, reason)
        reference = {"name": name, "model_sha256": _sha256(run.reference), **figures}
    gpu = run.board.facts()
    if gpu is None:
        unavailable["gpu"] = run.board.reason
    warnings = _warnings(run)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": _model(run.bundle),
        **measured[0],
        "others": measured[1:],
        "baseline": reference,
        "host": {
            **run.host,
            **asdict(run.disturbance),
            "cooling": list(run.disturbance.cooling),
        },
        "gpu": gpu,
        "config": _config(run),
        "unavailable": unavailable,
        "warnings": warnings,
        "notes": _notes(run),
        "valid": not warnings,
    }


def _compared(run: Measured, index: int, unavailable: dict[str, str]) -> dict[str, Any]:
    subject, reference = run.subjects[index], run.reference
    figures, missing = _figures(run, index)
    for field, reason in missing.items():
        unavailable.setdefault(field, reason)
    speedup = None
    if reference is not None:
        speedup = ratio(reference.medians(), subject.medians(), subject.groups)
        speedup["verdict"] = verdict(speedup)
    golden, spelled = run.bundle.golden(), subject.spelled
    found = parity(
        golden,
        run_golden(run.bundle, subject.backend),
        precision=precision_of(
            run.bundle.manifest.precision, spelled, subject.backend.info()["precision"]
        ),
        threshold=golden_bars(run.bundle, golden, spelled),
    )
    return {**figures, "speedup": speedup, "parity": found.to_json()}


def _figures(run: Measured, index: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Of a subject or the reference, and why what is null is."""
    subject, start = run.everyone[index], run.starts[index]
    figures, missing = subject.figures(run.energy)
    info = subject.backend.info()
    build_ms, why = _build_ms(run.bundle, info)
    if build_ms is None:
        missing["build_ms"] = why
    if start is not None:
        began = start.figures()
    else:
        missing |= dict.fromkeys(("start", "peak_bytes"), "no fresh processes were asked for")
        cold, warm = subject.first_ms[0]
        began = {
            "load_ms": subject.loads_ms[0],
            "first_inference_ms": {"cold": cold, "warm": warm},
            "peak_bytes": None,
            "start": None,
        }
    layers = {"eligible": None, "picked": None, **(info.pop("sparse_layers", None) or {})}
    if layers["eligible"] is None:
        missing["backend.sparse_layers"] = layers.get("why") or (
            "where null, the backend computes sparse layers as dense ones, or does not tell"
        )
    backend = {**info, "spelled": subject.spelled, "sparse_layers": layers}
    return {"backend": backend, "build_ms": build_ms, **began, **figures}, missing


def _build_ms(bundle: Bundle, info: dict[str, Any]) -> tuple[float | None, str]:
    """How long an engine took to build, by the record beside it in the bundle."""
    engine = info.get("engine")
    if not isinstance(engine, str):
        return None, "the backend builds no engine"
    name = re.sub(r"\.engine(\.zst)?$", ".json", engine)
    try:
        seconds = json.loads(bundle.file(name))["build_s"]
        return float(seconds) * 1e3, ""
    except (KeyError, TypeError, ValueError):
        return None, f"{name} does not tell how long the engine took to build"


def _config(run: Measured) -> dict[str, Any]:
    """How it was measured; what was asked beside what came of it."""
    settings, plan = run.settings, run.plan
    done = len(run.subjects[0].blocks)
    on_gpu = any(uses_gpu(one.backend.info()) for one in run.everyone)
    transfers = "none: host memory only"
    if on_gpu:
        transfers = "included" if settings.transfers else "not included"
    return {
        "scenario": settings.scenario,
        "batch": settings.batch,
        "samples": settings.samples,
        "threads": settings.threads,
        "queries": sum(map(len, run.subjects[0].blocks)),
        "warmup": settings.warm_queries,
        "settle": settings.settle,
        "rounds": done,
        "loads": len(set(run.subjects[0].groups)),
        "processes": settings.processes,
        "rate": plan.rate,
        "spin": settings.spin,
        "affinity": None if settings.affinity is None else list(settings.affinity),
        "cuda_graph": next(
            (one.backend.info().get("cuda_graph") for one in run.everyone
             if "cuda_graph" in one.backend.info()), None,
        ),
        "min_time": settings.min_time,
        "max_time": settings.max_time,
        "preprocessing": "not included",
        "transfers": transfers,
        "order": "blocks of all subjects in turn, every second round reversed",
        "cold": _COLD if settings.processes else _NOT_COLD,
    }  # fmt: skip


_COLD = "medians of fresh processes, one after the other; files in the page cache"
_NOT_COLD = "in the measuring process, after whatever it did before"


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


def _sha256(subject: Subject) -> str:
    model = subject.model
    if isinstance(model, bytes):
        return sha256_bytes(model)
    return model.manifest.files["model.onnx"].sha256


def _warnings(run: Measured) -> list[str]:
    """What puts the figures in doubt; any of it makes the result invalid."""
    found = []
    queries = sum(map(len, run.subjects[0].blocks))
    if queries < ENOUGH_QUERIES:
        found.append(f"{queries} queries are fewer than {ENOUGH_QUERIES}")
    for subject in run.everyone:
        change = drift(subject.medians())
        if abs(change) > _DRIFT:
            found.append(f"{subject.name} drifted by {change:+.1%} between the halves")
        if run.plan.rate is not None:
            found += _overload(subject, run.plan.rate)
    found += run.disturbance.doubts()
    found += run.board.doubts()
    load, cores = run.host["load"], run.host["cores"]
    if load and cores and load[0] > cores:
        found.append(f"the load was {load[0]:.1f} on {cores} cores at the start")
    return found


def _overload(subject: Subject, rate: float) -> list[str]:
    served = sum(map(len, subject.blocks)) / sum(subject.spans)
    if served >= 0.9 * rate:
        return []
    return [f"{subject.name} could not keep up with {rate:.1f} queries a second"]


def _notes(run: Measured) -> list[str]:
    """What is worth knowing, and makes nothing invalid."""
    notes = host_notes(run.host, run.settings.threads)
    for subject in run.everyone:
        told = str(subject.backend.info().get("handed_over") or "\0")  # told anyway
        notes += [f"{subject.name}: {line}" for line in subject.said if told not in line]
    fast = [one.name for one in run.everyone if drift(one.medians()) < -_DRIFT]
    if fast:
        notes.append(f"{', '.join(fast)} grew faster while measured: --warmup more queries")
    return notes
