"""Random graphs of every operator against ONNX Runtime, on every instruction set and guard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moon.runtime.sparse.isa import available

from .graphs import opened
from .isolated import Isolated, RefusedError
from .random_graphs import ON_PLANES, ON_ROWS, Chooser, Drawn, RandomGraph, Seeded, grow, start

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
SEEN: Counter[str] = Counter()


def examples(count: int) -> settings:
    """The same ones every time, so that a change breaks a test and chance does not."""
    return settings(max_examples=count, derandomize=True, database=None, suppress_health_check=SLOW)


@pytest.fixture(scope="module")
def process(engine_cache: None) -> Iterator[Isolated]:
    with Isolated() as one:
        yield one


def agree(process: Isolated, g: RandomGraph, *outputs: str) -> None:
    """The engine's outputs are ONNX Runtime's, with settings of which none may matter."""
    data, c = g.data(*outputs), g.chooser
    x = g.images(c.whole(1, 5))
    options: dict[str, Any] = {
        "threads": c.pick((1, 2, 3, 7)),
        "isa": c.pick(available()),
        "guard": c.pick(("", "after", "before")),
    }
    try:
        wanted = process.reference(data, x)
    except RefusedError:
        SEEN["refused"] += 1
        return
    found = process.engine(data, x, **options)
    assert len(found) == len(wanted)
    for name, one, other in zip(outputs, found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, name
        size = float(np.abs(other).max(initial=1e-3))
        worst = float(np.abs(one - other).max(initial=0)) / size
        assert worst < 1e-5, (name, worst, options, g.shapes)
    SEEN["run"] += 1


def single(chooser: Chooser, kind: str) -> tuple[RandomGraph, str | None]:
    """A graph of one operator, on the input or on what another step made."""
    g = start(chooser)
    source = "x"
    if kind in ("linear", "flat on rows", "point on rows"):
        source = g.put((int(np.prod(g.shapes["x"])),), "Flatten", "x")
        return g, ON_ROWS[kind.split()[0]](g, source)
    if chooser.pick((False, True)):
        source = g.put(g.shapes["x"], "Relu", "x")
    return g, ON_PLANES[kind](g, source)


KINDS = (*ON_PLANES, "linear", "flat on rows", "point on rows")


@pytest.mark.parametrize("kind", KINDS)
def test_one_operator(process: Isolated, kind: str) -> None:
    @examples(40 if kind in ("conv", "pool") else 20)
    @given(st.data())
    def check(data: Any) -> None:
        g, name = single(Drawn(data), kind)
        assume(name is not None)
        assert name is not None
        agree(process, g, name)

    check()


@examples(25)
@given(data=st.data())
def test_many_operators(process: Isolated, data: Any) -> None:
    g = start(Drawn(data))
    agree(process, g, *grow(g, g.chooser.whole(3, 14), left=True))


@pytest.mark.parametrize("block", range(4))
def test_long_graphs(process: Isolated, block: int) -> None:
    """Drawn evenly: hypothesis prefers what is short and simple."""
    for seed in range(block * 8, block * 8 + 8):
        g = start(Seeded(seed))
        try:
            agree(process, g, *grow(g, g.chooser.whole(5, 25), left=True))
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


@examples(12)
@given(data=st.data())
def test_bits_depend_on_no_setting(process: Isolated, data: Any) -> None:
    """Nor on the thread count, nor on what lies around the memory."""
    g = start(Drawn(data))
    outputs = grow(g, g.chooser.whole(3, 10))
    file, x = g.data(*outputs), g.images(g.chooser.whole(1, 5))
    isa = g.chooser.pick(available())
    first = process.engine(file, x, isa=isa)
    for threads, guard in ((2, ""), (3, "after"), (5, "before")):
        again = process.engine(file, x, isa=isa, threads=threads, guard=guard)
        assert [one.tobytes() for one in again] == [one.tobytes() for one in first]


def test_few_graphs_were_left_to_onnx_runtime() -> None:
    taken = 0
    for seed in range(100):
        g, name = single(Seeded(seed), KINDS[seed % len(KINDS)])
        if name is not None:
            taken += opened(g.data(name)).handed_over == ""
    assert taken > 75
    if SEEN["run"]:  # not when this test runs alone
        assert SEEN["refused"] < 0.05 * SEEN["run"], SEEN


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_thousands_of_graphs(process: Isolated, block: int) -> None:
    for seed in range(block * 300, block * 300 + 300):
        chooser = Seeded(seed)
        if seed % 2:
            g, name = single(chooser, KINDS[seed // 2 % len(KINDS)])
            outputs = [] if name is None else [name]
        else:
            g = start(chooser)
            outputs = grow(g, chooser.whole(3, 25), left=True)
        if outputs:
            try:
                agree(process, g, *outputs)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}") from error
