"""What was observed of each set, kept beside the report so that a killed evaluation goes on.

A file for every part of a set, under ``observed/`` of the report's folder, named by everything
that decides its content: moon's version, the bundle (its contents and its gates), the images,
the scores, the backend, the re-encoding. Anything changed gives another name: a file is either
right or not used.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import moon
from moon.bundle import Bundle
from moon.evaluation.observe import Observed
from moon.files import canonical_json, sha256_bytes, write_bytes

__all__ = ["Store"]

_SCHEMA = 2
_ARRAYS = ("accepted", "predicted", "confidence", "pixels", "grey")


class Store:
    """Results under a folder, or nowhere."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / "observed"

    def key(
        self, bundle: Bundle, images_sha256: str, scores: Sequence[str], **settings: Any
    ) -> str:
        """A name for what a bundle says of a set of images."""
        facts = {
            "schema": _SCHEMA,
            "moon": moon.__version__,
            "bundle": bundle.manifest.sha256,
            "images": images_sha256,
            "scores": list(scores),
            **settings,
        }
        return sha256_bytes(canonical_json(facts))[:32]

    @property
    def kept(self) -> bool:
        """Whether anything is stored at all."""
        return self._folder is not None

    def load(self, key: str, n: int) -> Observed | None:
        """What was stored under ``key`` of ``n`` images, or None; a damaged file counts as none."""
        if self._folder is None:
            return None
        try:
            data = (self._folder / f"{key}.npz").read_bytes()
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return _observed(arrays, n)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, key: str, observed: Observed) -> None:
        if self._folder is None:
            return
        arrays = {name: getattr(observed, name) for name in _ARRAYS}
        for name, values in observed.scores.items():
            arrays[f"score_{name}"] = values
        for name, count in observed.nonfinite.items():
            arrays[f"nonfinite_{name}"] = np.array(count)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(self._folder / f"{key}.npz", buffer.getvalue())


def _observed(arrays: Any, n: int) -> Observed | None:
    scores = {
        name.removeprefix("score_"): arrays[name]
        for name in arrays.files
        if name.startswith("score_")
    }
    plain = {name: arrays[name] for name in _ARRAYS}
    if any(len(values) != n for values in (*scores.values(), *plain.values())):
        return None
    nonfinite = {
        name.removeprefix("nonfinite_"): int(arrays[name])
        for name in arrays.files
        if name.startswith("nonfinite_")
    }
    return Observed(scores=scores, nonfinite=nonfinite, **plain)
