"""Batches of images on the training device, the same for any number of decoding workers.

A set that fits the memory budget is decoded once and kept on the device as uint8; a larger
one, or one whose crops need the whole image, is decoded anew each epoch by worker processes.

Shape suffixes: N images of the set, B of a batch, H height, W width, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moon.data.items import Source
from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.errors import DataError, ImageError, MoonError, TrainingError
from moon.progress import Progress, silent
from moon.trainer.augment import ORDER, Crops, ResizedCrops, crop_flip, draw_crops, generator

__all__ = [
    "MEMORY_BUDGET",
    "Batches",
    "MemoryPixels",
    "Pixels",
    "RawBatch",
    "StreamedPixels",
    "open_pixels",
]

MEMORY_BUDGET = 2 << 30
MOST_WORKERS = 16


class Pixels(Protocol):
    """The decoded images of a set, by position."""

    def __len__(self) -> int: ...

    def batches(self, chosen: Sequence[npt.NDArray[np.int64]], epoch: int) -> Iterator[Tensor]:
        """uint8 [B, H, W, C] on the device, for each array of positions."""
        ...


class MemoryPixels:
    """All of a set's images on the device."""

    def __init__(self, pixels_NHWC: npt.NDArray[np.uint8], device: torch.device) -> None:
        self._pixels_NHWC = torch.from_numpy(pixels_NHWC).to(device)

    def __len__(self) -> int:
        return len(self._pixels_NHWC)

    def batches(self, chosen: Sequence[npt.NDArray[np.int64]], epoch: int) -> Iterator[Tensor]:
        device = self._pixels_NHWC.device
        for positions in chosen:
            yield self._pixels_NHWC[torch.from_numpy(positions).to(device)]


class StreamedPixels:
    """Images decoded when they are needed, by worker processes a few batches ahead.

    Args:
        indices: which items of the source, in the order of their positions here.
        resized_crop: the seed of a random crop of each image; None takes the centre.
        workers: processes; 0 decodes in this one.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        indices: npt.NDArray[np.int64],
        device: torch.device,
        *,
        resized_crop: int | None = None,
        workers: int | None = None,
    ) -> None:
        self._source = source.select(indices)
        self._preprocess = preprocess
        self._device = device
        self._seed = resized_crop
        self._workers = _cores() if workers is None else workers

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, chosen: Sequence[npt.NDArray[np.int64]], epoch: int) -> Iterator[Tensor]:
        loader: DataLoader[npt.NDArray[np.uint8] | MoonError] = DataLoader(
            _Decoding(self._seen(epoch), self._preprocess),
            batch_sampler=[positions.tolist() for positions in chosen],
            num_workers=self._workers,
            collate_fn=_as_it_is,
            # The loader draws a seed for its workers; not from the global generator.
            generator=torch.Generator(),
        )
        for batch in _watched(loader):
            if isinstance(batch, MoonError):
                raise batch
            yield torch.from_numpy(batch).to(self._device)

    def _seen(self, epoch: int) -> Source:
        if self._seed is None:
            return self._source
        source = self._source
        items = ResizedCrops(
            items=source.items,
            names=_Names(source),
            preprocess=self._preprocess,
            seed=self._seed,
            epoch=epoch,
        )
        return replace(source, items=items)


def open_pixels(
    source: Source,
    preprocess: Preprocess,
    indices: npt.NDArray[np.int64],
    device: torch.device,
    *,
    resized_crop: int | None = None,
    budget: int = MEMORY_BUDGET,
    workers: int | None = None,
    progress: Progress = silent,
) -> Pixels:
    """The images in memory where they fit ``budget`` bytes, else streamed.

    Args:
        resized_crop: as of :class:`StreamedPixels`; such a set is always streamed.

    Raises:
        ImageError: an item cannot be read, naming it.
    """
    size = len(indices) * int(np.prod(preprocess.shape))
    if resized_crop is not None or size > budget:
        return StreamedPixels(
            source, preprocess, indices, device, resized_crop=resized_crop, workers=workers
        )
    return MemoryPixels(load_pixels(source, preprocess, indices, progress=progress), device)


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """A batch as it was decoded, on the device.

    Attributes:
        pixels: uint8 [B, H, W, C].
        labels: int64 [B].
        crops: how each image is to be cropped and mirrored; None leaves it as it is.
    """

    pixels: Tensor
    labels: Tensor
    crops: Crops | None

    def copy_(self, other: RawBatch) -> None:
        """Overwrite in place with a batch of the same size, for captured CUDA graphs."""
        self.pixels.copy_(other.pixels)
        self.labels.copy_(other.labels)
        if self.crops is not None and other.crops is not None:
            self.crops.copy_(other.crops)

    def clone(self) -> RawBatch:
        """A copy in memory of its own."""
        return RawBatch(
            pixels=self.pixels.clone(),
            labels=self.labels.clone(),
            crops=None if self.crops is None else self.crops.clone(),
        )


class Batches:
    """Normalised batches of a labelled set, shuffled and augmented by (seed, epoch).

    Args:
        labels_N: int64, one for each image of ``pixels``.
        augment: ``crop`` or ``crop-flip``; everything else leaves the pixels as they come.
        seed: of the order and the crops; None keeps the order and the images as they are.

    Raises:
        DataError: there are fewer than two images.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels_N: npt.NDArray[np.int64],
        preprocess: Preprocess,
        batch_size: int,
        device: torch.device,
        *,
        augment: str = "none",
        seed: int | None = None,
    ) -> None:
        if seed is not None and len(pixels) < 2:
            raise DataError(f"{len(pixels)} training images are too few", remedy="Give more")
        self._pixels = pixels
        self._labels_N = torch.from_numpy(np.ascontiguousarray(labels_N)).to(device)
        self._preprocess = preprocess
        self._batch_size = batch_size
        self._device = device
        self._augment = augment
        self._seed = seed
        self._mean_C = torch.tensor(preprocess.mean, device=device)
        self._std_C = torch.tensor(preprocess.std, device=device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._positions(np.arange(len(self._pixels))))

    @property
    def images(self) -> int:
        return len(self._pixels)

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """float32 [B, C, H, W], channels last in memory, and int64 labels [B], on the device."""
        for batch in self.raw_epoch(epoch):
            yield self.prepare(batch), batch.labels

    def raw_epoch(self, epoch: int = 0) -> Iterator[RawBatch]:
        """The batches of ``epoch`` before ``prepare``, which turns each into the model's input."""
        order_N = np.arange(len(self._pixels))
        crops: Crops | None = None
        if self._seed is not None:
            order_N = generator(self._seed, epoch, ORDER).permutation(len(order_N))
            crops = self._draw(self._seed, epoch)
        chosen = self._positions(order_N)
        for positions, pixels in zip(chosen, self._pixels.batches(chosen, epoch), strict=True):
            positions_B = torch.from_numpy(positions).to(self._device)
            yield RawBatch(
                pixels=pixels,
                labels=self._labels_N[positions_B],
                crops=None if crops is None else crops.of(positions_B),
            )

    def prepare(self, batch: RawBatch) -> Tensor:
        """float32 [B, C, H, W], channels last in memory: cropped, mirrored and normalised.

        Only kernels on the device, none of which waits for the host, so it can be captured
        in a CUDA graph.
        """
        pixels = batch.pixels
        return self._normalised(pixels if batch.crops is None else crop_flip(pixels, batch.crops))

    def _draw(self, seed: int, epoch: int) -> Crops | None:
        if self._augment not in {"crop", "crop-flip"}:
            return None
        return draw_crops(
            len(self._pixels),
            min(self._preprocess.crop),
            flip=self._augment == "crop-flip",
            seed=seed,
            epoch=epoch,
            device=self._device,
        )

    def _positions(self, order_N: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        starts = range(0, len(order_N), self._batch_size)
        batches = [order_N[start : start + self._batch_size] for start in starts]
        if self._seed is not None and len(batches[-1]) < 2:
            # Batch norm has nothing to estimate from one image.
            batches.pop()
        return batches

    def _normalised(self, pixels_BHWC: Tensor) -> Tensor:
        # The order of operations of Preprocess.normalise, so that the bits are the same.
        x = pixels_BHWC.float().div_(255).sub_(self._mean_C).div_(self._std_C)
        return x.permute(0, 3, 1, 2)


class _Names(Sequence[str]):
    """The names of a source's underlying items, before any selection."""

    def __init__(self, source: Source) -> None:
        self._source = replace(source, kept=None)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._source.name(index)


class _Decoding(Dataset[npt.NDArray[np.uint8]]):
    def __init__(self, source: Source, preprocess: Preprocess) -> None:
        self._source = source
        self._preprocess = preprocess

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> npt.NDArray[np.uint8]:
        name = self._source.name(i)
        try:
            return self._preprocess.pixels(self._source.item(i), name=name)
        except ImageError as error:
            if name in error.cause:
                raise
            raise ImageError(f"{name}: {error.cause}", remedy=error.remedy) from error

    def __getitems__(self, chosen: list[int]) -> npt.NDArray[np.uint8] | MoonError:
        # An error goes back as a value: the loader would wrap one raised here in a traceback.
        try:
            return np.stack([self[i] for i in chosen])
        except MoonError as error:
            error.__cause__ = None
            return error


def _watched(
    loader: DataLoader[npt.NDArray[np.uint8] | MoonError],
) -> Iterator[npt.NDArray[np.uint8] | MoonError]:
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a process that decodes images died: {error}", remedy="It may have run out of memory"
        ) from error


def _as_it_is(batch: Any) -> Any:
    return batch


def _cores() -> int:
    has = hasattr(os, "sched_getaffinity")
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1)
