"""What disturbed a measurement: other processes, stolen time, throttling."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from moon.runtime.bench_host import read_number, read_text
from moon.runtime.cores import usable_cores

__all__ = ["Disturbance", "Watch"]

# Cooling devices whose state is above zero while clocks are held down because of heat. Fans are
# cooling devices too, and running is what they are for.
_SLOWS = re.compile(r"cpufreq|devfreq|throttle|^processor$|gpu_cooling", re.IGNORECASE)


@dataclass(frozen=True)
class Disturbance:
    """What else happened while measuring; None where the system does not tell.

    Attributes:
        other_cpu: share of all cores' time that other processes used.
        stolen: share of all cores' time that the hypervisor gave to others.
        waited: share of the time for which the measuring thread could have run and had no core.
        quota_s: seconds for which a container's CPU quota was used up.
        throttled: throttling events that the CPU (heat) or a Jetson (heat, over-current) counted.
        cooling: devices that held clocks down because of heat.
    """

    other_cpu: float | None
    stolen: float | None
    waited: float | None
    quota_s: float | None
    throttled: int | None
    cooling: tuple[str, ...]

    def doubts(self) -> list[str]:
        """What of it puts a measurement in doubt."""
        found = []
        if self.throttled:
            found.append(f"the processor throttled {self.throttled} times")
        if self.cooling:
            found.append(f"heat held clocks down: {', '.join(self.cooling)}")
        if self.other_cpu is not None and self.other_cpu > _BUSY:
            found.append(f"other processes used {self.other_cpu:.0%} of the processor")
        if self.waited is not None and self.waited > _WAITED:
            found.append(f"the measuring thread waited {self.waited:.0%} of the time for a core")
        if self.stolen is not None and self.stolen > _WAITED:
            found.append(f"other virtual machines took {self.stolen:.0%} of the processor")
        if self.quota_s:
            found.append(f"the container's CPU quota was used up for {self.quota_s:.1f} s")
        return found


_BUSY = 0.10
_WAITED = 0.02


class Watch:
    """Counts disturbances from when it is made until :meth:`stop`.

    Args:
        root: where /proc and /sys are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._cooling: set[str] = set()
        self._start = self._now()

    def look(self) -> None:
        """Look at what only shows at the moment: call now and then while measuring."""
        for device in (self._root / "sys/class/thermal").glob("cooling_device*"):
            kind = read_text(device / "type") or ""
            if _SLOWS.search(kind) and read_number(device / "cur_state"):
                self._cooling.add(kind)

    def stop(self) -> Disturbance:
        """What happened since; the thread that calls is the one that measured."""
        self.look()
        now, start = self._now(), self._start
        wall = now.wall_s - start.wall_s
        elapsed = wall * (os.cpu_count() or 1)
        other = stolen = None
        if now.cpu is not None and start.cpu is not None and elapsed > 0:
            used = (now.cpu[0] - start.cpu[0]) - (now.own_s - start.own_s)
            other = min(1.0, max(0.0, used / elapsed))
            stolen = min(1.0, max(0.0, (now.cpu[1] - start.cpu[1]) / elapsed))
        waited = _less(now.waited_s, start.waited_s)
        throttled = _less(now.throttled, start.throttled)
        return Disturbance(
            other_cpu=other,
            stolen=stolen,
            waited=None if waited is None or wall <= 0 else min(1.0, waited / wall),
            quota_s=_less(now.quota_s, start.quota_s),
            throttled=None if throttled is None else int(throttled),
            cooling=tuple(sorted(self._cooling)),
        )

    def _now(self) -> _Counters:
        own, root = os.times(), self._root
        return _Counters(
            wall_s=time.monotonic(),
            own_s=own.user + own.system,
            cpu=_cpu_seconds(root),
            waited_s=_waited_seconds(root),
            quota_s=_quota_seconds(root),
            throttled=_throttles(root),
        )


@dataclass(frozen=True)
class _Counters:
    wall_s: float
    own_s: float
    cpu: tuple[float, float] | None
    waited_s: float | None
    quota_s: float | None
    throttled: int | None


def _less(now: float | None, start: float | None) -> float | None:
    return None if now is None or start is None else now - start


def _cpu_seconds(root: Path) -> tuple[float, float] | None:
    """Seconds for which all cores were busy or stolen, and those stolen."""
    line = (read_text(root / "proc/stat") or "").split("\n", 1)[0].split()
    if len(line) < 9 or line[0] != "cpu":
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, line[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq + steal) / tick, steal / tick


def _waited_seconds(root: Path) -> float | None:
    """Seconds this thread was ready to run and did not, by Documentation/scheduler/sched-stats."""
    fields = (read_text(root / "proc/thread-self/schedstat") or "").split()
    return int(fields[1]) / 1e9 if len(fields) >= 2 and fields[1].isdigit() else None


def _quota_seconds(root: Path) -> float | None:
    """Seconds for which this process's control group was stopped by its CPU quota."""
    if usable_cores(root) >= (os.cpu_count() or 1):
        return None
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        places = [root / "sys/fs/cgroup" / group.lstrip("/"), root / "sys/fs/cgroup"]
        if controllers:
            places = [root / "sys/fs/cgroup" / controllers / group.lstrip("/")]
        for place in places:
            stat = dict(
                pair.split(" ", 1)
                for pair in (read_text(place / "cpu.stat") or "").splitlines()
                if " " in pair
            )
            if "throttled_usec" in stat:
                return int(stat["throttled_usec"]) / 1e6
            if "throttled_time" in stat:
                return int(stat["throttled_time"]) / 1e9
    return None


def _throttles(root: Path) -> int | None:
    """What Intel CPUs count for heat, and Jetsons for over-current (oc1_event_cnt ...)."""
    places = [
        *(root / "sys/devices/system/cpu").glob("cpu*/thermal_throttle/core_throttle_count"),
        *(root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"),
    ]
    known = [count for count in map(read_number, places) if count is not None]
    return sum(known) if known else None
