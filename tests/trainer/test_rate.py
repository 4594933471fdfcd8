from __future__ import annotations

import math

import pytest

from moon.trainer.rate import learning_rate
from tests.trainer.recipes_small import tiny_recipe


def test_moon_falls_to_its_plateau_and_stays_while_voting() -> None:
    recipe = tiny_recipe("epochs=100", "moon.vote_epochs=20", "lr=0.1")
    rates = [learning_rate(recipe, step, 10) for step in range(1000)]
    assert rates[0] == pytest.approx(0.12)
    assert rates[400] == pytest.approx((0.12 + 0.008) / 2)
    assert rates[200] == pytest.approx(0.008 + 0.112 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[799] > 0.008
    assert rates[800:] == pytest.approx([0.008] * 200)
    assert rates == sorted(rates, reverse=True)


def test_cosine_falls_to_one_millionth() -> None:
    recipe = tiny_recipe("epochs=100", "schedule=cosine", "lr=0.1", "moon.enabled=false")
    rates = [learning_rate(recipe, step, 10) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[500] == pytest.approx(0.05, rel=1e-4)
    assert 1e-6 < rates[-1] < 2e-6
    assert learning_rate(recipe, 1000, 10) == pytest.approx(1e-6)


def test_voting_switched_off_keeps_the_rates() -> None:
    voting, silent = tiny_recipe("epochs=100"), tiny_recipe("epochs=100", "moon.vote=false")
    for step in (0, 100, 300, 599):
        assert learning_rate(voting, step, 6) == learning_rate(silent, step, 6)
