"""Cores by affinity and by the quota of control groups, from files as a system has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moon.runtime.cores import usable_cores


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def system(root: Path, groups: str, **files: str) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(folder: str, text: str) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}cpu.max": text}


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    base = f"sys/fs/cgroup/{folder}"
    return {f"{base}cpu.cfs_quota_us": f"{quota}\n", f"{base}cpu.cfs_period_us": f"{period}\n"}


def test_without_groups_it_is_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", 8), ("200000 100000\n", 2), ("250000 100000\n", 2), ("50000 100000\n", 1),
        ("6400000 100000\n", 8), ("nonsense", 8), ("", 8), ("0 100000\n", 8), ("100000 0\n", 8),
    ],
)  # fmt: skip
def test_a_quota_of_v2(tmp_path: Path, text: str, cores: int) -> None:
    assert usable_cores(system(tmp_path, "0::/\n", **v2("", text))) == cores


def test_the_least_of_a_group_and_those_around_it(tmp_path: Path) -> None:
    files = {**v2("a/b/", "max 100000"), **v2("a/", "300000 100000"), **v2("", "700000 100000")}
    assert usable_cores(system(tmp_path, "0::/a/b\n", **files)) == 3


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/outer/name\n", **v2("", "200000 100000"))
    assert usable_cores(root) == 2


@pytest.mark.parametrize("mounted", ["cpu,cpuacct", "cpu"])
def test_a_quota_of_v1(tmp_path: Path, mounted: str) -> None:
    groups = "12:memory:/x\n4:cpu,cpuacct:/docker/x\n1:cpuset:/x\n"
    files = {**v1(f"{mounted}/docker/x/", 150_000, 50_000), **v1(f"{mounted}/", -1)}
    assert usable_cores(system(tmp_path, groups, **files)) == 3


def test_a_path_does_not_lead_out(tmp_path: Path) -> None:
    root = system(tmp_path / "root", "0::/../../out\n", **v2("", "max 100000"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cpu.max").write_text("100000 100000")
    assert usable_cores(root) == 8


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= 8
