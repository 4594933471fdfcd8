"""Batches of labelled images, shuffled, augmented and shared out among the ranks of a run.

Shape suffixes: N images of the set, B of a batch, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moon.data.preprocess import Preprocess
from moon.errors import DataError, UsageError
from moon.trainer.augment import ORDER, Crops, crop_flip, draw_crops, generator
from moon.trainer.pixels import Pixels, sent

__all__ = ["Batches", "RawBatch", "slice_of"]

# Images of a training batch on each rank: batch norm has nothing to estimate from one.
LEAST = 2


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """A batch as it was decoded, on the device.

    Attributes:
        pixels: uint8 [B, H, W, C].
        labels: int64 [B].
        crops: how each image is to be cropped and mirrored; None leaves it as it is.
        share: its images over those of an equal share of the whole batch. With losses so
            scaled, the mean of the ranks' gradients is the gradient of the whole batch's mean.
    """

    pixels: Tensor
    labels: Tensor
    crops: Crops | None
    share: float = 1.0

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
            share=self.share,
        )


class Batches:
    """Normalised batches of a labelled set, shuffled and augmented by (seed, epoch).

    A last training batch is left out where a rank would get fewer than two of its images.

    Args:
        labels_N: int64, one for each image of ``pixels``.
        augment: ``crop`` or ``crop-flip``; everything else leaves the pixels as they come.
        seed: of the order and the crops; None keeps the order and the images as they are.
        rank, world: which of how many processes this is; the order and the crops are those
            of one process.

    Raises:
        DataError: there are fewer than two images for each rank.
        UsageError: a batch has.
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
        rank: int = 0,
        world: int = 1,
    ) -> None:
        least = LEAST * world
        if seed is not None and len(pixels) < least:
            raise DataError(f"{len(pixels)} training images are too few", remedy="Give more")
        if seed is not None and batch_size < least:
            raise UsageError(
                f"batch_size {batch_size} is too small for {world} processes, which share it out",
                remedy=f"Set batch_size to at least {least}, or start fewer processes",
            )
        self._pixels = pixels
        self._labels_N = torch.from_numpy(np.ascontiguousarray(labels_N)).to(device)
        self._preprocess = preprocess
        self._batch_size = batch_size
        self._device = device
        self._augment = augment
        self._seed = seed
        self._rank, self._world = rank, world
        self._mean_C = torch.tensor(preprocess.mean, device=device)
        self._std_C = torch.tensor(preprocess.std, device=device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._positions(np.arange(len(self._pixels))))

    @property
    def images(self) -> int:
        return len(self._pixels)

    @property
    def sizes(self) -> list[int]:
        """Images in this rank's slice of each batch of an epoch."""
        whole = self._positions(np.arange(len(self._pixels)))
        return [len(slice_of(positions, self._rank, self._world)) for positions in whole]

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's among the batches of ``epoch``, each whole: every ``world``-th of them.

        Yields:
            float32 [B, C, H, W], channels last in memory, and int64 labels [B], on the device.
        """
        whole = self._positions(self._order(epoch))[self._rank :: self._world]
        for batch in self._read(whole, epoch):
            yield self.prepare(batch), batch.labels

    def raw_epoch(self, epoch: int = 0) -> Iterator[RawBatch]:
        """This rank's slice of every batch of ``epoch``, before ``prepare`` makes it an input."""
        whole = self._positions(self._order(epoch))
        mine = [slice_of(positions, self._rank, self._world) for positions in whole]
        shares = [len(few) * self._world / len(all_) for few, all_ in zip(mine, whole, strict=True)]
        for batch, share in zip(self._read(mine, epoch), shares, strict=True):
            yield replace(batch, share=share)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._seed is None:
            return np.arange(len(self._pixels))
        return generator(self._seed, epoch, ORDER).permutation(len(self._pixels))

    def _read(self, chosen: list[npt.NDArray[np.int64]], epoch: int) -> Iterator[RawBatch]:
        crops = None if self._seed is None else self._draw(self._seed, epoch)
        positions = sent(chosen, self._device)
        for positions_B, pixels in zip(positions, self._pixels.batches(chosen, epoch), strict=True):
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
        if self._seed is not None and len(batches[-1]) < LEAST * self._world:
            batches.pop()
        return batches

    def _normalised(self, pixels_BHWC: Tensor) -> Tensor:
        # The order of operations of Preprocess.normalise, so that the bits are the same.
        x = pixels_BHWC.float().div_(255).sub_(self._mean_C).div_(self._std_C)
        return x.permute(0, 3, 1, 2)


def slice_of(positions: npt.NDArray[np.int64], rank: int, world: int) -> npt.NDArray[np.int64]:
    """The rank's part of a batch: contiguous, and as long as the others' but for one image."""
    count = len(positions)
    return positions[rank * count // world : (rank + 1) * count // world]
