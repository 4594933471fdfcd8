"""What a measurement ran on, and what disturbed it: facts Linux tells without privileges."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Disturbance", "EnergyMeter", "Watch", "host"]

_CPUS = Path("/sys/devices/system/cpu")
_RAPL = Path("/sys/class/powercap")
# Of the CPU's flags, those that decide how fast convolutions are.
_ISA = (
    "sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_tile",
    "asimd", "asimddp", "sve",
)  # fmt: skip


def host() -> dict[str, Any]:
    """CPU, instruction sets, cores, affinity, governor, load and system; null where unknown."""
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "isa": [name for name in _ISA if name in flags],
        "cores": os.cpu_count(),
        "affinity": affinity,
        "governor": _text(_CPUS / "cpu0/cpufreq/scaling_governor"),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Disturbance:
    """What else happened while measuring.

    Attributes:
        other_cpu: share of all cores that other processes used, None where unknown.
        throttled: thermal throttling events, None where the system does not count them.
    """

    other_cpu: float | None
    throttled: int | None


class Watch:
    """Counts disturbances from when it is made until :meth:`stop`."""

    def __init__(self) -> None:
        self._start = self._now()

    def stop(self) -> Disturbance:
        """What happened since."""
        now, start = self._now(), self._start
        other = None
        if now.busy_s is not None and start.busy_s is not None:
            elapsed = (now.wall_s - start.wall_s) * (os.cpu_count() or 1)
            used = (now.busy_s - start.busy_s) - (now.own_s - start.own_s)
            other = min(1.0, max(0.0, used / elapsed)) if elapsed > 0 else None
        throttled = None
        if now.throttled is not None and start.throttled is not None:
            throttled = now.throttled - start.throttled
        return Disturbance(other, throttled)

    @staticmethod
    def _now() -> _Counters:
        own = os.times()
        return _Counters(time.monotonic(), _busy_seconds(), own.user + own.system, _throttles())


@dataclass(frozen=True)
class _Counters:
    wall_s: float
    busy_s: float | None
    own_s: float
    throttled: int | None


class EnergyMeter:
    """Joules the processor packages have used, by RAPL; unreadable on most machines."""

    def __init__(self) -> None:
        self._counters: list[tuple[Path, int]] = []
        self.reason = "there is no readable RAPL counter"
        for zone in sorted(_RAPL.glob("intel-rapl:[0-9]")):
            limit = _number(zone / "max_energy_range_uj")
            if _number(zone / "energy_uj") is None or limit is None:
                self._counters = []
                self.reason = "the RAPL counters may not be read by this user"
                return
            self._counters.append((zone / "energy_uj", limit))

    @property
    def readable(self) -> bool:
        return bool(self._counters)

    def read(self) -> list[int]:
        """The counters now, to hand to :meth:`since`."""
        return [_number(path) or 0 for path, _ in self._counters]

    def since(self, before: list[int]) -> float:
        """Joules since ``before``; a counter that wrapped around once is put right."""
        steps = zip(self.read(), before, self._counters, strict=True)
        return sum((now - then) % limit for now, then, (_, limit) in steps) / 1e6


def _cpuinfo() -> dict[str, str]:
    text = _text(Path("/proc/cpuinfo")) or ""
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in lines}


def _busy_seconds() -> float | None:
    line = (_text(Path("/proc/stat")) or "").split("\n", 1)[0].split()
    if len(line) < 9 or line[0] != "cpu":
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, line[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _throttles() -> int | None:
    counts = [_number(path) for path in _CPUS.glob("cpu*/thermal_throttle/core_throttle_count")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
