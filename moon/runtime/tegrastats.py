"""Power, clocks and heat of an NVIDIA Jetson, from what its ``tegrastats`` prints.

The line is described in the appendix "tegrastats Utility" of the Jetson Linux developer guides
(r32, r35, r36), which list what each figure means but not which rails a board has. Those come
from lines of real boards: tests/runtime/test_tegrastats.py holds them and says where each is from.

Power is given as ``NAME now/average`` in milliwatts, in JetPack 4 without a unit and since then
with ``mW``; the average is since tegrastats started and of no use here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moon.runtime.bench_host import read_text

__all__ = ["Sample", "Tegrastats", "parse_power_mode", "parse_sample", "power_mode", "total_mw"]

# Rails that feed the whole module, or board (Thor), and so count alone.
_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")
# Where there is none, all that hangs on the input apart from each other. AGX Orin's
# VDDQ_VDD2_1V8AO hangs on VIN_SYS_5V0, and is left out so that it is not counted twice.
_SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
_POWER = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?![\dMk])")
_HEAT = re.compile(r"(?<!\S)([A-Za-z][A-Za-z0-9_]*)@(-?\d+(?:\.\d+)?)C\b")
# `GR3D_FREQ 0%`, `0%@921`, `@1300` or, for each cluster, `0%@[1300,0]`.
_GPU = re.compile(r"(?<!\S)GR3D_FREQ (?:(\d+)%)?(?:@\[?(\d+(?:,\d+)*)\]?)?")
_MEMORY = re.compile(r"(?<!\S)EMC_FREQ (?:(\d+)%)?(?:@(\d+))?")
# What sensors report that are not there, or are switched off.
_ABSENT = (-256.0, 100.0)
_INTERVAL_MS = 100


@dataclass(frozen=True)
class Sample:
    """One line of tegrastats.

    Attributes:
        power_mw: by rail.
        temperature_c: by zone, in lower case; those that are off left out.
        gpu_load: in [0, 1], None where it is not told.
        gpu_mhz: of the fastest cluster, None where it is not told.
        memory_mhz: of the memory controller.
    """

    power_mw: Mapping[str, int]
    temperature_c: Mapping[str, float]
    gpu_load: float | None
    gpu_mhz: int | None
    memory_mhz: int | None


def parse_sample(line: str) -> Sample | None:
    """Read one line; None where it is none of tegrastats'."""
    if "RAM " not in line or "CPU [" not in line:
        return None
    # What stands in the CPU's brackets looks like clocks and loads of other things.
    rest = re.sub(r"CPU \[[^\]]*\]", "", line)
    rest = re.sub(r"\b(?:RAM|SWAP|IRAM) \S+(?: ?\([^)]*\))?", "", rest)
    gpu, memory = _GPU.search(rest), _MEMORY.search(rest)
    clocks = [int(text) for text in ((gpu and gpu[2]) or "").split(",") if text]
    heat = {name.lower(): float(value) for name, value in _HEAT.findall(rest)}
    return Sample(
        power_mw={name: int(value) for name, value in _POWER.findall(rest)},
        temperature_c={
            name: value
            for name, value in heat.items()
            # PMIC@100C is a constant that the boards before Orin print.
            if not (value in _ABSENT and (name == "pmic" or value < 0))
        },
        gpu_load=int(gpu[1]) / 100 if gpu and gpu[1] else None,
        gpu_mhz=max(clocks) if clocks else None,
        memory_mhz=int(memory[2]) if memory and memory[2] else None,
    )


def total_mw(power_mw: Mapping[str, int]) -> tuple[int, tuple[str, ...]] | None:
    """Power of the whole module and the rails it is the sum of; None where they are unknown."""
    for name in _INPUTS:
        if name in power_mw:
            return power_mw[name], (name,)
    for names in _SUMS:
        if all(name in power_mw for name in names):
            return sum(power_mw[name] for name in names), names
    return None


class Tegrastats:
    """``tegrastats`` running beside a measurement, its samples with the time they came.

    Args:
        command: to run; it prints a line every tenth of a second.
    """

    interval_s = _INTERVAL_MS / 1000

    def __init__(self, command: str = "tegrastats") -> None:
        self.samples: list[tuple[float, Sample]] = []
        self._process = subprocess.Popen(
            [command, "--interval", str(_INTERVAL_MS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @staticmethod
    def installed() -> bool:
        return shutil.which("tegrastats") is not None

    def wait(self, seconds: float = 2.0) -> bool:
        """Whether a sample came, at the latest after ``seconds``."""
        until = time.monotonic() + seconds
        while not self.samples and time.monotonic() < until and self._reader.is_alive():
            time.sleep(0.01)
        return bool(self.samples)

    def joules(self, start_s: float, end_s: float) -> float | None:
        """Energy between two times of ``time.perf_counter``: power as of the sample after each.

        None where no sample came so soon, or its rails are unknown.
        """
        total, at = 0.0, start_s
        for when, sample in list(self.samples):
            if when <= at:
                continue
            power = total_mw(sample.power_mw)
            if power is None:
                return None
            total += power[0] / 1e3 * (min(when, end_s) - at)
            at = when
            if at >= end_s:
                return total
        return None

    def stop(self) -> None:
        """End it; what was read stays."""
        self._process.terminate()
        self._process.wait()
        self._reader.join(timeout=2)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            sample = parse_sample(line)
            if sample is not None:
                self.samples.append((time.perf_counter(), sample))


def power_mode(root: Path = Path("/"), command: str = "nvpmodel") -> str | None:
    """The Jetson's power mode, such as MAXN or 15W; None where there is none to be had."""
    if shutil.which(command) is not None:
        try:
            done = subprocess.run(
                [command, "-q"], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        named = parse_power_mode(done.stdout)
        if named is not None:
            return named
    # On some releases asking takes root; what was set last does not.
    status = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    return f"mode {int(status[1])}" if status else None


def parse_power_mode(text: str) -> str | None:
    """The mode in what ``nvpmodel -q`` prints."""
    found = re.search(r"^NV Power Mode: *(\S.*?) *$", text, flags=re.MULTILINE)
    return found[1] if found else None
