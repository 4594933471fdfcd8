"""How many cores this process may use: its affinity, and what a container grants it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["usable_cores"]


def usable_cores(root: Path = Path("/")) -> int:
    """Cores by the affinity mask and the CPU quota of control groups, v1 or v2; at least 1.

    A quota of two and a half cores is two: threads that wait for each other all stop when one of
    them has used up what there is.

    Args:
        root: where /proc and /sys are.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The cores granted by every group that this process is in and that limits it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        base = root / "sys/fs/cgroup"
        if not controllers:
            for folder in _folders(base, group):
                quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
                yield from _quota(quota, period)
        elif "cpu" in controllers.split(","):
            for name in dict.fromkeys((controllers, "cpu")):
                for folder in _folders(base / name, group):
                    quota = _text(folder / "cpu.cfs_quota_us")
                    yield from _quota(quota, _text(folder / "cpu.cfs_period_us"))


def _folders(base: Path, group: str) -> Iterator[Path]:
    """A group's folder and those around it: in a container the outer ones may not be seen."""
    inside = PurePosixPath(group.lstrip("/"))
    for path in (inside, *inside.parents):
        if ".." not in path.parts:
            yield base / path


def _quota(quota: str, period: str) -> Iterator[float]:
    try:
        granted, of = int(quota), int(period)
    except ValueError:  # "max", or no such file
        return
    if granted > 0 and of > 0:
        yield granted / of


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
