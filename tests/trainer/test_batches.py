from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.data.source import open_source
from moon.errors import DataError, ImageError, TrainingError
from moon.trainer.batches import Batches
from moon.trainer.pixels import MemoryPixels, Pixels, StreamedPixels, _watched, open_pixels

CPU = torch.device("cpu")
GREY = Preprocess(crop=(8, 8), mean=(0.3,), std=(0.4,))
RGB = Preprocess(crop=(6, 7), mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))


def batches(
    pixels: Pixels, labels: np.ndarray, preprocess: Preprocess, **options: object
) -> Batches:
    settings: dict[str, object] = {"augment": "crop-flip", "seed": 5, **options}
    return Batches(pixels, labels, preprocess, 3, CPU, **settings)  # type: ignore[arg-type]


def flat(made: Batches, epoch: int) -> list[tuple[Tensor, Tensor]]:
    return list(made.epoch(epoch))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("preprocess", [RGB, Preprocess(crop=(6, 7), mean=(0.3,), std=(0.2,))])
def test_normalised_to_the_bit_as_when_running(class_folder: Path, preprocess: Preprocess) -> None:
    source = open_source(class_folder)
    pixels = load_pixels(source, preprocess)
    made = Batches(MemoryPixels(pixels, CPU), source.labels, preprocess, 4, CPU)
    got = flat(made, 0)
    assert [len(y) for _, y in got] == [4, 4, 1]
    images = torch.cat([x for x, _ in got])
    assert torch.equal(images, torch.from_numpy(preprocess.normalise(pixels)))
    assert torch.equal(torch.cat([y for _, y in got]), torch.from_numpy(source.labels))
    assert got[0][0].is_contiguous(memory_format=torch.channels_last)


def test_each_epoch_sees_every_image_once_in_an_order_of_its_own(class_folder: Path) -> None:
    source = open_source(class_folder)
    pixels = MemoryPixels(load_pixels(source, RGB), CPU)
    made = batches(pixels, np.arange(9), RGB)
    assert (len(made), made.images) == (3, 9)
    orders = [torch.cat([y for _, y in flat(made, epoch)]).tolist() for epoch in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(9))
    assert same(flat(made, 1), flat(made, 1))


def test_a_last_batch_of_one_is_left_out_of_training_only() -> None:
    pixels = MemoryPixels(np.zeros((7, 8, 8, 1), np.uint8), CPU)
    assert len(batches(pixels, np.arange(7), GREY)) == 2
    assert [len(y) for _, y in flat(batches(pixels, np.arange(7), GREY), 1)] == [3, 3]
    assert len(batches(pixels, np.arange(7), GREY, seed=None)) == 3
    with pytest.raises(DataError, match="1 training images are too few"):
        batches(MemoryPixels(np.zeros((1, 8, 8, 1), np.uint8), CPU), np.arange(1), GREY)


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_streamed_is_the_same_as_in_memory(class_folder: Path, augment: str) -> None:
    source = open_source(class_folder)
    chosen = np.array([0, 2, 3, 5, 7, 8])
    labels = np.arange(6)
    memory = open_pixels(source, RGB, chosen, CPU)
    streamed = open_pixels(source, RGB, chosen, CPU, budget=10, workers=0)
    assert isinstance(memory, MemoryPixels)
    assert isinstance(streamed, StreamedPixels)
    one = batches(memory, labels, RGB, augment=augment)
    two = batches(streamed, labels, RGB, augment=augment)
    for epoch in (1, 2):
        assert same(flat(one, epoch), flat(two, epoch))


# torch warns of more workers than cores, which is what is wanted here.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("resized_crop", [None, 4])
def test_the_number_of_workers_changes_nothing(
    class_folder: Path, resized_crop: int | None
) -> None:
    source = open_source(class_folder)
    before = torch.random.get_rng_state()

    def made(workers: int) -> list[tuple[Tensor, Tensor]]:
        pixels = open_pixels(
            source, RGB, np.arange(9), CPU, resized_crop=resized_crop, budget=0, workers=workers
        )
        return flat(batches(pixels, np.arange(9), RGB, augment="none"), 1)

    alone = made(0)
    assert same(alone, made(1))
    assert same(alone, made(3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_resized_crops_follow_the_item_through_a_selection(class_folder: Path) -> None:
    source = open_source(class_folder)

    def image(chosen: list[int], position: int) -> Tensor:
        pixels = open_pixels(source, RGB, np.array(chosen), CPU, resized_crop=4, workers=0)
        return next(pixels.batches([np.array([position])], 1))

    assert torch.equal(image([2, 5, 8], 1), image([5], 0))
    assert not torch.equal(image([2, 5, 8], 1), image([2, 5, 8], 2))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resized_crop", [None, 4])
def test_a_bad_image_is_named_in_one_line(
    class_folder: Path, workers: int, resized_crop: int | None
) -> None:
    (class_folder / "bee" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    source = open_source(class_folder)
    pixels = StreamedPixels(
        source, RGB, np.arange(9), CPU, resized_crop=resized_crop, workers=workers
    )
    with pytest.raises(ImageError, match=r"1\.png") as caught:
        list(pixels.batches([np.arange(9)], 1))
    assert "Traceback" not in str(caught.value)


def test_a_dead_worker_is_explained() -> None:
    class Dying:
        def __iter__(self) -> object:
            raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")

    class Odd:
        def __iter__(self) -> object:
            raise RuntimeError("something else")

    with pytest.raises(TrainingError, match=r"decodes images died.*out of memory"):
        list(_watched(Dying()))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="something else"):
        list(_watched(Odd()))  # type: ignore[arg-type]
