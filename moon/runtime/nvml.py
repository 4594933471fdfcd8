"""A GPU's clocks, heat, throttling and energy, by NVIDIA's management library.

Read through the package ``nvidia-ml-py`` (module ``pynvml``), which is optional. Nothing is set.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from moon.errors import DISTRIBUTION, BackendError

__all__ = ["REASONS", "VIOLATIONS", "Gpu", "open_gpu"]

# nvml.h, nvmlClocksEventReasons: why clocks are below what was asked for.
REASONS = {
    "idle": 0x1,
    "application clocks": 0x2,
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "sync boost": 0x10,
    "heat (software)": 0x20,
    "heat (hardware)": 0x40,
    "power brake": 0x80,
    "display clocks": 0x100,
}
# The others are somebody's wish, or that there is nothing to do.
_THROTTLING = (
    "power cap",
    "hardware slowdown",
    "heat (software)",
    "heat (hardware)",
    "power brake",
)
# nvml.h, nvmlPerfPolicyType_t: nanoseconds for which clocks were held down by each.
VIOLATIONS = {"power": 0, "heat": 1, "board limit": 3, "low utilization": 4, "reliability": 5}
_COUNTED = ("power", "heat", "board limit", "reliability")
_SM, _MEMORY = 1, 2
_TEMPERATURE_GPU = 0


class Gpu:
    """One GPU as NVML sees it, looked at now and then while something is measured on it.

    Args:
        library: the module ``pynvml``, initialised.
        handle: of the device.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._nvml, self._handle = library, handle
        name = self._get("nvmlDeviceGetName")
        self.name: str = name.decode() if isinstance(name, bytes) else str(name)
        self._seen = 0
        self._clocks: dict[str, list[int]] = {"sm": [], "memory": []}
        self._heat: list[int] = []
        self._violated = self._violations()

    def look(self) -> None:
        """Note clocks, heat and what holds them down at this moment."""
        self._seen |= int(self._reasons() or 0)
        for name, kind in (("sm", _SM), ("memory", _MEMORY)):
            clock = self._get("nvmlDeviceGetClockInfo", kind)
            if clock is not None:
                self._clocks[name].append(int(clock))
        heat = self._get("nvmlDeviceGetTemperature", _TEMPERATURE_GPU)
        if heat is not None:
            self._heat.append(int(heat))

    def facts(self) -> dict[str, Any]:
        """What it is and what was seen of it; null where NVML does not tell."""
        held = self._held_ms()
        cc = self._get("nvmlDeviceGetCudaComputeCapability")
        driver = self._call("nvmlSystemGetDriverVersion")
        limit = self._get("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "name": self.name,
            "cc": None if cc is None else f"{cc[0]}.{cc[1]}",
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "clocks_mhz": {
                name: {
                    "min": min(seen),
                    "max": max(seen),
                    "limit": self._get("nvmlDeviceGetMaxClockInfo", kind),
                }
                if (seen := self._clocks[name])
                else None
                for name, kind in (("sm", _SM), ("memory", _MEMORY))
            },
            "temperature_c": {"start": self._heat[0], "max": max(self._heat)}
            if self._heat
            else None,
            "throttle_reasons": [name for name in _THROTTLING if self._seen & REASONS[name]],
            "throttled_ms": held or None,
            "power_mode": None if limit is None else f"limit {limit / 1e3:.0f} W",
            "source": "nvml",
        }

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded."""
        millijoules = self._get("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def _reasons(self) -> int | None:
        # Renamed in 2023; the older name is all that older packages have.
        for name in (
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        ):
            if hasattr(self._nvml, name):
                found: int | None = self._get(name)
                return found
        return None

    def _held_ms(self) -> dict[str, float]:
        """Milliseconds since this was made for which clocks were held down, by cause."""
        now = self._violations()
        return {
            name: (ended - began) / 1e6
            for name, began in self._violated.items()
            if began is not None and (ended := now[name]) is not None
        }

    def _violations(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for name in _COUNTED:
            status = self._get("nvmlDeviceGetViolationStatus", VIOLATIONS[name])
            found[name] = None if status is None else int(status.violationTime)
        return found

    def _get(self, function: str, *arguments: Any) -> Any:
        return self._call(function, self._handle, *arguments)

    def _call(self, function: str, *arguments: Any) -> Any:
        """What a function returns, None where this GPU or driver does not support it."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:
            return None


@contextlib.contextmanager
def open_gpu(index: int = 0) -> Iterator[Gpu]:
    """The GPU that CUDA calls ``index``.

    Raises:
        BackendError: the package, the driver or the GPU is missing.
    """
    try:
        import pynvml
    except ImportError as error:
        raise BackendError(
            "GPU clocks and heat need the package nvidia-ml-py, which is not installed",
            remedy=f"pip install nvidia-ml-py, or '{DISTRIBUTION}[trt]'",
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise BackendError(f"NVML does not start: {error}") from error
    try:
        yield Gpu(pynvml, _handle(pynvml, index))
    except pynvml.NVMLError as error:
        raise BackendError(f"NVML has no GPU {index}: {error}") from error
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _handle(library: Any, index: int) -> Any:
    """NVML counts all GPUs by PCI order, CUDA those that CUDA_VISIBLE_DEVICES lets it see."""
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if visible == [""]:
        return library.nvmlDeviceGetHandleByIndex(index)
    if index >= len(visible):
        raise BackendError(f"CUDA_VISIBLE_DEVICES shows no GPU {index}")
    word = visible[index]
    if word.isdecimal():
        return library.nvmlDeviceGetHandleByIndex(int(word))
    return library.nvmlDeviceGetHandleByUUID(word)
