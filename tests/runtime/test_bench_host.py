"""Facts of a host, and what disturbs it, read from files as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moon.errors import MoonError, UsageError
from moon.runtime.bench_energy import Energy, Rapl
from moon.runtime.bench_host import host, host_notes, parse_cores, pinned
from moon.runtime.bench_watch import Disturbance, Watch

QUIET = Disturbance(0.01, 0.0, 0.001, None, 0, ())


def files(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_host() -> None:
    facts = host()
    assert facts["cores"] >= 1 and facts["cpu"] and 1 <= facts["usable_cores"] <= facts["cores"]
    assert facts["affinity"] == sorted(os.sched_getaffinity(0))


def test_a_board_that_tells_all(tmp_path: Path) -> None:
    first = min(os.sched_getaffinity(0))
    cpu = f"sys/devices/system/cpu/cpu{first}"
    outside = max(os.sched_getaffinity(0)) + 1
    root = files(tmp_path, {
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n\nprocessor\t: 1\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        f"{cpu}/cpufreq/scaling_governor": "schedutil\n",
        f"{cpu}/topology/thread_siblings_list": f"{first},{outside}\n",
        "sys/devices/system/cpu/cpufreq/boost": "1\n",
    })  # fmt: skip
    facts = host(root)
    assert facts["cpu"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert facts["isa"] == ["asimd", "asimddp"] and facts["governor"] == "schedutil"
    assert facts["siblings"] == [outside] and facts["turbo"] is True
    notes = " / ".join(host_notes(facts, threads=64))
    assert "the CPU governor is schedutil" in notes and "turbo is on" in notes
    assert f"SMT is on: the cores {outside} share" in notes and "64 threads share" in notes


def test_notes_say_when_nobody_can_tell() -> None:
    facts = {"governor": None, "virtual": True, "turbo": None, "siblings": [], "affinity": [0, 1],
             "usable_cores": 1}  # fmt: skip
    assert host_notes(facts, 1) == [
        "a virtual machine hides what sets the clocks, so nobody can say whether they were fixed",
        "the container grants 1 of 2 cores' time",
    ]
    facts |= {"governor": "performance", "usable_cores": 2}
    assert host_notes(facts, 1) == []


def test_cores_as_taskset_spells_them() -> None:
    assert parse_cores("0") == (0,) and parse_cores("5,2-3, 2") == (2, 3, 5)
    for wrong in ("", "a", "1-", "3-1", "-2"):
        with pytest.raises(UsageError, match="core"):
            parse_cores(wrong)


def test_the_process_is_pinned_and_let_go() -> None:
    before = os.sched_getaffinity(0)
    with pinned((min(before),)):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(UsageError, match="may not use core 9999"), pinned((9999,)):
        pass


def test_a_watch_here() -> None:
    found = Watch().stop()
    assert found.other_cpu is None or 0 <= found.other_cpu <= 1
    assert found.waited is None or 0 <= found.waited <= 1


def test_counters_that_rise_meanwhile(tmp_path: Path) -> None:
    quota = os.cpu_count() or 1
    texts = {
        "proc/stat": "cpu 0 0 0 0 0 0 0 0 0 0\n",
        "proc/thread-self/schedstat": "0 0 0\n",
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/box/cpu.stat": "usage_usec 1\nthrottled_usec 0\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
        "sys/class/hwmon/hwmon1/oc1_event_cnt": "0\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
        "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
        "sys/class/thermal/cooling_device1/cur_state": "0\n",
    }
    watch = Watch(files(tmp_path, texts))
    busy = 10**6 * quota
    files(tmp_path, {
        "proc/stat": f"cpu {busy} 0 0 0 0 0 0 {busy} 0 0\n",
        "proc/thread-self/schedstat": "0 9000000000000 0\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "5\n",
        "sys/class/hwmon/hwmon1/oc1_event_cnt": "1\n",
        "sys/fs/cgroup/box/cpu.stat": "usage_usec 1\nthrottled_usec 2500000\n",
        "sys/class/thermal/cooling_device1/cur_state": "1\n",
    })  # fmt: skip
    watch.look()
    files(tmp_path, {"sys/class/thermal/cooling_device1/cur_state": "0\n"})
    found = watch.stop()
    assert found.throttled == 3 and found.cooling == ("gpu-throttle-alert",)
    assert found.other_cpu == 1 and found.stolen == 1 and found.waited == 1
    assert found.doubts()[:2] == [
        "the processor throttled 3 times",
        "heat held clocks down: gpu-throttle-alert",
    ]
    if quota > 1:
        assert "the container's CPU quota was used up for 2.5 s" in found.doubts()
    assert QUIET.doubts() == []


def test_rapl_counters_that_wrap_are_put_right(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    files(tmp_path, {
        "intel-rapl:0/max_energy_range_uj": "10000000\n", "intel-rapl:0/energy_uj": "9000000\n",
    })  # fmt: skip
    meter = Rapl(tmp_path)
    before = meter.mark()
    (zone / "energy_uj").write_text("2000000\n")
    assert meter.joules(before, meter.mark()) == pytest.approx(3.0)
    (zone / "energy_uj").unlink()
    assert meter.joules(before, meter.mark()) is None
    with pytest.raises(MoonError, match="may not be read"):
        Rapl(tmp_path)
    with pytest.raises(MoonError, match="no RAPL counter"):
        Rapl(tmp_path / "none")


class Counter:
    """A meter that reads one joule more every time."""

    what, interval_s = "test", 0.1

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0.0

    def mark(self) -> object:
        self.count += 1
        return self.count

    def joules(self, before: object, after: object) -> float | None:
        assert isinstance(before, float) and isinstance(after, float)
        return after - before

    def close(self) -> None:
        pass


def test_energy_of_blocks() -> None:
    energy = Energy([Counter("a"), Counter("b")], "")
    marks = [(energy.mark(), energy.mark()) for _ in range(3)]
    figures, reason = energy.figures(marks, seconds=6.0, images=12)
    assert reason == "" and figures is not None
    assert figures["joules_per_image"] == pytest.approx(6 / 12)
    assert figures["watts"] == pytest.approx(1)
    none, reason = energy.figures(marks, seconds=0.3, images=12)
    assert none is None and "a block lasted 100 ms: measure for longer (--min-time 2)" in reason
