"""What is read of a GPU, from a stand-in with the functions of the real package."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from moon.errors import BackendError
from moon.runtime.bench_board import Board
from moon.runtime.bench_energy import NvmlMeter
from moon.runtime.nvml import REASONS, VIOLATIONS, Gpu, open_gpu


class Nvml:
    """Every function is one of pynvml's; what a GPU does not support raises its error."""

    NVMLError = pynvml.NVMLError

    def __init__(self, **values: Any) -> None:
        self.values: dict[str, Any] = {
            "nvmlDeviceGetName": b"NVIDIA L4",
            "nvmlSystemGetDriverVersion": "580.95",
            "nvmlDeviceGetCudaComputeCapability": (8, 9),
            "nvmlDeviceGetClockInfo": {1: 2040, 2: 6251},
            "nvmlDeviceGetMaxClockInfo": {1: 2040, 2: 6251},
            "nvmlDeviceGetTemperature": {0: 41},
            "nvmlDeviceGetEnforcedPowerLimit": 72000,
            "nvmlDeviceGetCurrentClocksEventReasons": REASONS["idle"],
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
            "nvmlDeviceGetViolationStatus": dict.fromkeys(VIOLATIONS.values(), 0),
            **values,
        }

    def __getattr__(self, name: str) -> Any:
        assert hasattr(pynvml, name), f"pynvml has no {name}"

        def call(*arguments: Any) -> Any:
            value = self.values.get(name)
            if value is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            found = value[arguments[-1]] if isinstance(value, dict) else value
            if name == "nvmlDeviceGetViolationStatus":
                return SimpleNamespace(violationTime=found, referenceTime=0)
            return found

        return call


def test_reasons_and_policies_are_those_of_the_real_package() -> None:
    names = {
        "idle": "GpuIdle", "application clocks": "ApplicationsClocksSetting",
        "power cap": "SwPowerCap", "hardware slowdown": "HwSlowdown", "sync boost": "SyncBoost",
        "heat (software)": "SwThermalSlowdown", "heat (hardware)": "HwThermalSlowdown",
        "power brake": "HwPowerBrakeSlowdown", "display clocks": "DisplayClockSetting",
    }  # fmt: skip
    assert {
        name: getattr(pynvml, f"nvmlClocksEventReason{real}") for name, real in names.items()
    } == REASONS
    policies = {
        "power": "POWER", "heat": "THERMAL", "board limit": "BOARD_LIMIT",
        "low utilization": "LOW_UTILIZATION", "reliability": "RELIABILITY",
    }  # fmt: skip
    assert {
        name: getattr(pynvml, f"NVML_PERF_POLICY_{real}") for name, real in policies.items()
    } == VIOLATIONS
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM) == (1, 2)
    assert pynvml.NVML_TEMPERATURE_GPU == 0


def test_a_quiet_gpu_is_told_of_and_raises_no_doubt() -> None:
    library = Nvml()
    gpu = Gpu(library, object())
    gpu.look()
    library.values["nvmlDeviceGetClockInfo"] = {1: 1980, 2: 6251}
    gpu.look()
    facts = gpu.facts()
    assert (facts["name"], facts["cc"], facts["driver"]) == ("NVIDIA L4", "8.9", "580.95")
    assert facts["clocks_mhz"]["sm"] == {"min": 1980, "max": 2040, "limit": 2040}
    assert facts["temperature_c"] == {"start": 41, "max": 41}
    assert facts["throttle_reasons"] == [] and facts["power_mode"] == "limit 72 W"
    assert Board(gpu, None, {}, "").doubts() == []


def test_throttling_is_a_doubt_whether_seen_or_counted() -> None:
    library = Nvml()
    gpu = Gpu(library, object())
    library.values["nvmlDeviceGetCurrentClocksEventReasons"] = REASONS["power cap"] | 1
    gpu.look()
    library.values["nvmlDeviceGetCurrentClocksEventReasons"] = 0
    library.values["nvmlDeviceGetViolationStatus"] = {0: 0, 1: 250_000_000, 3: 0, 4: 9, 5: 0}
    assert gpu.facts()["throttled_ms"]["heat"] == 250
    assert Board(gpu, None, {}, "").doubts() == [
        "the GPU throttled: power cap",
        "GPU clocks were held down: 250 ms by heat",
    ]


def test_what_a_gpu_does_not_support_is_null() -> None:
    gpu = Gpu(Nvml(**{name: None for name in Nvml().values if name != "nvmlDeviceGetName"}), 0)
    gpu.look()
    facts = gpu.facts()
    assert facts.pop("name") == "NVIDIA L4" and facts.pop("source") == "nvml"
    assert facts.pop("throttle_reasons") == []
    assert facts.pop("clocks_mhz") == {"sm": None, "memory": None}
    assert set(facts.values()) == {None}
    with pytest.raises(Exception, match="counts no energy"):
        NvmlMeter(gpu)


def test_energy_is_the_counters_difference() -> None:
    library = Nvml()
    meter = NvmlMeter(Gpu(library, object()))
    before = meter.mark()
    library.values["nvmlDeviceGetTotalEnergyConsumption"] = 5_001_500
    assert meter.joules(before, meter.mark()) == pytest.approx(1.5)
    assert meter.what == "board of NVIDIA L4"


def _driver() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    pynvml.nvmlShutdown()
    return True


@pytest.mark.skipif(_driver(), reason="there is a driver")
def test_without_a_driver_the_reason_is_one_line() -> None:
    with pytest.raises(BackendError, match="NVML does not start"), open_gpu():
        pass
