"""Out-of-distribution images made from in-distribution ones, for when there are no real ones.

Each kind is fixed beforehand and needs no other data. What must not happen is that a made image
is still in-distribution: then a good score would be punished for accepting it. So there is
nothing here that a camera or a hand could have done to a known image (flips, rotations, other
colours, noise on top), and nothing made of images of one class alone but for ``jigsaw``, which
takes the image apart.

    far   noise   every value uniform and independent: no structure at all
          blobs   smooth random fields: structure, but none of the images'
          phase   an image with random Fourier phases: its colours' means, contrast and power
                  spectrum, and nothing of its shapes
    near  jigsaw  an image cut into a grid, no piece left in its place: its parts and texture,
                  without its arrangement
          mosaic  a chequerboard of two images predicted as different classes
          blend   the average of two such images

Sources: noise and blobs are the usual extremes (Hendrycks, Mazeika and Dietterich, "Deep
Anomaly Detection with Outlier Exposure", ICLR 2019); shifted parts as outliers: Tack et al.,
"CSI", NeurIPS 2020; mixed images as outliers: Zhu et al., "OpenMix", CVPR 2023.

Near kinds can fail: a texture taken apart is the same texture. An image that a kind leaves
almost as it was is dropped, and whoever ranks scores by a near kind must check that some score
can tell it from known images at all.

Shape suffixes: N images, M of them made, H height, W width, C channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moon.errors import DataError, UsageError

__all__ = ["FAR", "KINDS", "NEAR", "Made", "make_ood"]

FAR: tuple[str, ...] = ("noise", "blobs", "phase")
NEAR: tuple[str, ...] = ("jigsaw", "mosaic", "blend")
KINDS = FAR + NEAR

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Blobs are random fields of this many values a side, interpolated.
_BLOBS = 5
# From this side on a grid has 4 x 4 cells, below it 2 x 2: a cell should still hold a part.
_FINE_FROM = 16
# An image is dropped when it moved by less than this share of its own mean deviation.
_CHANGED = 0.25


@dataclass(frozen=True, eq=False)
class Made:
    """Images of one kind.

    Attributes:
        pixels: uint8 [M, H, W, C]; M is at most N.
        rows: which of the N images each was made from, [M] ascending. Those of ``noise`` and
            ``blobs`` were made from none, and are numbered alike.
    """

    pixels: Pixels
    rows: Ints


def make_ood(kind: str, pixels_NHWC: Pixels, labels_N: npt.ArrayLike, *, seed: int = 0) -> Made:
    """One image of a kind for each in-distribution image, where the kind allows.

    Args:
        kind: one of :data:`KINDS`.
        pixels_NHWC: in-distribution images, uint8, any size and number of channels.
        labels_N: [N] their classes as the model predicts them, for the kinds of two images.
        seed: the same arguments give the same images.

    Returns:
        What was made; nothing for a kind of two images where all are predicted alike.

    Raises:
        UsageError: no such kind.
        DataError: no images, or not uint8 [N, H, W, C].
    """
    if kind not in _MAKERS:
        raise UsageError(f"no kind {kind!r} of made images", remedy=f"Use {', '.join(KINDS)}")
    labels = np.asarray(labels_N)
    if pixels_NHWC.ndim != 4 or pixels_NHWC.dtype != np.uint8 or not pixels_NHWC.size:
        raise DataError(
            f"expected uint8 images [N, H, W, C], got {pixels_NHWC.dtype} {list(pixels_NHWC.shape)}"
        )
    if labels.shape != pixels_NHWC.shape[:1]:
        raise DataError(f"{len(pixels_NHWC)} images have predictions {list(labels.shape)}")
    # Each kind draws from a stream of its own: none depends on which others are made.
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    rows, made = _MAKERS[kind](pixels_NHWC, labels, rng)
    if kind in ("phase", *NEAR):
        kept = _changed(pixels_NHWC[rows], made)
        rows, made = rows[kept], made[kept]
    return Made(made, rows)


_Maker = Callable[[Pixels, npt.NDArray[np.int64], np.random.Generator], tuple[Ints, Pixels]]


def _noise(pixels: Pixels, _: Ints, rng: np.random.Generator) -> tuple[Ints, Pixels]:
    return np.arange(len(pixels)), rng.integers(0, 256, pixels.shape, np.uint8)


def _blobs(pixels: Pixels, _: Ints, rng: np.random.Generator) -> tuple[Ints, Pixels]:
    n, height, width, channels = pixels.shape
    coarse = rng.random((n, min(_BLOBS, height), min(_BLOBS, width), channels))
    down = _between(height, coarse.shape[1])
    across = _between(width, coarse.shape[2])
    smooth = np.einsum("hy,nyxc,wx->nhwc", down, coarse, across)
    # Each image spans the whole range, as natural ones do.
    low, high = smooth.min((1, 2), keepdims=True), smooth.max((1, 2), keepdims=True)
    return np.arange(n), _as_pixels(255 * (smooth - low) / np.maximum(high - low, 1e-12))


def _between(length: int, points: int) -> Floats:
    """Weights [length, points] of a cosine interpolation between evenly spaced points."""
    at = np.linspace(0, points - 1, length)
    left = np.minimum(at.astype(np.int64), max(points - 2, 0))
    share = (1 - np.cos(np.pi * (at - left))) / 2
    weights = np.zeros((length, points))
    weights[np.arange(length), left] = 1 - share
    weights[np.arange(length), np.minimum(left + 1, points - 1)] += share
    return weights


def _phase(pixels: Pixels, _: Ints, rng: np.random.Generator) -> tuple[Ints, Pixels]:
    made = np.empty_like(pixels)
    for i, image in enumerate(pixels):
        # The phases of real noise have the symmetry that makes the result real. One set for
        # all channels keeps the colours together.
        turn = np.fft.fft2(rng.standard_normal(image.shape[:2]))
        turn /= np.maximum(np.abs(turn), 1e-12)
        turn[0, 0] = 1  # the mean stays
        spectrum = np.fft.fft2(image.astype(np.float64), axes=(0, 1))
        made[i] = _as_pixels(np.fft.ifft2(spectrum * turn[..., None], axes=(0, 1)).real)
    return np.arange(len(pixels)), made


def _jigsaw(pixels: Pixels, _: Ints, rng: np.random.Generator) -> tuple[Ints, Pixels]:
    corners, (high, wide) = _cells(pixels.shape[1], pixels.shape[2])
    made = pixels.copy()
    for i, image in enumerate(pixels):
        order = _nothing_in_place(len(corners), rng)
        for (y, x), (from_y, from_x) in zip(corners, (corners[j] for j in order), strict=True):
            made[i, y : y + high, x : x + wide] = image[
                from_y : from_y + high, from_x : from_x + wide
            ]
    return np.arange(len(pixels)), made


def _mosaic(pixels: Pixels, labels: Ints, rng: np.random.Generator) -> tuple[Ints, Pixels]:
    rows, others = _pairs(labels, rng)
    corners, (high, wide) = _cells(pixels.shape[1], pixels.shape[2])
    made = pixels[rows].copy()
    for y, x in corners:
        if (y // high + x // wide) % 2:
            made[:, y : y + high, x : x + wide] = pixels[others, y : y + high, x : x + wide]
    return rows, made


def _blend(pixels: Pixels, labels: Ints, rng: np.random.Generator) -> tuple[Ints, Pixels]:
    rows, others = _pairs(labels, rng)
    return rows, _as_pixels((pixels[rows].astype(np.float64) + pixels[others]) / 2)


_MAKERS: dict[str, _Maker] = {
    "noise": _noise,
    "blobs": _blobs,
    "phase": _phase,
    "jigsaw": _jigsaw,
    "mosaic": _mosaic,
    "blend": _blend,
}


def _cells(height: int, width: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Upper left corners of a grid's cells, and their size; what does not fit in stays."""

    def count(side: int) -> int:
        return 4 if side >= _FINE_FROM else min(2, side)

    down, across = count(height), count(width)
    high, wide = height // down, width // across
    return [(y * high, x * wide) for y in range(down) for x in range(across)], (high, wide)


def _nothing_in_place(n: int, rng: np.random.Generator) -> Ints:
    """A permutation that moves everything: a random cycle through all of them."""
    cycle = rng.permutation(n)
    order = np.empty(n, np.int64)
    order[cycle] = np.roll(cycle, -1)
    return order


def _pairs(labels: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """For each image another one predicted as another class; images without one are left out.

    The partner is uniform among all images of other classes.
    """
    order = np.argsort(labels, kind="stable")
    ranked = labels[order]
    first = np.searchsorted(ranked, labels, side="left")
    own = np.searchsorted(ranked, labels, side="right") - first
    rows = np.flatnonzero(own < len(labels))
    # A position among the others, counted as if the own class were not there.
    at = rng.integers(0, (len(labels) - own)[rows])
    at = at + np.where(at >= first[rows], own[rows], 0)
    return rows, order[at]


def _changed(before: Pixels, after: Pixels) -> npt.NDArray[np.bool_]:
    axes = (1, 2, 3)
    one = before.astype(np.float64)
    deviation = np.abs(one - one.mean((1, 2), keepdims=True)).mean(axes)
    moved = np.abs(after - one).mean(axes)
    changed: npt.NDArray[np.bool_] = moved > np.maximum(1.0, _CHANGED * deviation)
    return changed


def _as_pixels(values: Floats) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
