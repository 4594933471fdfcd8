"""Knowing images again: 64 bits of BLAKE2b an image, and a sample of a training set's.

A hash of an image's pixels as a model sees them stays the same in another container or another
lossless file; a lossy one, or another size, changes it. A sketch of the training images travels
with the model, so that any machine can tell when images it is given were trained on.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moon.data.items import Source
from moon.data.load import stored_bytes, stream
from moon.data.preprocess import Preprocess
from moon.errors import DataError, MoonError
from moon.fields import Fields
from moon.files import canonical_json

__all__ = [
    "MOST",
    "SCHEMA_VERSION",
    "Fingerprints",
    "Overlap",
    "Sketched",
    "TrainingSketch",
    "fingerprints",
    "overlap_with",
    "pixel_fingerprint",
    "pixel_fingerprints",
    "sketch",
    "training_overlap",
]

SCHEMA_VERSION = 1
# Images sampled: a file of 11 kB, and a set that holds 1% of any training set is noticed.
MOST = 1024
_BATCH = 64
_BITS = np.dtype("<u8")

Fingerprints = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSketch:
    """A random sample of the fingerprints of a training set, made by :func:`sketch`.

    Attributes:
        images: how many images were trained on, N.
        fingerprints: of the M that were sampled, by their pixels, ascending [M].
    """

    images: int
    fingerprints: Fingerprints

    @property
    def sampled(self) -> int:
        """How many images were sampled, M."""
        return len(self.fingerprints)

    @cached_property
    def finds(self) -> int:
        """So many images from the training set are noticed with a chance of 95% or more.

        The chance that none of d is among M sampled of N is at most (1 - M/N)^d.
        """
        share = self.sampled / self.images
        return 1 if share >= 0.95 else math.ceil(math.log(0.05) / math.log1p(-share))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrainingSketch):
            return NotImplemented
        return self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_json(self) -> dict[str, Any]:
        """schema, images, sampled, and the fingerprints as base64 of little-endian uint64."""
        data = self.fingerprints.astype(_BITS).tobytes()
        return {
            "schema": SCHEMA_VERSION,
            "images": self.images,
            "sampled": self.sampled,
            "fingerprints": base64.b64encode(data).decode("ascii"),
        }

    def to_bytes(self) -> bytes:
        """The content of training.json; the same sketch always gives the same bytes."""
        return canonical_json(self.to_json()) + b"\n"

    @classmethod
    def from_json(
        cls, plain: object, where: str, error: Callable[[str], MoonError] = DataError
    ) -> TrainingSketch:
        """The inverse of ``to_json``, strictly.

        Args:
            where: what to call it in errors.
            error: makes the exception from its cause.

        Raises:
            MoonError: as ``error`` makes it: another schema, or a field that is missing,
                unknown or wrong.
        """
        fields = Fields(plain, where, error)
        schema = fields.take("schema")
        if isinstance(schema, bool) or schema != SCHEMA_VERSION:
            raise error(f"{where} has schema {schema!r}, this moon reads {SCHEMA_VERSION}")
        images, sampled = fields.integer("images"), fields.integer("sampled")
        text = fields.text("fingerprints")
        fields.done()
        if not 1 <= sampled <= min(images, MOST):
            raise error(f"{where} samples {sampled} of {images} images")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as cause:
            raise error(f"the fingerprints in {where} are not base64: {cause}") from cause
        if len(data) != _BITS.itemsize * sampled:
            raise error(f"{where} has not {sampled} fingerprints but {len(data)} bytes of them")
        found = np.frombuffer(data, _BITS).astype(np.uint64)
        return cls(images=images, fingerprints=np.sort(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """How many of some images were trained on, as far as a sketch can tell.

    Attributes:
        rows: which of the images looked at are among those sampled, ascending.
        of: how many were looked at.
        images, sampled: of the training set, and of the sketch: N and M.
        finds: so many images in common are noticed with a chance of 95% or more.
    """

    rows: npt.NDArray[np.int64]
    of: int
    images: int
    sampled: int
    finds: int

    @property
    def matches(self) -> int:
        """Images looked at that were certainly trained on."""
        return len(self.rows)

    @property
    def estimated(self) -> int:
        """Estimated number of them that were: each is in the sample with a chance of M / N."""
        return min(self.of, round(self.matches * self.images / self.sampled))


class Sketched(Protocol):
    """A bundle, or anything else that may hold a sketch of what it was trained on."""

    @property
    def training(self) -> TrainingSketch | None: ...


def sketch(
    source: Source,
    preprocess: Preprocess,
    indices: npt.ArrayLike | None = None,
    *,
    seed: int = 0,
) -> TrainingSketch:
    """The sketch of a training set: at most 1,024 of its images, decoded, drawn at random.

    Args:
        source: the training images.
        preprocess: of the model that was trained on them.
        indices: which of them; default all.
        seed: of the sample.

    Raises:
        DataError: there are no images.
        ImageError: one cannot be read, naming it.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    if not len(chosen):
        raise DataError(f"{source.spec} holds no training images")
    if len(chosen) > MOST:
        drawn = np.random.default_rng(seed).choice(len(chosen), MOST, replace=False)
        rows = chosen[np.sort(drawn)]
    else:
        rows = chosen
    found = np.sort(pixel_fingerprints(source, rows, preprocess))
    return TrainingSketch(images=len(chosen), fingerprints=found)


def training_overlap(
    given: Sketched | TrainingSketch | None,
    source: Source,
    indices: npt.ArrayLike | None,
    preprocess: Preprocess,
) -> Overlap | None:
    """Which of some images a model was trained on, by its sketch. Decodes each once.

    Args:
        given: a bundle, or its sketch.
        source: the images, and ``indices`` which of them; None for all.
        preprocess: the bundle's.

    Returns:
        What was found, perhaps no match; None where there is no sketch.

    Raises:
        ImageError: an image cannot be read, naming it.
    """
    known = given if isinstance(given, TrainingSketch) or given is None else given.training
    if known is None:
        return None
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    return overlap_with(known, pixel_fingerprints(source, chosen, preprocess))


def overlap_with(known: TrainingSketch, pixels: Fingerprints) -> Overlap:
    """As :func:`training_overlap`, of fingerprints [N] that are there already."""
    return Overlap(
        rows=np.flatnonzero(np.isin(pixels, known.fingerprints)),
        of=len(pixels),
        images=known.images,
        sampled=known.sampled,
        finds=known.finds,
    )


def fingerprints(source: Source, indices: npt.NDArray[np.int64]) -> Fingerprints:
    """Of each item's stored bytes, or of its pixels where it has no bytes, [N]; not decoded.

    Raises:
        ImageError: an item cannot be read.
    """
    found = np.empty(len(indices), np.uint64)
    for row, i in enumerate(indices.tolist()):
        found[row] = _hash(stored_bytes(source.item(i)))
    return found


def pixel_fingerprints(
    source: Source, indices: npt.NDArray[np.int64], preprocess: Preprocess
) -> Fingerprints:
    """Of each image's pixels as the model sees them, [N].

    Raises:
        ImageError: an item cannot be read, naming it.
    """
    found = np.empty(len(indices), np.uint64)
    done = 0
    for batch, pixels_BHWC in stream(source, preprocess, _BATCH, indices=indices):
        here = slice(done, done + len(batch))
        found[here] = [pixel_fingerprint(pixels_HWC) for pixels_HWC in pixels_BHWC]
        done += len(batch)
    return found


def pixel_fingerprint(pixels_HWC: npt.NDArray[np.uint8]) -> int:
    """Of one image, uint8 [H, W, C] as ``Preprocess.pixels`` makes it."""
    return _hash(pixels_HWC.tobytes())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
