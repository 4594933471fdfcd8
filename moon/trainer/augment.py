"""Random changes to training images. All randomness is drawn ahead, from (seed, epoch).

Shape suffixes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from moon.data.decode import decode
from moon.data.items import Item, Items
from moon.data.preprocess import Preprocess

__all__ = ["Crops", "ResizedCrops", "crop_box", "crop_flip", "draw_crops", "generator"]

PAD_SHARE = 8
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))

# One stream of random numbers for each purpose, so that none depends on another's use.
ORDER, AUGMENT, RESIZED_CROP, DROPOUT, MIXUP = range(5)


def generator(seed: int, epoch: int, purpose: int, item: int = 0) -> np.random.Generator:
    """The random numbers of one purpose in one epoch (and for one image)."""
    return np.random.default_rng([seed, epoch, purpose, item])


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Where each of N images is cropped, in pixels of the padded image, and whether mirrored."""

    pad: int
    tops: Tensor
    lefts: Tensor
    mirrored: Tensor

    def of(self, chosen: Tensor) -> Crops:
        """Those of the images at ``chosen``."""
        return Crops(
            pad=self.pad,
            tops=self.tops[chosen],
            lefts=self.lefts[chosen],
            mirrored=self.mirrored[chosen],
        )

    def copy_(self, other: Crops) -> None:
        """Overwrite in place with as many others."""
        self.tops.copy_(other.tops)
        self.lefts.copy_(other.lefts)
        self.mirrored.copy_(other.mirrored)

    def clone(self) -> Crops:
        """A copy in memory of its own."""
        return replace(
            self, tops=self.tops.clone(), lefts=self.lefts.clone(), mirrored=self.mirrored.clone()
        )


def draw_crops(
    count: int, side: int, *, flip: bool, seed: int, epoch: int, device: torch.device
) -> Crops:
    """Draw a crop for each of ``count`` images, padded by an eighth of ``side`` (4 at 32).

    Args:
        side: the shorter side of the images, in pixels.
        flip: also mirror every second image, at random.
    """
    pad = max(1, side // PAD_SHARE)
    draws = generator(seed, epoch, AUGMENT)
    offsets = draws.integers(0, 2 * pad + 1, size=(2, count))
    mirror = draws.random(count) < 0.5 if flip else np.zeros(count, bool)
    tops, lefts = torch.from_numpy(offsets).to(device)
    return Crops(pad=pad, tops=tops, lefts=lefts, mirrored=torch.from_numpy(mirror).to(device))


def crop_flip(pixels_NHWC: Tensor, crops: Crops) -> Tensor:
    """Pad with black, crop back to the same size and mirror, all in one gather.

    Args:
        pixels_NHWC: uint8, on any device.
        crops: one for each image.
    """
    count, height, width, _ = pixels_NHWC.shape
    pad = crops.pad
    padded = torch.nn.functional.pad(pixels_NHWC, (0, 0, pad, pad, pad, pad))
    device = pixels_NHWC.device
    column_W = torch.arange(width, device=device)
    columns_NW = torch.where(crops.mirrored[:, None], width - 1 - column_W, column_W)
    columns_NW = columns_NW + crops.lefts[:, None]
    rows_NH = torch.arange(height, device=device) + crops.tops[:, None]
    image_N = torch.arange(count, device=device)
    return padded[image_N[:, None, None], rows_NH[:, :, None], columns_NW[:, None, :]]


@dataclass(frozen=True, kw_only=True)
class ResizedCrops:
    """Items seen through a random crop of random area and aspect, resized and mirrored.

    A stand-in for a source's items: what comes out are uint8 arrays [H, W, C] of the
    model's size. The draw depends on (seed, epoch, item) alone, not on who decodes when.
    """

    items: Items
    names: Sequence[str]
    preprocess: Preprocess
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> npt.NDArray[np.uint8]:
        image = _image(self.items[index], self.preprocess.channels, self.names[index])
        draws = generator(self.seed, self.epoch, RESIZED_CROP, index)
        box = crop_box(image.width, image.height, draws)
        height, width = self.preprocess.crop
        resample = Image.Resampling[self.preprocess.interpolation.upper()]
        image = image.resize((width, height), resample, box=box)
        if draws.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image, np.uint8).reshape(self.preprocess.shape)


def crop_box(width: int, height: int, draws: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a crop of 8 to 100% of the area, 3:4 to 4:3.

    As Inception's training did (Szegedy et al., 2015): ten tries, then the largest
    central crop of an allowed aspect.
    """
    for _ in range(10):
        area = width * height * draws.uniform(*CROP_AREA)
        aspect = math.exp(draws.uniform(*LOG_ASPECT))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(draws.integers(0, width - w + 1))
            upper = int(draws.integers(0, height - h + 1))
            return left, upper, left + w, upper + h
    w = min(width, max(1, round(height * CROP_ASPECT[1])))
    h = min(height, max(1, round(width / CROP_ASPECT[0])))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def _image(item: Item, channels: int, name: str) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    array: Any = item
    if isinstance(item, np.ndarray):
        array = Image.fromarray(item[:, :, 0] if item.ndim == 3 and item.shape[2] == 1 else item)
    return decode(array, mode, name=name)
