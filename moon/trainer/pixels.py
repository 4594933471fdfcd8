"""The decoded images of a set, the same for any number of decoding workers.

A set that fits the memory budget is decoded once and kept on the device as uint8; a larger
one, or one whose crops need the whole image, is decoded anew each epoch by worker processes.

Shape suffixes: N images of the set, B of a batch, H height, W width, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moon.data.items import Source
from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.errors import ImageError, MoonError, TrainingError
from moon.progress import Progress, silent
from moon.trainer.augment import ResizedCrops

__all__ = ["MEMORY_BUDGET", "MemoryPixels", "Pixels", "StreamedPixels", "open_pixels", "sent"]

MEMORY_BUDGET = 2 << 30
MOST_WORKERS = 16
# Batches that each decoding process works ahead.
AHEAD = 4


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
        for positions_B in sent(chosen, self._pixels_NHWC.device):
            yield self._pixels_NHWC[positions_B]


def sent(chosen: Sequence[npt.NDArray[np.int64]], device: torch.device) -> tuple[Tensor, ...]:
    """Arrays of positions on the device, by one copy for all of them."""
    if not chosen:
        return ()
    positions = torch.from_numpy(np.concatenate(chosen)).to(device)
    return torch.split(positions, [len(few) for few in chosen])


class StreamedPixels:
    """Images decoded when they are needed, by worker processes a few batches ahead.

    Args:
        indices: which items of the source, in the order of their positions here.
        resized_crop: the seed of a random crop of each image; None takes the centre.
        workers: processes; 0 decodes in this one; None takes one a core.
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
        cuda = self._device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            _Decoding(self._seen(epoch), self._preprocess),
            batch_sampler=[positions.tolist() for positions in chosen],
            num_workers=self._workers,
            prefetch_factor=AHEAD if self._workers else None,
            # From pinned memory the copy to a GPU runs while the host goes on.
            pin_memory=cuda,
            collate_fn=_as_it_is,
            # The loader draws a seed for its workers; not from the global generator.
            generator=torch.Generator(),
        )
        for batch in _watched(loader):
            if isinstance(batch, MoonError):
                raise batch
            yield batch.to(self._device, non_blocking=cuda)

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
    sharing: int = 1,
    progress: Progress = silent,
) -> Pixels:
    """The images in memory where they fit ``budget`` bytes, else streamed.

    Args:
        resized_crop: as of :class:`StreamedPixels`; such a set is always streamed.
        workers: processes that decode a streamed set; None takes one a core.
        sharing: processes of this machine that do the same, and share its cores.

    Raises:
        ImageError: an item cannot be read, naming it.
    """
    size = len(indices) * int(np.prod(preprocess.shape))
    if resized_crop is not None or size > budget:
        if workers is None:
            workers = _cores(sharing)
        return StreamedPixels(
            source, preprocess, indices, device, resized_crop=resized_crop, workers=workers
        )
    threads = None if sharing == 1 else _cores(sharing)
    pixels = load_pixels(source, preprocess, indices, workers=threads, progress=progress)
    return MemoryPixels(pixels, device)


class _Names(Sequence[str]):
    """The names of a source's underlying items, before any selection."""

    def __init__(self, source: Source) -> None:
        self._source = replace(source, kept=None)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._source.name(index)


class _Decoding(Dataset[Any]):
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

    def __getitems__(self, chosen: list[int]) -> Tensor | MoonError:
        # An error goes back as a value: the loader would wrap one raised here in a traceback.
        try:
            return torch.from_numpy(np.stack([self[i] for i in chosen]))
        except MoonError as error:
            error.__cause__ = None
            return error


def _watched(
    loader: DataLoader[Any],
) -> Iterator[Tensor | MoonError]:
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


def _cores(sharing: int = 1) -> int:
    has = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // sharing))
