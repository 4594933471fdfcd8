from __future__ import annotations

import math

import pytest

from moon.errors import UsageError
from moon.trainer.sparsity.schedule import UpdateSchedule


def test_updates_every_interval_until_the_stop() -> None:
    schedule = UpdateSchedule(interval=100, stop=0.7, total_steps=1000)
    due = [step for step in range(1001) if schedule.due(step)]
    assert due == [100, 200, 300, 400, 500, 600]


def test_the_fraction_falls_by_the_cosine() -> None:
    schedule = UpdateSchedule(drop_fraction=0.3, stop=0.75, total_steps=1200)
    assert schedule.end == 900
    assert schedule.fraction(0) == pytest.approx(0.3)
    assert schedule.fraction(450) == pytest.approx(0.15)
    assert schedule.fraction(300) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert schedule.fraction(899) < 1e-5
    assert schedule.fraction(900) == schedule.fraction(5000) == 0.0


def test_the_surplus_falls_by_the_cube() -> None:
    schedule = UpdateSchedule(stop=0.75, total_steps=1200)
    assert [schedule.surplus(step) for step in (0, 300, 450, 899, 900, 5000)] == [
        1.0,
        pytest.approx(8 / 27),
        0.125,
        pytest.approx(900**-3),
        0.0,
        0.0,
    ]
    assert UpdateSchedule(stop=0.0, total_steps=9).surplus(0) == 0.0


def test_without_an_end_the_fraction_is_constant() -> None:
    schedule = UpdateSchedule(interval=10)
    assert [schedule.fraction(step) for step in (10, 10**9)] == [0.3, 0.3]
    assert schedule.due(10**9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": 0}, "interval is a whole number of at least 1, not 0"),
        ({"drop_fraction": 1.1}, "drop_fraction is a share"),
        ({"stop": -0.1}, "stop is a share"),
        ({"interval": 2.5}, "interval is a whole number"),
        ({"interval": float("nan")}, "interval is a whole number"),
        ({"interval": "10"}, "not '10'"),
        ({"drop_fraction": float("nan")}, "not nan"),
        ({"stop": None}, "not None"),
        ({"total_steps": float("inf")}, "total_steps is a whole number"),
        ({"total_steps": 0}, "total_steps is a whole number"),
    ],
)
def test_values_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        UpdateSchedule(**values)  # type: ignore[arg-type]


def test_a_cosine_that_ends_before_the_updates_do() -> None:
    schedule = UpdateSchedule(interval=80, total_steps=39_100, cosine_steps=100)
    # 0.3 / 2 * (1 + cos(0.8 pi)): next to nothing is left at the first update.
    assert schedule.fraction(80) == pytest.approx(0.15 * (1 - 0.809017), rel=1e-4)
    assert schedule.fraction(160) == 0.0
    assert schedule.due(160)
    assert UpdateSchedule(cosine_steps=100).fraction(50) == pytest.approx(0.15)
    with pytest.raises(UsageError, match="cosine_steps is a whole number"):
        UpdateSchedule(cosine_steps=0)
