"""Lines that real Jetsons printed, and a program that prints one as tegrastats does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moon.errors import MoonError
from moon.runtime.bench_energy import TegraMeter, open_energy
from moon.runtime.tegrastats import (
    Tegrastats,
    parse_power_mode,
    parse_sample,
    power_mode,
    total_mw,
)

# Board, JetPack: (line, where it was published).
LINES = {
    # DataDog/datadog-agent, pkg/collector/corechecks/nvidia/jetson: a test's samples of 2020.
    "nano-4": "RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) CPU [2%@102,1%@102,0%@102,"
    "0%@102] EMC_FREQ 0% GR3D_FREQ 0% PLL@39C CPU@40.5C PMIC@100C GPU@41C AO@46C thermal@41C "
    "POM_5V_IN 900/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123",
    "tx1-4": "RAM 1179/3983MB (lfb 120x4MB) IRAM 0/252kB(lfb 252kB) CPU [1%@102,4%@102,0%@102,"
    "0%@102] EMC_FREQ 7%@408 GR3D_FREQ 0%@76 APE 25 AO@42.5C CPU@37.5C GPU@39C PLL@37C "
    "Tdiode@42.75C PMIC@100C Tboard@42C thermal@38.5C VDD_IN 2532/2698 VDD_CPU 76/178 "
    "VDD_GPU 19/19",
    # github.com/martinkersner/gtop, pull request 7, 2019.
    "agx-xavier-4": "RAM 14700/15692MB (lfb 3x2MB) SWAP 898/8192MB (cached 23MB) CPU [0%@1190,"
    "0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ 0% AO@30C "
    "GPU@30.5C Tboard@31C Tdiode@32C AUX@30.5C CPU@31.5C thermal@30.8C PMIC@100C GPU 463/463 "
    "CPU 618/618 SOC 2936/2936 CV 0/0 VDDRQ 309/309 SYS5V 3306/3306",
    # A robot's notes on GitHub, as root on JetPack 4.4.
    "xavier-nx-4": "RAM 2387/7774MB (lfb 961x4MB) SWAP 0/3887MB (cached 0MB) CPU [14%@1190,"
    "9%@1190,2%@1190,4%@1190,0%@1190,1%@1344] EMC_FREQ 1%@1600 GR3D_FREQ 0%@114 VIC_FREQ 0%@115 "
    "APE 150 MTS fg 0% bg 3% AO@31C GPU@31.5C PMIC@100C AUX@31.5C CPU@33C thermal@31.95C "
    "VDD_IN 3528/3569 VDD_CPU_GPU_CV 410/426 VDD_SOC 1107/1115",
    # A collector of metrics on GitHub, JetPack 5.
    "xavier-nx-5": "RAM 2690/6854MB (lfb 6x1MB) SWAP 479/3427MB (cached 3MB) CPU [3%@1904,7%@1906,"
    "1%@1905,0%@1907,off,off] EMC_FREQ 0%@1600 GR3D_FREQ 0%@[510] VIC_FREQ 601 APE 150 AUX@39C "
    "CPU@39.5C AO@37.5C GPU@37.5C PMIC@50C VDD_IN 5079mW/5079mW VDD_CPU_GPU_CV 696mW/696mW "
    "VDD_SOC 1104mW/1104mW",
    # Notes on DLAs on GitHub, JetPack 5, as root.
    "agx-orin-5": "11-21-2025 08:49:48 RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached "
    "0MB) CPU [90%@2201,100%@2201,100%@2201,100%@2201] EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] "
    "VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CV0@73.625C CPU@77.281C Tboard@62C SOC2@70C "
    "Tdiode@62.25C SOC0@69.531C CV1@72.5C GPU@69.125C tj@77.281C SOC1@68.968C CV2@67.25C "
    "VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW "
    "VDDQ_VDD2_1V8AO 1091mW/1091mW",
    # A plotting script on GitHub, 2024: a rail can read below zero.
    "agx-orin-6": "03-17-2024 18:54:10 RAM 10239/62841MB (lfb 442x4MB) SWAP 1/31421MB (cached 0MB) "
    "CPU [0%@1728,0%@1728,off,off] GR3D_FREQ 0% cpu@37.5C tboard@27C soc2@34.562C tdiode@27.5C "
    "soc0@34.531C tj@37.5C soc1@33.656C VDD_GPU_SOC 1592mW/1592mW VDD_CPU_CV -398mW/-398mW "
    "VIN_SYS_5V0 2624mW/2624mW VDDQ_VDD2_1V8AO 403mW/403mW",
    # A report to rbonghi/jetson_stats on GitHub, 2025: Orin Nano, JetPack 6.
    "orin-nano-6": "05-15-2025 18:30:28 RAM 6982/7620MB (lfb 5x1MB) SWAP 2640/16384MB (cached "
    "202MB) CPU [97%@1984,95%@1984,95%@1984,91%@1984,88%@1984,93%@247] EMC_FREQ 18%@3199 "
    "GR3D_FREQ 84%@[713] NVENC 1%@115 NVDEC 40%@115 NVJPG off NVJPG1 off VIC 31%@115 OFA off "
    "NVDLA0 off PVA0_FREQ off APE 174 cv0@63.031C cpu@65.562C soc2@64.156C soc0@63.031C "
    "cv1@62.937C gpu@63.5C tj@65.562C soc1@64.718C cv2@60.875C VDD_IN 17946mW/15710mW "
    "VDD_CPU_GPU_CV 8896mW/7585mW VDD_SOC 3923mW/3515mW",
    # The same project, pull request 894, JetPack 7.2 (shortened there).
    "agx-orin-7": "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] "
    "EMC_FREQ 3%@3199 GR3D_FREQ 0%@[1300,1300] NVENC0 off NVDEC0 off APE 174 cpu@52.968C/52.968C",
    # An exporter's test on GitHub, JetPack 7.
    "thor-7": "07-31-2026 14:45:55 RAM 86905/125772MB (lfb 368x4MB) CPU [12%@972,10%@972,off,"
    "33%@1890] cpu@39.812C tj@39.906C soc012@38.812C gpu@39.906C soc345@38.625C VDD_GPU "
    "3561mW/3561mW VDD_CPU_SOC_MSS 7910mW/7910mW VIN_SYS_5V0 7620mW/7620mW VIN 26686mW/26686mW",
}


@pytest.mark.parametrize(
    ("board", "milliwatts", "rails", "hottest", "gpu"),
    [
        ("nano-4", 900, ("POM_5V_IN",), 46.0, (0.0, None)),
        ("tx1-4", 2532, ("VDD_IN",), 42.75, (0.0, 76)),
        ("agx-xavier-4", 7632, ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), 32.0, (0.0, None)),
        ("xavier-nx-4", 3528, ("VDD_IN",), 33.0, (0.0, 114)),
        ("xavier-nx-5", 5079, ("VDD_IN",), 50.0, (0.0, 510)),
        (
            "agx-orin-5", 22430, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 77.281, (0.14, 407),
        ),
        ("agx-orin-6", 3818, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 37.5, (0.0, None)),
        ("orin-nano-6", 17946, ("VDD_IN",), 65.562, (0.84, 713)),
        ("thor-7", 26686, ("VIN",), 39.906, (None, None)),
    ],
)  # fmt: skip
def test_lines_of_real_boards(
    board: str,
    milliwatts: int,
    rails: tuple[str, ...],
    hottest: float,
    gpu: tuple[float | None, int | None],
) -> None:
    sample = parse_sample(LINES[board])
    assert sample is not None
    assert total_mw(sample.power_mw) == (milliwatts, rails)
    assert max(sample.temperature_c.values()) == hottest
    assert (sample.gpu_load, sample.gpu_mhz) == gpu


def test_a_line_without_power_and_lines_that_are_none() -> None:
    sample = parse_sample(LINES["agx-orin-7"])
    assert sample is not None and sample.gpu_mhz == 1300 and sample.memory_mhz == 3199
    assert total_mw(sample.power_mw) is None and sample.temperature_c == {"cpu": 52.968}
    for line in ("", "tegrastats: permission denied", "RAM 1/2MB", "VDD_IN 5079mW/5079mW"):
        assert parse_sample(line) is None


def program(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def endless(folder: Path, line: str) -> str:
    return program(folder, "tegrastats", f"while :; do echo '{line}'; sleep 0.02; done")


def test_power_is_summed_over_time(tmp_path: Path) -> None:
    stats = Tegrastats(endless(tmp_path, LINES["orin-nano-6"]))
    try:
        meter = TegraMeter(stats)
        before = meter.mark()
        time.sleep(0.2)
        after = meter.mark()
        assert meter.joules(before, after) is None  # what was used at the end is not told yet
        meter.close()
        joules = meter.joules(before, after)
    finally:
        stats.stop()
    assert isinstance(before, float) and isinstance(after, float)
    assert joules == pytest.approx(17.946 * (after - before), rel=1e-6)
    assert meter.what == "Jetson module, VDD_IN"


def test_why_a_jetson_tells_no_energy(tmp_path: Path) -> None:
    stats = Tegrastats(endless(tmp_path, LINES["agx-orin-7"]))
    try:
        energy = open_energy(None, stats)
        assert energy.meters == () and "are known to make up the whole" in energy.reason
    finally:
        stats.stop()
    silent = Tegrastats(program(tmp_path, "silent", "exit 1"))
    with pytest.raises(MoonError, match="prints nothing"):
        TegraMeter(silent)
    silent.stop()


@pytest.mark.parametrize(
    ("printed", "mode"),
    [
        ("NV Fan Mode:quiet\nNV Power Mode: MAXN\n0\n", "MAXN"),  # AGX Xavier, JetPack 4
        ("NV Power Mode: MODE_15W_6CORE\n2\n", "MODE_15W_6CORE"),  # Xavier NX
        ("NV Power Mode: MAXN\n0\n", "MAXN"),  # Thor, JetPack 7 (anduril/jetpack-nixos, 460)
        ("NVPM ERROR: failed to read PARAM CPU_A57: ARG FREQ\n", None),
    ],
)
def test_power_modes(printed: str, mode: str | None, tmp_path: Path) -> None:
    assert parse_power_mode(printed) == mode
    asked = program(tmp_path, "nvpmodel", f"cat <<'END'\n{printed}END")
    assert power_mode(tmp_path, asked) == mode


def test_the_power_mode_that_was_set_last(tmp_path: Path) -> None:
    assert power_mode(tmp_path, "no-such-command") is None
    (tmp_path / "var/lib/nvpmodel").mkdir(parents=True)
    (tmp_path / "var/lib/nvpmodel/status").write_text("pmode:0002 fmode:quiet\n")
    assert power_mode(tmp_path, "no-such-command") == "mode 2"
