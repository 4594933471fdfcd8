from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import UsageError
from moon.trainer.sparsity.rules import RigL, Set, Static, make_rule
from moon.trainer.sparsity.topology import generator


def step(
    rule: Set, mask: list[int], weight: list[float], gradient: list[float], fraction: float
) -> list[int]:
    found = rule.step(
        torch.tensor(mask, dtype=torch.bool),
        torch.tensor(weight),
        torch.tensor(gradient),
        nonzeros=sum(mask),
        fraction=fraction,
        draw=generator(0, 1, "a"),
    )
    return found.int().tolist()


def test_rigl_on_six_weights_by_hand() -> None:
    # Active 0, 1, 2, 4; |w| .5 .1 .4 .2, so of four the two smallest (1 and 4) go.
    # Positions not kept: 1, 3, 4, 5 with |g| 1 .7 .3 .9, so 1 (dropped just now) and 5 grow.
    mask, weight = [1, 1, 1, 0, 1, 0], [0.5, -0.1, 0.4, 0.0, 0.2, 0.0]
    gradient = [9.0, -1.0, 9.0, 0.7, 0.3, -0.9]
    assert step(RigL(), mask, weight, gradient, 0.5) == [1, 1, 1, 0, 0, 1]


def test_rigl_on_six_weights_without_the_dropped() -> None:
    mask, weight = [1, 1, 1, 0, 1, 0], [0.5, -0.1, 0.4, 0.0, 0.2, 0.0]
    gradient = [9.0, -1.0, 9.0, 0.7, 0.3, -0.9]
    rule = RigL(exclude_dropped=True)
    assert step(rule, mask, weight, gradient, 0.5) == [1, 0, 1, 1, 0, 1]


def test_excluding_the_dropped_never_replaces_more_than_there_is_room_for() -> None:
    rule = RigL(exclude_dropped=True)
    assert step(rule, [1, 1, 1, 1, 1, 0], [5.0, 4, 3, 2, 1, 0], [0.0] * 5 + [1], 0.6) == [
        *[1, 1, 1, 1, 0, 1]
    ]


def test_an_active_zero_ranks_above_every_inactive_weight() -> None:
    # All active weights are exactly zero and stale storage is not: the kept ones are active.
    mask, weight = [1, 1, 1, 1, 0, 0], [0.0, 0.0, 0.0, 0.0, 7.0, 7.0]
    found = step(RigL(), mask, weight, [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], 0.25)
    assert sum(found) == 4
    assert found[4] == 1 and found[5] == 0
    assert sum(found[:4]) == 3


def test_dropping_prefers_exact_zeros() -> None:
    mask, weight = [1, 1, 1, 0, 0, 0], [0.0, -1e-30, 2.0, 7.0, 7.0, 7.0]
    assert step(RigL(), mask, weight, [0.0, 0, 0, 0, 5, 0], 0.34) == [0, 1, 1, 0, 1, 0]


def test_kept_weights_rank_below_every_candidate_even_with_zero_gradient() -> None:
    mask, weight = [1, 1, 1, 0], [3.0, 2.0, 1.0, 0.0]
    for _ in range(3):
        found = step(RigL(), mask, weight, [100.0, 100.0, 0.0, 0.0], 0.34)
        assert found[:2] == [1, 1] and sum(found) == 3


def test_a_fraction_below_one_connection_changes_nothing() -> None:
    assert step(RigL(), [1, 1, 0], [1.0, 2, 0], [0.0, 0, 9], 0.4) == [1, 1, 0]


def test_set_and_rigl_differ_by_one_method_and_drop_alike() -> None:
    own = {name for name in vars(RigL) if not name.startswith("__")}
    assert own == {"name", "grow_score"}
    weight = torch.randn(40, 50, generator=generator(1, 0, "w"))
    mask = torch.rand(40, 50, generator=generator(2, 0, "m")) < 0.3
    nonzeros = int(mask.sum())
    kept = []
    for rule in (Set(exclude_dropped=True), RigL(exclude_dropped=True)):
        new = rule.step(
            mask,
            weight,
            torch.randn(40, 50, generator=generator(3, 0, "g")),
            nonzeros=nonzeros,
            fraction=0.3,
            draw=generator(0, 1, "a"),
        )
        kept.append(new & mask)
    assert torch.equal(*kept)


def test_set_grows_uniformly() -> None:
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    weight = torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0, 0, 0])
    grown = torch.zeros(10)
    for seed in range(3000):
        new = Set(exclude_dropped=True).step(
            mask, weight, weight, nonzeros=4, fraction=0.25, draw=generator(seed, 1, "a")
        )
        grown += new & ~mask
    assert grown[:4].sum() == 0 and grown.sum() == 3000
    # 500 expected at each of six positions, standard deviation 20.4.
    assert float((grown[4:] - 500).abs().max()) < 5 * 20.4


@given(
    st.integers(1, 60),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([Set, RigL]),
    st.integers(0, 10**6),
    st.data(),
)
def test_an_update_keeps_the_count_and_the_strongest(
    size: int, fraction: float, exclude: bool, kind: type[Set], seed: int, data: st.DataObject
) -> None:
    nonzeros = data.draw(st.integers(1, size))
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=draw)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[order[:nonzeros]] = True
    # Coarse values make ties and exact zeros common.
    weight = torch.randint(-2, 3, (size,), generator=draw).float()
    gradient = torch.randint(-2, 3, (size,), generator=draw).float()
    before = [x.clone() for x in (mask, weight, gradient)]
    new = kind(exclude_dropped=exclude).step(
        mask, weight, gradient, nonzeros=nonzeros, fraction=fraction, draw=draw
    )
    assert int(new.sum()) == nonzeros
    assert all(torch.equal(*pair) for pair in zip((mask, weight, gradient), before, strict=True))
    gone, size_of = mask & ~new, weight.abs()
    assert int(gone.sum()) <= int(fraction * nonzeros)
    # What left is among the k smallest active weights, and with regrowth barred it is all k.
    smallest = size_of[mask].sort().values[: int(fraction * nonzeros)]
    if gone.any():
        assert float(size_of[gone].max()) <= float(smallest[-1])
    if exclude:
        room = min(int(fraction * nonzeros), size - nonzeros)
        assert torch.equal(size_of[gone].sort().values, smallest[:room])


def test_scores_are_ranked_logically_in_any_memory_layout() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=generator(1, 0, "w"))
    gradient = torch.randn(6, 4, 3, 3, generator=generator(2, 0, "g"))
    mask = torch.rand(6, 4, 3, 3, generator=generator(3, 0, "m")) < 0.4
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = [x.to(memory_format=layout) for x in (mask, weight, gradient)]
        found.append(
            RigL().step(*laid, nonzeros=int(mask.sum()), fraction=0.3, draw=generator(0, 1, "a"))
        )
    assert torch.equal(*found)


def test_rules_by_name() -> None:
    assert isinstance(make_rule("rigl"), RigL)
    assert isinstance(make_rule("static"), Static) and not make_rule("static").updates
    with pytest.raises(UsageError, match=r"unknown rule 'dsr'.*dense, static, set, rigl, gmp"):
        make_rule("dsr")
