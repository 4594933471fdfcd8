"""Valid images made worse on purpose: noise, blur, JPEG, brightness, contrast, five strengths each.

The definitions are those of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich, "Benchmarking
Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019). Their constants
are for images of 224 and of 32 pixels; at a side between the two they are interpolated on a
logarithmic scale, and outside it the nearer table is used. Corruptions are applied to the
model's input pixels, and the same image always gets the same noise.

Shape suffixes: B images, H height, W width, C channels.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moon.errors import UsageError

__all__ = ["CORRUPTIONS", "STRENGTHS", "corrupt", "reencoded"]

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

STRENGTHS = (1, 2, 3, 4, 5)
_SMALL, _LARGE = 32, 224
# kind -> constants at 32 pixels (CIFAR-10-C), and at 224 (ImageNet-C)
_CONSTANTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
}
CORRUPTIONS = tuple(_CONSTANTS)


def corrupt(pixels_BHWC: Pixels, kind: str, strength: int, *, first: int = 0) -> Pixels:
    """Corrupt prepared images.

    Args:
        pixels_BHWC: uint8, as ``Preprocess.pixels`` makes them.
        kind: one of ``CORRUPTIONS``.
        strength: 1 (slight) to 5 (severe).
        first: position of the first image in its set; noise is drawn by position, so that it
            does not depend on how a set is cut into batches.

    Raises:
        UsageError: no such kind or strength.
    """
    if kind not in _CONSTANTS or strength not in STRENGTHS:
        raise UsageError(
            f"there is no corruption {kind!r} of strength {strength}",
            remedy=f"Choose from {', '.join(CORRUPTIONS)}, strength 1 to 5",
        )
    amount = constant(kind, strength, min(pixels_BHWC.shape[1:3]))
    if kind == "jpeg":
        return np.stack([reencoded(image, round(amount)) for image in pixels_BHWC])
    if kind == "noise":
        return _noisy(pixels_BHWC, amount, strength, first)
    return _PLAIN[kind](pixels_BHWC, amount)


def constant(kind: str, strength: int, side: int) -> float:
    """The published constant at 32 and 224 pixels; in between, interpolated in logarithms."""
    small, large = (table[strength - 1] for table in _CONSTANTS[kind])
    part = math.log(side / _SMALL) / math.log(_LARGE / _SMALL)
    return float(small * (large / small) ** min(max(part, 0.0), 1.0))


def reencoded(pixels_HWC: Pixels, quality: int) -> Pixels:
    """The image after JPEG of that quality, colour at half resolution (4:2:0), and back."""
    grey = pixels_HWC.shape[-1] == 1
    file = io.BytesIO()
    image = Image.fromarray(pixels_HWC[..., 0] if grey else pixels_HWC)
    if grey:
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=2)
    file.seek(0)
    with Image.open(file) as decoded:
        again: Pixels = np.asarray(decoded, np.uint8).reshape(pixels_HWC.shape)
    return again


def _noisy(pixels_BHWC: Pixels, spread: float, strength: int, first: int) -> Pixels:
    noisy = np.empty_like(pixels_BHWC)
    for i, pixels in enumerate(pixels_BHWC):
        noise = np.random.default_rng([first + i, strength]).standard_normal(
            pixels.shape, np.float32
        )
        noisy[i] = _rounded(pixels + 255 * np.float32(spread) * noise)
    return noisy


def _blurred(pixels_BHWC: Pixels, sigma: float) -> Pixels:
    # Separable: one small matrix for the rows and one for the columns.
    rows = _smoother(pixels_BHWC.shape[1], sigma)
    columns = _smoother(pixels_BHWC.shape[2], sigma)
    down = np.einsum("ih,bhwc->biwc", rows, pixels_BHWC.astype(np.float32), optimize=True)
    return _rounded(np.einsum("jw,bhwc->bhjc", columns, down, optimize=True))


@functools.lru_cache(maxsize=16)
def _smoother(side: int, sigma: float) -> Floats:
    """[side, side]: each row a Gaussian cut at 4 sigma, the edge pixel repeated beyond it."""
    reach = math.ceil(4 * sigma)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    matrix = np.zeros((side, side))
    for row in range(side):
        np.add.at(matrix[row], np.clip(row + offsets, 0, side - 1), weights)
    return matrix.astype(np.float32)


def _brightened(pixels_BHWC: Pixels, amount: float) -> Pixels:
    """Add to V of HSV: hue and saturation stay, so all channels grow by one factor."""
    values = pixels_BHWC.astype(np.float32)
    top = values.max(axis=-1, keepdims=True)
    lifted = np.minimum(top + 255 * np.float32(amount), 255)
    # Black has no hue: it becomes grey.
    grown = np.where(top > 0, values * (lifted / np.maximum(top, 1)), lifted)
    return _rounded(grown)


def _flattened(pixels_BHWC: Pixels, amount: float) -> Pixels:
    """Draw every pixel towards the image's mean colour."""
    values = pixels_BHWC.astype(np.float32)
    mean = values.mean(axis=(1, 2), keepdims=True)
    return _rounded((values - mean) * np.float32(amount) + mean)


def _rounded(values: NDArray[np.floating]) -> Pixels:
    pixels: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return pixels


_PLAIN: dict[str, Callable[[Pixels, float], Pixels]] = {
    "blur": _blurred,
    "brightness": _brightened,
    "contrast": _flattened,
}
