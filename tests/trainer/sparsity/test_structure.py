from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moon.errors import UsageError
from moon.trainer.sparsity.rules import Pruning, RigL, Set
from moon.trainer.sparsity.selection import obeys, strongest
from moon.trainer.sparsity.structure import Structure, parse_structure, structure_names
from moon.trainer.sparsity.topology import generator, random_mask

Shape = tuple[int, ...]

NAMES = ("unstructured", "2:4", "1:3", "3:4", "1:16", "block4x1", "fan-in")

shapes = st.one_of(
    st.tuples(st.integers(4, 14), st.integers(1, 18)),
    st.tuples(st.integers(4, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 2)),
)


def held(mask: Tensor, name: str) -> bool:
    """Whether a mask [O, I, *kernel] has a structure, told position by position."""
    rows = mask.reshape(mask.shape[0], mask.shape[1], -1)
    if name == "fan-in":
        return len(set(rows.sum((1, 2)).tolist())) == 1
    if name == "block4x1":
        return all(bool((b == b[:1]).all()) for b in rows.split(4))
    if name == "unstructured":
        return True
    most, window = (int(part) for part in name.split(":"))
    return all(int(part.sum(1).max()) <= most for part in rows.split(window, dim=1))


def fits(name: str, shape: Shape) -> bool:
    return not parse_structure(name).misfit(shape, 1)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMES)
def test_a_structure_is_named_as_it_is_parsed(name: str) -> None:
    structure = parse_structure(name)
    assert structure.name == name and structure == parse_structure(name)


@pytest.mark.parametrize(
    "text",
    ["4:2", "0:4", "2:4:8", "blocks", "2:2", "", "2:", "-1:4", "02:4", "2:4 ", "²:4", "1.5:4"],
)
def test_unknown_structures_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(UsageError, match="unknown structure") as caught:
        parse_structure(text)
    for name in structure_names():
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_structures_are_parsed_without_torch() -> None:
    code = (
        "import sys; from moon.trainer.sparsity.structure import parse_structure; "
        "parse_structure('2:4'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "shape", "density", "count"),
    [
        ("unstructured", (5, 7), 0.1, 4),  # 3.5, and Python rounds halves to even
        ("2:4", (8, 8), 0.5, 32),
        ("2:4", (8, 8), 0.1, 6),  # 6.4
        ("2:4", (2, 6), 0.9, 8),  # 2 of 4 and 2 of the last 2
        ("2:4", (2, 5), 0.9, 6),  # 2 of 4 and 1 of the last 1
        ("1:16", (3, 8, 3, 3), 0.9, 27),
        ("block4x1", (8, 5), 0.3, 12),  # 10 blocks, 3 of them
        ("block4x1", (11, 6), 0.5, 33),  # 6 of 12 blocks of 4, 3 of 6 of the last 3
        ("block4x1", (8, 5), 0.0, 4),
        ("fan-in", (10, 9), 0.3, 30),  # 2.7 a row
        ("fan-in", (10, 2, 3, 3), 0.01, 10),  # at least one a row
    ],
)
def test_counts_by_hand(name: str, shape: Shape, density: float, count: int) -> None:
    assert parse_structure(name).count(shape, density) == count


@given(st.sampled_from(NAMES), shapes, st.floats(0, 1))
def test_counts_can_be_held_and_are_near(name: str, shape: Shape, density: float) -> None:
    structure, size = parse_structure(name), math.prod(shape)
    nonzeros = structure.count(shape, density)
    units = structure.units(shape, nonzeros)
    rest = shape[0] % 4
    heights = ((4, rest) if rest else (4,)) if name == "block4x1" else (1,)
    assert sum(u * h for u, h in zip(units, heights, strict=True)) == nonzeros
    assert all(u >= 0 for u in units) and 0 < nonzeros <= size
    step = {"block4x1": 4, "fan-in": shape[0]}.get(name, 1)
    if density <= structure.limit(shape):
        assert abs(nonzeros - density * size) <= max(step, 0.5 * step + 0.5 * rest)
    assert structure.count(shape, structure.limit(shape)) == round(structure.limit(shape) * size)
    every = structure.units(shape, size)
    assert sum(u * h for u, h in zip(every, heights, strict=True)) == size


def test_layers_too_small_say_so() -> None:
    assert "3 input channels, fewer than 4" in parse_structure("2:4").misfit((64, 3, 3, 3), 1)
    assert "3 output channels, fewer than 4" in parse_structure("block4x1").misfit((3, 9), 1)
    assert "groups of 2 output" in parse_structure("block4x1").misfit((8, 4, 3, 3), 4)
    assert not parse_structure("block4x1").misfit((8, 4, 3, 3), 2)
    assert not parse_structure("fan-in").misfit((1, 1), 1)


# ---------------------------------------------------------------- masks


def test_2_of_4_of_ten_inputs_by_hand() -> None:
    # Windows 9 8 7 1 | 2 6 5 4 | 3 0. Two each at most, the last one holds two at most.
    scores = torch.tensor([[9.0, 8, 7, 1, 2, 6, 5, 4, 3, 0]])
    two_four = parse_structure("2:4")
    assert strongest(scores, 3, two_four).int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 0, 0, 0]]
    assert strongest(scores, 5, two_four).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0, 1, 0]]
    assert strongest(scores, 6, two_four).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0, 1, 1]]


def test_windows_run_along_the_inputs_at_every_kernel_position() -> None:
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([9.0, 8, 7, 6])
    scores[0, :, 0, 1] = torch.tensor([1.0, 2, 3, 4])
    mask = strongest(scores, 4, parse_structure("2:4"))
    assert mask[0, :, 0, 0].int().tolist() == [1, 1, 0, 0]
    assert mask[0, :, 0, 1].int().tolist() == [0, 0, 1, 1]


def test_blocks_by_hand() -> None:
    # Rows 0..3 and 4..7 are whole blocks, rows 8 and 9 a part of their own.
    scores = torch.zeros(10, 2)
    scores[:4, 0] = 1.0  # sum 4
    scores[4, 1] = 5.0  # sum 5
    scores[4:8, 0] = 1.1  # sum 4.4
    scores[9, 1] = 0.1  # the better of the last part
    structure = parse_structure("block4x1")
    # 12 = 3 * 4 or 2 * 4 + 2 * 2: of 2 units in the last part the nearer to 12 / 20 are 2.
    assert structure.units((10, 2), 12) == (2, 2)
    assert structure.units((10, 2), 10) == (2, 1)
    mask = strongest(scores, 10, structure)
    assert mask[:, 0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert mask[:, 1].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_fan_in_by_hand() -> None:
    scores = torch.tensor([[9.0, 8, 7], [1, 2, 3]])
    mask = strongest(scores, 4, parse_structure("fan-in"))
    assert mask.int().tolist() == [[1, 1, 0], [0, 1, 1]]


@given(st.sampled_from(NAMES), shapes, st.floats(0, 1), st.integers(0, 99))
def test_masks_have_the_structure_and_the_count(
    name: str, shape: Shape, density: float, seed: int
) -> None:
    if not fits(name, shape):
        return
    structure = parse_structure(name)
    nonzeros = structure.count(shape, density)
    weight = torch.empty(shape)
    mask = random_mask(weight, nonzeros, generator(seed, 0, "a"), structure)
    assert mask.shape == weight.shape and int(mask.sum()) == nonzeros
    assert held(mask, name) and obeys(mask, nonzeros, structure)
    assert torch.equal(mask, random_mask(weight, nonzeros, generator(seed, 0, "a"), structure))
    # Ties everywhere: still exact.
    ties = torch.randint(0, 2, shape, generator=generator(seed, 1, "a")).float()
    mask = strongest(ties, nonzeros, structure)
    assert int(mask.sum()) == nonzeros and held(mask, name)


def test_obeys_finds_what_is_wrong() -> None:
    two_four = parse_structure("2:4")
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert not obeys(mask, 4, two_four) and obeys(mask, 3, two_four, pruning=True)
    assert not obeys(mask, 4, two_four, pruning=True)  # Only 3 could stay.
    assert not obeys(mask, 4, parse_structure("fan-in"))
    blocks = torch.zeros(4, 4, dtype=torch.bool)
    blocks[:, 1] = True
    assert obeys(blocks, 4, parse_structure("block4x1"))
    assert not obeys(blocks.T.contiguous(), 4, parse_structure("block4x1"))


# ---------------------------------------------------------------- updates


def step(rule: Set, mask: Tensor, weight: Tensor, gradient: Tensor, name: str) -> list[list[int]]:
    found = rule.step(
        mask.bool(),
        weight,
        gradient,
        nonzeros=int(mask.sum()),
        fraction=0.5,
        draw=generator(0, 1, "a"),
        structure=parse_structure(name),
    )
    return found.int().tolist()  # type: ignore[no-any-return]


def test_rigl_under_2_of_4_by_hand() -> None:
    # |w| 4 3 | 2 1: half of four goes, the right window's two. Its room is two, the left
    # window has none, so the left's large gradients cannot grow.
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]])
    weight = torch.tensor([[4.0, -3, 0, 0, 2, 1, 0, 0]])
    gradient = torch.tensor([[0.0, 0, 9, 9, 0, 3, -2, 4]])
    assert step(RigL(), mask, weight, gradient, "2:4") == [[1, 1, 0, 0, 0, 1, 0, 1]]
    rule = RigL(exclude_dropped=True)
    assert step(rule, mask, weight, gradient, "2:4") == [[1, 1, 0, 0, 0, 0, 1, 1]]


def test_rigl_below_the_bound_moves_connections_between_windows() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 1, 1, 0, 0]])
    weight = torch.tensor([[4.0, 0, 0, 0, 3, 1, 0, 0]])
    gradient = torch.tensor([[0.0, 5, 6, 0, 0, 0, 3, 4]])
    # One goes (position 5); the best of all with room is position 2.
    assert step(RigL(), mask, weight, gradient, "2:4") == [[1, 0, 1, 0, 1, 0, 0, 0]]


def test_excluding_the_dropped_brings_back_the_strongest_where_there_is_no_room() -> None:
    # 3 of 4: two of three go, but there is only one other position.
    mask, weight = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[3.0, 2, 1, 0]])
    rule = RigL(exclude_dropped=True)
    found = rule.step(
        mask.bool(), weight, torch.ones(1, 4), nonzeros=3, fraction=0.7,
        draw=generator(0, 1, "a"), structure=parse_structure("3:4"),
    )  # fmt: skip
    assert found.int().tolist() == [[1, 1, 0, 1]]


def test_rigl_with_constant_fan_in_by_hand() -> None:
    # Dropped: the two smallest of all four, both of row 1; so row 1 grows both anew.
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]])
    weight = torch.tensor([[5.0, 4, 0, 0], [2, 0, 0, 1]])
    gradient = torch.tensor([[0.0, 0, 9, 9], [3, 2, 4, 1]])
    assert step(RigL(), mask, weight, gradient, "fan-in") == [[1, 1, 0, 0], [1, 0, 1, 0]]


def test_rigl_with_blocks_by_hand() -> None:
    # Two blocks of three live in one block row; sums of |w| 4 and 3, so the second goes.
    weight, gradient = torch.zeros(4, 3), torch.zeros(4, 3)
    weight[:, 0], weight[0, 1] = 1.0, 3.0
    gradient[:, 2] = torch.tensor([1.0, -1, 1, -1])  # Sum of |g| 4, of g 0.
    gradient[:, 1] = 0.9
    mask = (torch.tensor([1, 1, 0]) * torch.ones(4, 1)).int()
    assert step(RigL(), mask, weight, gradient, "block4x1") == [[1, 0, 1]] * 4


@given(
    st.sampled_from(NAMES),
    shapes,
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([Set, RigL]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_updates_keep_count_and_structure(
    name: str,
    shape: Shape,
    density: float,
    fraction: float,
    kind: type[Set],
    exclude: bool,
    seed: int,
) -> None:
    if not fits(name, shape):
        return
    structure = parse_structure(name)
    nonzeros = structure.count(shape, density)
    draw = torch.Generator().manual_seed(seed)
    mask = random_mask(torch.empty(shape), nonzeros, draw, structure)
    rule = kind(exclude_dropped=exclude)
    for turn in range(3):
        # Coarse values make ties and exact zeros common; stale storage is poisoned.
        weight = torch.randint(-2, 3, shape, generator=draw).float().masked_fill(~mask, 7.0)
        gradient = torch.randint(-2, 3, shape, generator=draw).float()
        options = {"nonzeros": nonzeros, "fraction": fraction, "structure": structure}
        new = rule.step(mask, weight, gradient, draw=generator(seed, turn, "a"), **options)
        same = rule.step(mask, weight, gradient, draw=generator(seed, turn, "a"), **options)
        assert torch.equal(new, same)
        assert int(new.sum()) == nonzeros and held(new, name)
        assert obeys(new, nonzeros, structure)
        grown, gone = new & ~mask, mask & ~new
        assert not bool((grown & mask).any()) and int(grown.sum()) == int(gone.sum())
        units = structure.units(shape, nonzeros)
        replaced = sum(int(fraction * count) for count in units)
        assert int(gone.sum()) <= replaced * (4 if name == "block4x1" else 1)
        mask = new


# ---------------------------------------------------------------- pruning


def test_pruning_by_hand() -> None:
    weight = torch.tensor([[4.0, -3, 2, 1, 0.5, -6, 7, 8]])
    mask = torch.ones(1, 8, dtype=torch.bool)

    def prune(mask: Tensor, fraction: float, name: str, nonzeros: int) -> list[int]:
        new = Pruning().step(
            mask, weight, weight, nonzeros=nonzeros, fraction=fraction,
            draw=generator(0, 1, "a"), structure=parse_structure(name),
        )  # fmt: skip
        return new[0].int().tolist()  # type: ignore[no-any-return]

    assert prune(mask, 1.0, "unstructured", 4) == [1] * 8
    assert prune(mask, 0.5, "unstructured", 4) == [1, 1, 1, 0, 0, 1, 1, 1]
    assert prune(mask, 0.0, "unstructured", 4) == [1, 0, 0, 0, 0, 1, 1, 1]
    # What 2:4 will keep (4 -3 | 7 8) is kept, then the largest others.
    assert prune(mask, 0.25, "2:4", 4) == [1, 1, 0, 0, 0, 1, 1, 1]
    assert prune(mask, 0.0, "2:4", 4) == [1, 1, 0, 0, 0, 0, 1, 1]
    # Nothing grows back, however large.
    once = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 1]]).bool()
    assert prune(once, 0.0, "unstructured", 4) == [1, 1, 1, 0, 0, 0, 0, 1]


@given(st.sampled_from(NAMES), shapes, st.floats(0, 1), st.integers(0, 10**6))
def test_pruning_only_drops_and_ends_in_the_structure(
    name: str, shape: Shape, density: float, seed: int
) -> None:
    if not fits(name, shape):
        return
    structure, size = parse_structure(name), math.prod(shape)
    nonzeros = structure.count(shape, density)
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(shape, dtype=torch.bool)
    for fraction in (1.0, 0.7, 0.3, 0.05, 0.0):
        weight = torch.randint(-3, 4, shape, generator=draw).float()
        new = Pruning().step(
            mask, weight, weight, nonzeros=nonzeros, fraction=fraction,
            draw=draw, structure=structure,
        )  # fmt: skip
        assert not bool((new & ~mask).any())
        assert obeys(new, nonzeros, structure, pruning=True)
        if name != "block4x1":
            assert int(new.sum()) == nonzeros + round((size - nonzeros) * fraction)
        mask = new
    assert int(mask.sum()) == nonzeros and held(mask, name)


def test_structures_hold_in_any_memory_layout() -> None:
    for name in NAMES:
        structure: Structure = parse_structure(name)
        weight = torch.randn(8, 16, 3, 3, generator=generator(1, 0, "w"))
        gradient = torch.randn(8, 16, 3, 3, generator=generator(2, 0, "g"))
        nonzeros = structure.count((8, 16, 3, 3), 0.05)
        found = []
        for layout in (torch.contiguous_format, torch.channels_last):
            w, g = (x.to(memory_format=layout) for x in (weight, gradient))
            mask = random_mask(w, nonzeros, generator(0, 0, "a"), structure)
            assert mask.stride() == w.stride()
            draw = generator(0, 1, "a")
            found.append(
                RigL().step(
                    mask, w, g, nonzeros=nonzeros, fraction=0.3, draw=draw, structure=structure
                )
            )
        assert torch.equal(*found)
