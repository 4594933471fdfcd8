from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from moon.errors import UsageError
from moon.serve.limits import Limits


def test_environment_sets_limits() -> None:
    found = Limits.of({"MOON_SERVE_QUEUE": "7", "MOON_SERVE_BODY_SECONDS": "2.5", "HOME": "/"})
    assert found == Limits(queue=7, body_seconds=2.5)
    assert Limits.of({}) == Limits()


@pytest.mark.parametrize("text", ["", "many", "0", "-1", "1.5", "nan"])
def test_wrong_limits(text: str) -> None:
    with pytest.raises(UsageError, match="MOON_SERVE_QUEUE must be a whole number above 0"):
        Limits.of({"MOON_SERVE_QUEUE": text})


@pytest.mark.parametrize("text", ["soon", "inf", "0"])
def test_wrong_times(text: str) -> None:
    with pytest.raises(UsageError, match="MOON_SERVE_BODY_SECONDS must be a number above 0"):
        Limits.of({"MOON_SERVE_BODY_SECONDS": text})


def test_limits_are_documented() -> None:
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page.read_text("utf-8"), flags=re.MULTILINE)
    assert {name: float(value) for name, value in rows} == asdict(Limits())
