"""The GPU, or the Jetson, that a measurement runs on, and what it did meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moon.errors import MoonError
from moon.runtime.bench_host import read_text
from moon.runtime.nvml import Gpu, open_gpu
from moon.runtime.tegrastats import Sample, Tegrastats, power_mode

__all__ = ["Board"]


@dataclass
class Board:
    """Both may be absent.

    Attributes:
        gpu: seen through NVML, where a backend computes on it.
        stats: tegrastats, running, on a Jetson.
        told: what the first backend on a GPU says of it.
        reason: why there is no GPU to tell of.
    """

    gpu: Gpu | None
    stats: Tegrastats | None
    told: Mapping[str, Any]
    reason: str

    @classmethod
    def open(cls, stack: ExitStack, infos: Sequence[Mapping[str, Any]]) -> Board:
        """Look for both; what is opened is closed with ``stack``.

        Args:
            infos: what the backends that compute on a GPU say of themselves.
        """
        stats = None
        if Tegrastats.installed():
            with contextlib.suppress(OSError):
                stats = Tegrastats()
                stack.callback(stats.stop)
        if not infos:
            return cls(None, stats, {}, "no backend measured here uses a GPU")
        told = infos[0].get("gpu")
        told = told if isinstance(told, Mapping) else {}
        index = told.get("index", infos[0].get("device_id", 0))
        try:
            gpu = stack.enter_context(open_gpu(int(index)))
        except MoonError as error:
            return cls(None, stats, told, str(error))
        gpu.look()
        return cls(gpu, stats, told, "")

    def look(self) -> None:
        """Note the GPU's clocks and heat at this moment."""
        if self.gpu is not None:
            self.gpu.look()

    def facts(self) -> dict[str, Any] | None:
        """``gpu`` of a result: name, compute capability, driver, clocks, heat and throttling."""
        facts: dict[str, Any] = {
            "name": None, "cc": None, "driver": None, "clocks_mhz": None, "temperature_c": None,
            "throttle_reasons": None, "throttled_ms": None, "power_mode": None, "source": None,
        }  # fmt: skip
        if self.gpu is None and not self.told and not (self.stats and self.stats.samples):
            return None
        facts |= {name: self.told[name] for name in ("name", "cc", "driver") if name in self.told}
        if self.gpu is not None:
            seen = self.gpu.facts()
            facts |= {name: value for name, value in seen.items() if value is not None}
        if self.stats is not None and self.stats.samples:
            facts |= _jetson([sample for _, sample in self.stats.samples])
        return facts

    def doubts(self) -> list[str]:
        """What of it puts a measurement in doubt."""
        facts = self.facts()
        if facts is None:
            return []
        found = []
        if facts["throttle_reasons"]:
            found.append(f"the GPU throttled: {', '.join(facts['throttle_reasons'])}")
        held = {name: ms for name, ms in (facts["throttled_ms"] or {}).items() if ms > 0}
        if held:
            spans = ", ".join(f"{ms:.0f} ms by {name}" for name, ms in held.items())
            found.append(f"GPU clocks were held down: {spans}")
        return found


def _jetson(samples: Sequence[Sample]) -> dict[str, Any]:
    """What tegrastats told, under the same names."""
    clocks: dict[str, Any] = {}
    for name, seen in (
        ("sm", [one.gpu_mhz for one in samples if one.gpu_mhz is not None]),
        ("memory", [one.memory_mhz for one in samples if one.memory_mhz is not None]),
    ):
        clocks[name] = {"min": min(seen), "max": max(seen), "limit": None} if seen else None
    heat = [max(one.temperature_c.values()) for one in samples if one.temperature_c]
    return {
        "name": read_text(Path("/proc/device-tree/model")),
        "clocks_mhz": clocks,
        "temperature_c": {"start": heat[0], "max": max(heat)} if heat else None,
        "power_mode": power_mode(),
        "source": "tegrastats",
    }
