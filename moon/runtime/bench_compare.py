"""Two results of ``bench``, set against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import UsageError
from moon.runtime.bench_stats import by_group, unpaired, verdict

__all__ = ["NOT_COMPARABLE", "compare"]

NOT_COMPARABLE = "not comparable"
_SAME = ("scenario", "samples", "threads", "rate", "spin", "transfers", "cuda_graph")
_SAME_HOST = ("cpu", "isa", "cores", "affinity", "governor", "turbo")
_SAME_GPU = ("name", "power_mode")
_FIGURES = ("min", "mean", "p50", "p90", "p95", "p99", "max")
_NEEDED = ("schema_version", "block_p50_ms", "latency_ms", "throughput", "config", "host", "valid")
# Beyond this, what changed between the runs is more than noise within them.
_SHIFT = 0.05


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """How much faster ``b`` is than ``a``.

    Two runs are not interleaved, so whatever changed on the machine between them is in the
    ratio of their latencies. Where both were measured beside the same baseline, that is the
    yardstick: what changed for it as well cancels out, and the verdict is by that.

    Args:
        a, b: results of :func:`moon.runtime.bench.bench`.

    Returns:
        ``verdict``: ``faster``, ``slower``, ``no difference shown`` or ``not comparable``;
        ``speedup`` {ratio, ci95, by}, which it rests on, ``by`` being ``baseline`` or
        ``latency``; ``unadjusted`` {ratio, ci95}, of the latencies alone; ``baseline_shift``,
        how much faster the common baseline ran in b, or None; ``latency_ms`` with a, b and their
        ratio for each figure, ``throughput`` likewise; ``others``, the same for other backends
        that both measured; ``differences`` and ``invalid``, which are why it is not comparable;
        ``changed``, versions that differ; ``notes``.

    Raises:
        UsageError: one of them is not such a result.
    """
    for result in (a, b):
        _check(result)
    differences = _differences(a, b)
    invalid = [name for name, result in (("a", a), ("b", b)) if not result["valid"]]
    comparable = not differences and not invalid
    baseline = _common_baseline(a, b)
    shift = None if baseline is None else _ratio(baseline[0], baseline[1])["ratio"]
    notes = []
    if shift is not None and abs(math.log(shift)) > _SHIFT:
        notes.append(f"the baseline itself ran {shift:.3g} times as fast in b: the machine changed")
    if baseline is None and comparable:
        notes.append(
            "no common baseline: the interval knows nothing of what changed between the two runs"
        )
    return {
        "schema_version": 1,
        "a": _who(a),
        "b": _who(b),
        **_versus(a, b, baseline, comparable),
        "baseline_shift": shift,
        "others": _others(a, b, baseline, comparable),
        "differences": differences,
        "invalid": invalid,
        "comparable": comparable,
        "changed": _changed(a, b),
        "notes": notes,
    }


def _check(result: Mapping[str, Any]) -> None:
    plain = isinstance(result, Mapping) and all(name in result for name in _NEEDED)
    if not plain or result["schema_version"] != 1 or not result["block_p50_ms"]:
        raise UsageError(
            "this is not a result of moon bench", remedy="Write one with moon bench --out"
        )


def _who(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": result["model"], "backend": result["backend"]}


def _versus(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    baseline: tuple[Mapping[str, Any], Mapping[str, Any]] | None,
    comparable: bool,
) -> dict[str, Any]:
    """One subject of each result against the other."""
    unadjusted = _ratio(a, b)
    by, speedup = "latency", unadjusted
    if baseline is not None:
        # Each run's own ratio to the yardstick, by rounds, so that slow rounds cancel out too.
        by = "baseline"
        speedup = unpaired(_logs(a, baseline[0]), _logs(b, baseline[1]))
    return {
        "verdict": verdict(speedup) if comparable else NOT_COMPARABLE,
        "speedup": {**speedup, "by": by},
        "unadjusted": unadjusted,
        "latency_ms": {
            name: _pair(a["latency_ms"][name], b["latency_ms"][name]) for name in _FIGURES
        },
        "throughput": _pair(a["throughput"], b["throughput"], higher_is_better=True),
    }


def _logs(one: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> NDArray[np.float64]:
    """Logarithms of latencies, relative to a baseline's of the same rounds, by loading."""
    medians = np.asarray(one["block_p50_ms"], dtype=np.float64)
    if baseline is not None:
        medians = medians / np.asarray(baseline["block_p50_ms"], dtype=np.float64)
    return by_group(medians, one.get("block_load") or [0] * len(medians))


def _ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return unpaired(_logs(a), _logs(b))


def _common_baseline(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Both baselines, where they are the same graph in the same backend."""
    one, other = a.get("baseline"), b.get("baseline")
    if not one or not other or not one.get("model_sha256"):
        return None
    backend = ("name", "version", "provider", "precision", "spelled")
    same = one["model_sha256"] == other.get("model_sha256") and all(
        one["backend"].get(name) == other["backend"].get(name) for name in backend
    )
    rounds = (
        [len(side["block_p50_ms"]) for side in (a, one)],
        [len(side["block_p50_ms"]) for side in (b, other)],
    )
    paired = all(first == second for first, second in rounds)
    return (one, other) if same and paired else None


def _others(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    baseline: tuple[Mapping[str, Any], Mapping[str, Any]] | None,
    comparable: bool,
) -> list[dict[str, Any]]:
    """The other backends that both measured."""
    theirs = {one["backend"]["spelled"]: one for one in b.get("others", ())}
    pairs = [
        (one, theirs[one["backend"]["spelled"]])
        for one in a.get("others", ())
        if one["backend"]["spelled"] in theirs
    ]
    return [
        {"backend": one["backend"]["spelled"], **_versus(one, other, baseline, comparable)}
        for one, other in pairs
    ]


def _pair(a: float, b: float, *, higher_is_better: bool = False) -> dict[str, float]:
    """Both figures, and how many times better b's is."""
    return {"a": a, "b": b, "ratio": b / a if higher_is_better else a / b}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Ways of measuring and machines that differ."""
    found = []
    sides = (
        ("", _SAME, a["config"], b["config"]),
        ("host ", _SAME_HOST, a["host"], b["host"]),
        ("gpu ", _SAME_GPU, a.get("gpu") or {}, b.get("gpu") or {}),
    )
    for prefix, names, one, other in sides:
        for name in names:
            if one.get(name) != other.get(name):
                found.append(f"{prefix}{name}: {one.get(name)} and {other.get(name)}")
    return found


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs and may be what one wants to compare."""
    pairs = [
        ("model", a["model"].get("sha256", "")[:12], b["model"].get("sha256", "")[:12]),
        *(
            (name, a["backend"].get(name), b["backend"].get(name))
            for name in ("spelled", "version", "provider", "precision")
        ),
        ("system", a["host"].get("system"), b["host"].get("system")),
        ("driver", (a.get("gpu") or {}).get("driver"), (b.get("gpu") or {}).get("driver")),
    ]
    return [f"{name}: {one} and {other}" for name, one, other in pairs if one != other]
