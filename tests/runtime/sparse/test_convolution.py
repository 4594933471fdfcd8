"""Convolutions against numpy, over random geometries and every way of doing them."""

from __future__ import annotations

import numpy as np
import pytest

from moon.runtime.sparse.conv_weights import ConvWeights
from moon.runtime.sparse.convolution import Convolution, Places
from moon.runtime.sparse.costs import Costs, candidates, choose
from moon.runtime.sparse.geometry import Window
from moon.runtime.sparse.jit import Jit
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.memory import Space
from moon.runtime.sparse.plan import Plan, cut, readings, sound

from .convolving import Case, convolve, error, plans, random_case


@pytest.mark.parametrize("block", range(6))
def test_random_convolutions_agree_with_numpy(jit: Jit, block: int) -> None:
    done = set()
    for seed in range(block * 20, block * 20 + 20):
        case = random_case(seed)
        if case is None:
            continue
        expected = case.expected()
        for plan in plans(case, seed):
            got = convolve(jit, case, plan, parts=1 + seed % 3, threads=1 + seed % 2)
            assert error(case, got, expected) < 1e-5, (seed, plan)
            done.add((plan.reading, plan.together))
    assert len(done) >= 4


def _plain(own: int, rows: int, size: tuple[int, int, int], kernel: int = 3) -> Case:
    rng = np.random.default_rng(own)
    images, height, width = size
    pad = kernel // 2
    return Case(
        x=rng.normal(size=(images, own, height, width)).astype(np.float32),
        weight=rng.normal(size=(rows, own, kernel, kernel)).astype(np.float32),
        bias=np.zeros(rows, np.float32),
        window=Window((kernel, kernel), pads=(pad, pad, pad, pad)),
        groups=1,
        residual=None,
        low=-np.inf,
        high=np.inf,
    )


@pytest.mark.parametrize("kernel", [1, 3])
def test_many_channels_in_small_blocks(jit: Jit, kernel: int) -> None:
    case = _plain(150, 9, (2, 8, 16), kernel)
    expected = case.expected()
    for reading in readings(case.geometry):
        for together in (1, 4):
            for block in (1, 10, 63, 64, 65):
                plan = Plan(tile=1, together=together, reading=reading, block=block)
                assert error(case, convolve(jit, case, plan), expected) < 1e-5, plan


def test_a_block_of_rows_ends_before_offsets_do_not_fit(jit: Jit) -> None:
    case = _plain(1200, 1, (1, 300, 32))
    plan = Plan(tile=1, together=1, reading="rows", block=1 << 30)
    plans_ = [plan, Plan(tile=1, together=1, reading="shift", block=1 << 30)]
    case.weight[:, ::2] = 0
    big = Plan(tile=3, together=1, reading="rows", block=1 << 30)
    for one in [*plans_, big]:
        assert sound(case.geometry, one)
        weights = ConvWeights(case.weight, 1)
        Convolution(weights, case.bias, case.geometry, one, space=Space(""))


def test_bits_do_not_depend_on_threads_and_parts(jit: Jit) -> None:
    case = random_case(4) or random_case(5)
    assert case is not None
    for plan in plans(case, 4):
        one = convolve(jit, case, plan)
        for parts, threads in ((2, 2), (3, 2), (1, 3), (3, 5)):
            assert np.array_equal(one, convolve(jit, case, plan, parts=parts, threads=threads))


def test_every_plan_of_the_cost_model_can_be_carried_out() -> None:
    for seed in range(40):
        case = random_case(seed)
        if case is None:
            continue
        weights = ConvWeights(case.weight, case.groups).summary(case.geometry)
        for costs in (Costs(), Costs.of("avx2"), Costs.of("sse")):
            found = candidates(case.geometry, weights, costs)
            assert all(sound(case.geometry, plan) for _, plan in found)
            assert choose(case.geometry, weights, costs) == found[0][1]


@pytest.mark.parametrize("pixels", [1, 5, 16, 17, 20, 24, 49, 196, 200, 256])
def test_tiles_cover_planes(pixels: int) -> None:
    planes = Planes(1, 1, 1, pixels)
    for tile in range(1, min(16, planes.vectors) + 1):
        for together in (1, 4):
            for reading in ("direct", "shift"):
                parts = cut(planes, Plan(tile=tile, together=together, reading=reading, block=1))
                covered = [first + i for size, _, first, n in parts for i in range(size * n)]
                assert covered == list(range(planes.vectors))
                size, lanes, first, _ = parts[-1]
                done = 16 * (first + size - 1) + lanes if parts[-1][3] == 1 else 16 * planes.vectors
                assert pixels <= done < pixels + 16
                assert all(size <= tile for size, *_ in parts) or reading == "direct"


def test_taps_far_apart_are_not_taken_for_each_other(jit: Jit) -> None:
    rng = np.random.default_rng(0)
    case = Case(
        x=rng.normal(size=(1, 2, 3, 16)).astype(np.float32),
        weight=rng.normal(size=(2, 2, 3, 3)).astype(np.float32),
        bias=np.zeros(2, np.float32),
        window=Window((3, 3), dilations=(1, 4096), pads=(1, 4096, 1, 4096)),
        groups=1,
        residual=None,
        low=-np.inf,
        high=np.inf,
    )
    for plan in plans(case, 0):
        assert error(case, convolve(jit, case, plan), case.expected()) < 1e-5, plan


def test_a_plan_that_does_not_fit_is_refused() -> None:
    case = _plain(4, 4, (2, 7, 7))
    weights = ConvWeights(case.weight, 1)
    for change in (
        {"tile": 0}, {"tile": 17}, {"tile": 8}, {"together": 2}, {"reading": "direct"},
        {"reading": "rows"}, {"reading": "other"}, {"block": 0},
    ):  # fmt: skip
        plan = Plan(**{"tile": 1, "together": 1, "reading": "shift", "block": 9, **change})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is not for"):
            Convolution(weights, case.bias, case.geometry, plan, space=Space(""))


def test_scratch_memory_must_be_large_enough() -> None:
    case = _plain(4, 4, (1, 8, 8))
    plan = Plan(tile=1, together=1, reading="shift", block=9)
    weights = ConvWeights(case.weight, 1)
    convolution = Convolution(weights, case.bias, case.geometry, plan, space=Space(""))
    memory = np.zeros(1 << 12, np.float32)
    places = Places(
        source=memory, target=memory, residual=None, scratch=memory.view(np.uint8), scratch_step=64
    )
    with pytest.raises(ValueError, match="scratch"):
        convolution.calls(places, 0.0, 1.0)
