"""Two results of ``bench``, set against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moon.errors import UsageError
from moon.runtime.bench_stats import unpaired_ratio

__all__ = ["compare"]

_SAME = ("scenario", "samples", "threads", "rate", "spin")
_FIGURES = ("min", "mean", "p50", "p90", "p95", "p99", "max")


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """How much faster ``b`` is than ``a``.

    Two runs are not interleaved, so whatever changed on the machine between them is in the
    ratio; ``differences`` lists what is known to differ.

    Args:
        a, b: results of :func:`moon.runtime.bench.bench`.

    Returns:
        ``speedup`` {ratio, ci95} of a's latency to b's, ``latency_ms`` with a, b and their
        ratio for each figure, ``throughput`` likewise, ``differences``, and ``comparable``,
        false when these include the way of measuring or the machine, or a run was invalid.

    Raises:
        UsageError: one of them is not such a result.
    """
    for result in (a, b):
        _check(result)
    differences = _differences(a, b)
    invalid = [name for name, result in (("a", a), ("b", b)) if not result["valid"]]
    return {
        "schema_version": 1,
        "a": _who(a),
        "b": _who(b),
        "speedup": unpaired_ratio(a["block_p50_ms"], b["block_p50_ms"]),
        "latency_ms": {
            name: _pair(a["latency_ms"][name], b["latency_ms"][name]) for name in _FIGURES
        },
        "throughput": _pair(a["throughput"], b["throughput"], higher_is_better=True),
        "differences": differences,
        "invalid": invalid,
        "comparable": not differences and not invalid,
    }


def _check(result: Mapping[str, Any]) -> None:
    needed = ("schema_version", "block_p50_ms", "latency_ms", "throughput", "config", "host")
    plain = isinstance(result, Mapping) and all(name in result for name in needed)
    if not plain or result["schema_version"] != 1 or not result["block_p50_ms"]:
        raise UsageError(
            "this is not a result of moon bench", remedy="Write one with moon bench --out"
        )


def _who(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": result["model"], "backend": result["backend"]}


def _pair(a: float, b: float, *, higher_is_better: bool = False) -> dict[str, float]:
    """Both figures, and how many times better b's is."""
    return {"a": a, "b": b, "ratio": b / a if higher_is_better else a / b}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    found = [
        f"{name}: {a['config'].get(name)} and {b['config'].get(name)}"
        for name in _SAME
        if a["config"].get(name) != b["config"].get(name)
    ]
    for name in ("cpu", "isa", "cores", "affinity", "governor"):
        one, other = a["host"].get(name), b["host"].get(name)
        if one != other:
            found.append(f"host {name}: {one} and {other}")
    return found
