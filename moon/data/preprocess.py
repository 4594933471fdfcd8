"""Preprocess: from any image to the exact pixels, and numbers, a model was trained on."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from moon.data.decode import MAX_PIXELS, decode
from moon.errors import ImageError, UsageError

__all__ = ["ImageLike", "Interpolation", "Preprocess"]

ImageLike = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]
Interpolation = Literal["bilinear", "bicubic", "nearest"]

_RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
_LARGEST_SIDE = 16384
_LONGEST_ASPECT = 16


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes a model's input: resize, centre crop, normalise.

    Args:
        crop: height and width of the model's input, in pixels.
        resize: length the shorter side is resized to before the centre crop, keeping the
            aspect; None resizes straight to ``crop``, ignoring the aspect.
        mean, std: of each channel, in units of the [0, 1] pixel range; their length,
            1 (grey) or 3 (RGB), is the number of channels.
        interpolation: how pixels are resampled; down-sampling is antialiased.

    Raises:
        UsageError: a value is out of range.
    """

    crop: tuple[int, int]
    resize: int | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", _sizes(self.crop))
        object.__setattr__(self, "mean", _numbers("mean", self.mean))
        object.__setattr__(self, "std", _numbers("std", self.std))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise UsageError(
                f"mean and std need 1 value (grey) or 3 (RGB) each, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise UsageError(f"std must be above 0, got {list(self.std)}")
        if self.interpolation not in get_args(Interpolation):
            known = ", ".join(get_args(Interpolation))
            raise UsageError(f"no interpolation {self.interpolation!r}", remedy=f"Use {known}")
        if self.resize is None:
            return
        if not _is_int(self.resize) or not max(self.crop) <= self.resize <= _LARGEST_SIDE:
            raise UsageError(
                f"resize must be a whole number from {max(self.crop)} (the crop) "
                f"to {_LARGEST_SIDE}, got {self.resize!r}"
            )

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[H, W, C] of what `pixels` returns."""
        return (*self.crop, self.channels)

    def pixels(
        self, item: ImageLike, *, max_pixels: int = MAX_PIXELS, name: str | None = None
    ) -> npt.NDArray[np.uint8]:
        """The model's input pixels of one image.

        Args:
            item: a path, the bytes of an image file or a Pillow image, of any size, which
                are converted; or a uint8 array [H, W, C], or [H, W] for one channel, which
                must already have the model's shape.
            max_pixels: largest image that is decoded, in pixels.
            name: what to call the image in errors.

        Returns:
            uint8 [H, W, C].

        Raises:
            ImageError: not readable, or an array of another shape or type.
        """
        if isinstance(item, np.ndarray):
            return self._from_array(item, name or "the array")
        image = decode(item, "L" if self.channels == 1 else "RGB", max_pixels=max_pixels, name=name)
        # Faster than Pillow's array interface on small images.
        flat = np.frombuffer(bytearray(self._fit(image).tobytes()), np.uint8)
        return flat.reshape(self.shape)

    def normalise(self, pixels_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """``(x / 255 - mean) / std`` in float32.

        Args:
            pixels_NHWC: uint8 [N, H, W, C], as `pixels` makes them.

        Returns:
            float32 [N, C, H, W], contiguous.

        Raises:
            ImageError: another shape or type.
        """
        if pixels_NHWC.dtype != np.uint8 or pixels_NHWC.shape[1:] != self.shape:
            raise ImageError(
                f"expected uint8 pixels [N, {', '.join(map(str, self.shape))}], "
                f"got {pixels_NHWC.dtype} {list(pixels_NHWC.shape)}"
            )
        n, height, width, channels = pixels_NHWC.shape
        x_NCHW = np.empty((n, channels, height, width), np.float32)
        # There are only 256 pixel values: looking them up is the same, and twice as fast.
        for c, table in enumerate(self._table()):
            np.take(table, pixels_NHWC[..., c], out=x_NCHW[:, c], mode="clip")
        return x_NCHW

    def to_json(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return {
            "resize": self.resize,
            "crop": list(self.crop),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_json`.

        Raises:
            UsageError: a field is missing, unknown or out of range.
        """
        if not isinstance(obj, Mapping):
            raise UsageError(f"preprocess must be an object, got {type(obj).__name__}")
        fields = set(cls.__dataclass_fields__)
        if set(obj) != fields:
            odd = ", ".join(sorted(map(str, set(obj) ^ fields)))
            raise UsageError(f"preprocess has missing or unknown fields: {odd}")
        return cls(**obj)

    def _table(self) -> npt.NDArray[np.float32]:
        """float32 [C, 256]: what each pixel value becomes."""
        values = np.arange(256, dtype=np.float32) / np.float32(255)
        mean_C1 = np.array(self.mean, np.float32)[:, None]
        std_C1 = np.array(self.std, np.float32)[:, None]
        table: npt.NDArray[np.float32] = (values - mean_C1) / std_C1
        return table

    def _fit(self, image: Image.Image) -> Image.Image:
        height, width = self.crop
        resample = _RESAMPLE[self.interpolation]
        if self.resize is None:
            same = image.size == (width, height)
            return image if same else image.resize((width, height), resample)
        image = _less_long(image)
        short = min(image.size)
        if short != self.resize:
            w, h = (self.resize * side // short for side in image.size)
            image = image.resize((w, h), resample)
        if image.size == (width, height):
            return image
        left = round((image.width - width) / 2)
        top = round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _from_array(self, array: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
        if array.dtype != np.uint8:
            raise ImageError(
                f"{name} must be uint8 (0 to 255), got {array.dtype}",
                remedy="Convert it to uint8, or pass an image",
            )
        grey = self.channels == 1 and array.ndim == 2
        if (array.shape if not grey else (*array.shape, 1)) != self.shape:
            raise ImageError(
                f"{name} must have the shape {list(self.shape)} (height, width, channels), "
                f"got {list(array.shape)}",
                remedy="Resize it yourself, or pass an image, which is converted",
            )
        return array.reshape(self.shape)


def _less_long(image: Image.Image) -> Image.Image:
    # The crop never reaches beyond the central square; resizing all of a 1 x 1,000,000
    # strip would take gigabytes.
    short, long = sorted(image.size)
    if long <= _LONGEST_ASPECT * short:
        return image
    keep = _LONGEST_ASPECT * short
    start = (long - keep) // 2
    if image.width > image.height:
        return image.crop((start, 0, start + keep, short))
    return image.crop((0, start, short, start + keep))


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _sizes(crop: Any) -> tuple[int, int]:
    if (
        not isinstance(crop, tuple | list)
        or len(crop) != 2
        or not all(_is_int(side) and 1 <= side <= _LARGEST_SIDE for side in crop)
    ):
        raise UsageError(
            f"crop must be [height, width], each from 1 to {_LARGEST_SIDE}, got {crop!r}"
        )
    return int(crop[0]), int(crop[1])


def _numbers(field: str, values: Any) -> tuple[float, ...]:
    numeric = isinstance(values, tuple | list) and all(
        isinstance(value, int | float | np.number) and not isinstance(value, bool)
        for value in values
    )
    if not numeric or not all(math.isfinite(value) for value in values):
        raise UsageError(f"{field} must be a list of finite numbers, got {values!r}")
    return tuple(float(value) for value in values)
