from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import UsageError
from moon.trainer.accounting.costs import (
    COUNTED_RULES,
    FORMATS,
    LayerCost,
    sparse_bytes,
    training_flops,
)


def cost(flops: int, dense: int) -> LayerCost:
    density = flops / dense
    return LayerCost(
        name="a", shape=(1,), nonzeros=1, density=density, flops=flops, dense_flops=dense
    )


COSTS = [cost(10, 100), cost(20, 50)]


def test_rigl_by_the_formula() -> None:
    # f_S = 30, f_D = 150, dT = 100: (9000 + 60 + 150) / 101 an example while updating.
    rigl = training_flops(COSTS, rule="rigl", examples=1000, interval=100, updating=0.7)
    assert rigl == pytest.approx(1000 * (0.7 * 9210 / 101 + 0.3 * 90))


def test_the_other_rules_by_hand() -> None:
    assert training_flops(COSTS, rule="set", examples=1000) == 90_000
    assert training_flops(COSTS, rule="static", examples=1000) == 90_000
    assert training_flops(COSTS, rule="dense", examples=1000) == 450_000
    # Pruning for half the run at a mean cost of 30 + 120 / 4 = 60, then 30; three times that.
    gmp = training_flops(COSTS, rule="gmp", examples=1000, updating=0.5)
    assert gmp == pytest.approx(3 * 1000 * (0.5 * 60 + 0.5 * 30))


def test_gradual_pruning_costs_the_mean_of_its_density() -> None:
    steps, end, final = 10_000, 7_500, 0.1
    density = [final + (1 - final) * max(0.0, 1 - t / end) ** 3 for t in range(steps)]
    layer = cost(10, 100)
    assert layer.density == final
    by_step = sum(3 * 100 * d for d in density)
    formula = training_flops([layer], rule="gmp", examples=steps, updating=0.75)
    assert formula == pytest.approx(by_step, rel=1e-3)


@pytest.mark.parametrize("rule", COUNTED_RULES)
def test_layers_add_up_to_the_whole(rule: str) -> None:
    whole = training_flops(COSTS, rule=rule, examples=500, interval=7, updating=0.4)
    parts = [training_flops([c], rule=rule, examples=500, interval=7, updating=0.4) for c in COSTS]
    assert sum(parts) == pytest.approx(whole)
    sparse, dense = (training_flops(COSTS, rule=r, examples=500) for r in ("set", "dense"))
    assert sparse <= whole <= dense


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(UsageError, match="the rule 'topkast' is not known"):
        training_flops(COSTS, rule="topkast", examples=1)
    with pytest.raises(UsageError, match=r"updating 1\.5"):
        training_flops(COSTS, rule="set", examples=1, updating=1.5)
    with pytest.raises(UsageError, match="no sparse format 'coo'"):
        sparse_bytes((2, 2), 1, "coo")


def test_formats_by_hand() -> None:
    # 8 rows of 3 * 3 * 4 = 36: 288 weights, 20 of them nonzero.
    shape = (8, 4, 3, 3)
    assert sparse_bytes(shape, 20, "dense") == 1152
    assert sparse_bytes(shape, 20, "bitmask") == 80 + 36
    assert sparse_bytes(shape, 20, "csr") == 80 + 2 * 20 + 4 * 9
    assert sparse_bytes(shape, 20, "bitmask", value_bytes=2) == 40 + 36
    # Rows too long for two bytes of index; bits rounded up to whole bytes.
    assert sparse_bytes((1, 65_537), 3, "csr") == 3 * 8 + 8
    assert sparse_bytes((3, 3), 2) == 8 + 2


@given(st.integers(1, 64), st.integers(1, 600), st.data())
def test_the_smallest_format_is_chosen(rows: int, row: int, data: st.DataObject) -> None:
    nonzeros = data.draw(st.integers(0, rows * row))
    layer = LayerCost(
        name="a", shape=(rows, row), nonzeros=nonzeros, density=0.0, flops=0, dense_flops=0
    )
    every = {form: sparse_bytes(layer.shape, nonzeros, form) for form in FORMATS}
    assert layer.sparse_bytes == min(every.values()) == every[layer.sparse_format]
    assert layer.dense_bytes == every["dense"] >= layer.sparse_bytes


def test_full_layers_stay_dense_and_very_sparse_ones_take_indices() -> None:
    def form(nonzeros: int) -> str:
        return LayerCost(
            name="a", shape=(100, 1000), nonzeros=nonzeros, density=0, flops=0, dense_flops=0
        ).sparse_format

    assert [form(n) for n in (100_000, 20_000, 1_000)] == ["dense", "bitmask", "csr"]


def test_accounts_are_read_without_torch() -> None:
    code = "import sys; import moon.trainer.accounting.costs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
