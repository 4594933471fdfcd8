from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moon.data.preprocess import Preprocess
from moon.errors import ImageError
from moon.trainer.augment import Crops, ResizedCrops, crop_box, crop_flip, draw_crops, generator

CPU = torch.device("cpu")


def crops(pad: int, top: int, left: int, mirror: bool) -> Crops:
    tops, lefts = torch.tensor([top]), torch.tensor([left])
    return Crops(pad=pad, tops=tops, lefts=lefts, mirrored=torch.tensor([mirror]))


IMAGE = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 3, 3, 1)


@pytest.mark.parametrize(
    ("top", "left", "mirror", "expected"),
    [
        (1, 1, False, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        (1, 1, True, [[3, 2, 1], [6, 5, 4], [9, 8, 7]]),
        (0, 0, False, [[0, 0, 0], [0, 1, 2], [0, 4, 5]]),
        (2, 1, False, [[4, 5, 6], [7, 8, 9], [0, 0, 0]]),
        (1, 2, True, [[0, 3, 2], [0, 6, 5], [0, 9, 8]]),
    ],
)
def test_crop_and_flip_by_hand(
    top: int, left: int, mirror: bool, expected: list[list[int]]
) -> None:
    out = crop_flip(IMAGE, crops(1, top, left, mirror))
    assert out[0, :, :, 0].tolist() == expected
    assert out.dtype == torch.uint8
    assert out.is_contiguous()


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    def draw(seed: int, epoch: int, flip: bool = True) -> list[Tensor]:
        drawn = draw_crops(500, 32, flip=flip, seed=seed, epoch=epoch, device=CPU)
        assert drawn.pad == 4
        return [drawn.tops, drawn.lefts, drawn.mirrored]

    first = draw(0, 1)
    assert all(map(torch.equal, first, draw(0, 1)))
    assert not torch.equal(first[0], draw(0, 2)[0])
    assert not torch.equal(first[0], draw(1, 1)[0])
    for offsets in first[:2]:
        assert set(offsets.tolist()) == set(range(9))
    assert 0.4 < first[2].float().mean() < 0.6
    assert not draw(0, 1, flip=False)[2].any()
    assert draw_crops(1, 8, flip=True, seed=0, epoch=1, device=CPU).pad == 1


def test_each_image_has_its_own_crop() -> None:
    images = torch.arange(64, dtype=torch.uint8).reshape(2, 4, 4, 2)
    drawn = draw_crops(2, 32, flip=True, seed=0, epoch=1, device=CPU)
    both = crop_flip(images, drawn)
    for i in range(2):
        alone = crop_flip(images[i : i + 1], drawn.of(torch.tensor([i])))
        assert torch.equal(both[i], alone[0])


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 1000))
def test_boxes_lie_inside_and_keep_their_promises(width: int, height: int, seed: int) -> None:
    left, upper, right, lower = crop_box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    if min(width, height) >= 64 and max(width, height) < 2 * min(width, height):
        area = (right - left) * (lower - upper) / (width * height)
        aspect = (right - left) / (lower - upper)
        assert 0.07 < area <= 1
        assert 0.72 < aspect < 1.39


def test_a_strip_gets_its_central_crop() -> None:
    assert crop_box(1000, 30, np.random.default_rng(0)) == (480, 0, 520, 30)
    assert crop_box(30, 1000, np.random.default_rng(0)) == (0, 480, 30, 520)


def test_resized_crops_depend_on_the_item_not_on_the_order() -> None:
    draws = np.random.default_rng(0)
    items = [draws.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(3)]
    preprocess = Preprocess(crop=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)

    def make(epoch: int) -> ResizedCrops:
        names = ["a", "b", "c"]
        return ResizedCrops(items=items, names=names, preprocess=preprocess, seed=3, epoch=epoch)

    forward = [make(1)[i] for i in (0, 1, 2)]
    backward = [make(1)[i] for i in (2, 1, 0)][::-1]
    assert all(map(np.array_equal, forward, backward))
    assert forward[0].shape == (8, 8, 3)
    assert not np.array_equal(forward[0], make(2)[0])
    assert len(make(1)) == 3
    broken = ResizedCrops(
        items=[b"\xff\xd8\xffno"], names=["bad.jpg"], preprocess=preprocess, seed=0, epoch=1
    )
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        broken[0]


def test_grey_arrays_are_cropped_too() -> None:
    item = np.arange(100, dtype=np.uint8).reshape(10, 10, 1)
    preprocess = Preprocess(crop=(4, 4), mean=(0.5,), std=(0.5,))
    crops = ResizedCrops(items=[item], names=["x"], preprocess=preprocess, seed=0, epoch=1)
    assert crops[0].shape == (4, 4, 1)


def test_purposes_do_not_share_random_numbers() -> None:
    draws = {float(generator(0, 1, purpose, item).random()) for purpose in range(4)
             for item in range(5)}  # fmt: skip
    assert len(draws) == 20
