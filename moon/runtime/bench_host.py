"""What a measurement runs on: facts Linux tells without privileges."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moon.errors import UsageError
from moon.runtime.cores import usable_cores

__all__ = ["host", "host_notes", "parse_cores", "pinned", "read_number", "read_text"]

# Of the CPU's flags, those that decide how fast convolutions are.
_ISA = (
    "sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_tile",
    "asimd", "asimddp", "sve",
)  # fmt: skip


def host(root: Path = Path("/")) -> dict[str, Any]:
    """CPU, instruction sets, cores, what sets their clocks, load and system; null where unknown.

    Args:
        root: where /proc and /sys are.
    """
    facts = _cpuinfo(root)
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    first = root / f"sys/devices/system/cpu/cpu{affinity[0] if affinity else 0}"
    return {
        "cpu": facts.get("model name") or _board(root) or platform.processor() or _machine(),
        "isa": [name for name in _ISA if name in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(root),
        "affinity": affinity,
        "siblings": _siblings(root, affinity or []),
        "governor": read_text(first / "cpufreq/scaling_governor"),
        "turbo": _turbo(root),
        "virtual": "hypervisor" in flags if "flags" in facts else None,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def host_notes(facts: dict[str, Any], threads: int) -> list[str]:
    """What about a host makes latencies vary, though it does not by itself make them wrong.

    Args:
        facts: of :func:`host`.
        threads: asked for; 0 for all cores.
    """
    notes = []
    governor = facts["governor"]
    if governor is None:
        where = "a virtual machine hides" if facts["virtual"] else "the system does not tell"
        notes.append(f"{where} what sets the clocks, so nobody can say whether they were fixed")
    elif governor != "performance":
        notes.append(f"the CPU governor is {governor}: clocks follow the load; performance is best")
    if facts["turbo"]:
        notes.append("turbo is on: clocks depend on heat and on what neighbouring cores do")
    if facts["siblings"]:
        pairs = ", ".join(map(str, facts["siblings"]))
        notes.append(f"SMT is on: the cores {pairs} share a unit with those measured on")
    usable = facts["usable_cores"]
    if facts["affinity"] and usable < len(facts["affinity"]):
        notes.append(f"the container grants {usable} of {len(facts['affinity'])} cores' time")
    if threads > usable:
        notes.append(f"{threads} threads share {usable} usable cores")
    return notes


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers of ``0,2-3``, as taskset spells them.

    Raises:
        UsageError: spelled otherwise.
    """
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(
                f"{text!r} is no list of cores", remedy="Write cores as 0 or 2,3 or 4-7"
            )
        cores.update(range(int(first), int(last if dash else first) + 1))
    if not cores:
        raise UsageError(f"{text!r} names no core", remedy="Write cores as 0 or 2,3 or 4-7")
    return tuple(sorted(cores))


@contextmanager
def pinned(cores: Sequence[int] | None) -> Iterator[None]:
    """Keep this process, and those it starts, on some cores until the block ends.

    Raises:
        UsageError: it may not use these cores, or the system cannot pin.
    """
    if cores is None:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("this system cannot pin a process to cores", remedy="Leave --affinity out")
    before = os.sched_getaffinity(0)
    absent = sorted(set(cores) - before)
    if absent:
        raise UsageError(
            f"this process may not use core {absent[0]}",
            remedy=f"Choose from {', '.join(map(str, sorted(before)))}",
        )
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def read_number(path: Path) -> int | None:
    """A whole number in a file of /proc or /sys, None where there is none."""
    text = read_text(path)
    return int(text) if text is not None and text.isdigit() else None


def read_text(path: Path) -> str | None:
    """A file of /proc or /sys, None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip("\0 \t\n")
    except (OSError, UnicodeDecodeError):
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    text = read_text(root / "proc/cpuinfo") or ""
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in lines}


def _board(root: Path) -> str | None:
    """What an ARM board calls itself, such as NVIDIA Jetson Orin Nano Developer Kit."""
    return read_text(root / "proc/device-tree/model") or None


def _machine() -> str:
    return platform.machine()


def _siblings(root: Path, cores: Sequence[int]) -> list[int]:
    """Cores outside ``cores`` that share a physical core with one of them."""
    found: set[int] = set()
    for core in cores:
        folder = root / f"sys/devices/system/cpu/cpu{core}/topology"
        text = read_text(folder / "thread_siblings_list") or ""
        if text:
            found.update(parse_cores(text))
    return sorted(found - set(cores))


def _turbo(root: Path) -> bool | None:
    cpus = root / "sys/devices/system/cpu"
    off = read_number(cpus / "intel_pstate/no_turbo")
    if off is not None:
        return not off
    boost = read_number(cpus / "cpufreq/boost")
    return None if boost is None else bool(boost)
