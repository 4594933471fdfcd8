"""Joules that a block of queries used, from whatever counts them here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from moon.errors import MoonError
from moon.runtime.bench_host import read_number
from moon.runtime.nvml import Gpu
from moon.runtime.tegrastats import Tegrastats, total_mw

__all__ = ["Energy", "Meter", "NvmlMeter", "Rapl", "TegraMeter", "open_energy"]

_RAPL = Path("/sys/class/powercap")
# A block must last so many of a meter's intervals, or what it reads is of the neighbours too.
_LONG = 5


class Meter(Protocol):
    """Counts energy.

    Attributes:
        name: such as ``rapl``.
        what: whose energy it is.
        interval_s: how often its figure changes.
    """

    @property
    def name(self) -> str: ...

    @property
    def what(self) -> str: ...

    @property
    def interval_s(self) -> float: ...

    def mark(self) -> object:
        """The state now."""

    def joules(self, before: object, after: object) -> float | None:
        """Energy between two marks; None where it could not be read."""

    def close(self) -> None:
        """Let go of what it holds; joules between marks stay to be had."""


class Rapl:
    """Energy of the processor packages, by Intel's and AMD's running average power limit.

    Args:
        folder: where Linux shows its counters.

    Raises:
        MoonError: there are none, or this user may not read them.
    """

    name = "rapl"
    what = "processor packages"
    interval_s = 0.001

    def __init__(self, folder: Path = _RAPL) -> None:
        self._counters: list[tuple[Path, int]] = []
        zones = sorted(folder.glob("intel-rapl:[0-9]"))
        if not zones:
            raise MoonError("there is no RAPL counter")
        for zone in zones:
            limit = read_number(zone / "max_energy_range_uj")
            if read_number(zone / "energy_uj") is None or limit is None:
                raise MoonError(
                    "the RAPL counters may not be read by this user",
                    remedy="As root: chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj",
                )
            self._counters.append((zone / "energy_uj", limit))

    def mark(self) -> object:
        return [read_number(path) for path, _ in self._counters]

    def joules(self, before: object, after: object) -> float | None:
        """A counter that wrapped around once is put right."""
        assert isinstance(before, list) and isinstance(after, list)
        if None in before or None in after:
            return None
        limits = (limit for _, limit in self._counters)
        steps = zip(after, before, limits, strict=True)
        return float(sum((now - then) % limit for now, then, limit in steps)) / 1e6

    def close(self) -> None:
        pass


class NvmlMeter:
    """Energy of a GPU's whole board, by NVML's counter (Volta and later).

    Raises:
        MoonError: this GPU has no such counter.
    """

    name = "nvml"
    interval_s = 0.1

    def __init__(self, gpu: Gpu) -> None:
        if gpu.energy_j() is None:
            raise MoonError("the GPU counts no energy")
        self._gpu = gpu
        self.what = f"board of {gpu.name}"

    def mark(self) -> object:
        return self._gpu.energy_j()

    def joules(self, before: object, after: object) -> float | None:
        if not isinstance(before, float) or not isinstance(after, float):
            return None
        return after - before

    def close(self) -> None:
        pass


class TegraMeter:
    """Energy of a Jetson module, from the power tegrastats prints.

    Raises:
        MoonError: it prints nothing, or no rails whose sum is known.
    """

    name = "tegrastats"

    def __init__(self, stats: Tegrastats) -> None:
        if not stats.wait():
            raise MoonError("tegrastats prints nothing")
        power = total_mw(stats.samples[0][1].power_mw)
        if power is None:
            rails = ", ".join(stats.samples[0][1].power_mw) or "none"
            raise MoonError(f"no rails of tegrastats ({rails}) are known to make up the whole")
        self._stats = stats
        self.what = f"Jetson module, {' + '.join(power[1])}"
        self.interval_s = stats.interval_s

    def mark(self) -> object:
        return time.perf_counter()

    def joules(self, before: object, after: object) -> float | None:
        assert isinstance(before, float) and isinstance(after, float)
        return self._stats.joules(before, after)

    def close(self) -> None:
        # The sample that tells of the last moments comes after them.
        time.sleep(2 * self.interval_s)


class Energy:
    """All meters of a measurement together; they count different parts of the machine."""

    def __init__(self, meters: Sequence[Meter], reason: str) -> None:
        self.meters = tuple(meters)
        self.reason = reason

    def mark(self) -> list[object]:
        return [meter.mark() for meter in self.meters]

    def close(self) -> None:
        for meter in self.meters:
            meter.close()

    def figures(
        self, marks: Sequence[tuple[list[object], list[object]]], seconds: float, images: int
    ) -> tuple[dict[str, Any] | None, str]:
        """``joules_per_image`` in all and by meter, and watts; or None and why.

        Args:
            marks: before and after each block.
            seconds: that the blocks lasted in all.
            images: that they computed.
        """
        if not self.meters:
            return None, self.reason
        joules: dict[str, float] = {}
        for i, meter in enumerate(self.meters):
            shortest = _LONG * meter.interval_s
            if seconds / len(marks) < shortest:
                return None, (
                    f"{meter.name} changes every {meter.interval_s * 1e3:.0f} ms, and a block "
                    f"lasted {seconds / len(marks) * 1e3:.0f} ms: measure for longer "
                    f"(--min-time {shortest * len(marks) * 1.2:.0f})"
                )
            parts = [meter.joules(before[i], after[i]) for before, after in marks]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None, f"{meter.name} could not be read all the time"
            joules[meter.name] = sum(known)
        total = sum(joules.values())
        return {
            "joules_per_image": total / images,
            "watts": total / seconds,
            "by_meter": {
                meter.name: {"what": meter.what, "joules_per_image": joules[meter.name] / images}
                for meter in self.meters
            },
        }, ""


def open_energy(gpu: Gpu | None, stats: Tegrastats | None) -> Energy:
    """What can count energy here: a Jetson's tegrastats alone, else RAPL and a GPU's counter.

    Args:
        gpu: the one that is measured on.
        stats: running, on a Jetson.
    """
    try:
        if stats is not None:
            return Energy([TegraMeter(stats)], "")
        meters: list[Meter] = [] if gpu is None else [NvmlMeter(gpu)]
    except MoonError as error:
        return Energy([], str(error))
    try:
        return Energy([*meters, Rapl()], "")
    except MoonError as error:
        return Energy(meters, str(error))
