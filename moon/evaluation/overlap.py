"""Images that are in two sets at once, which makes the figures of both mean less.

Three checks: of each pair of the evaluated sets by the pixels the model sees, whatever the
files; of each against the images the bundle was trained and validated on, where the bundle
records a SOURCE that can be opened here, by the bytes as stored; and, anywhere, against the
sample of training images whose fingerprints the bundle carries, by pixels again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.data.fingerprint import fingerprints, overlap_with
from moon.data.load import data_sha256
from moon.data.source import Source, open_source
from moon.errors import MoonError
from moon.evaluation.observe import Observed
from moon.evaluation.sets import EvalSet
from moon.gate import Gate

__all__ = ["chosen_on", "overlaps", "sampled_overlaps", "training_overlaps", "training_sample"]

LARGEST_TRAINING = 200_000
_NAMED = 3
_TRAINING = "the training data"


def overlaps(
    sets: Sequence[EvalSet], seen: Mapping[tuple[str, str], Observed]
) -> list[dict[str, Any]]:
    """Unknown sets that hold images of the known set, or of another, pixel for pixel.

    Two unknown sets that share images are one entry, of the later with the earlier.

    Args:
        seen: what was observed of each set, by its key.
    """
    known, *others = sets
    found = []
    for one in others:
        shared = np.isin(seen[one.key].pixels, seen[known.key].pixels)
        if shared.any():
            found.append(_overlap(one, shared, "the known images"))
    for one, other in itertools.combinations(others, 2):
        shared = np.isin(seen[other.key].pixels, seen[one.key].pixels)
        if shared.any():
            where = f"those of the {one.group} set {one.name}"
            found.append({**_overlap(other, shared, where), "of_group": one.group})
    return found


def training_overlaps(
    bundle: Bundle, sets: Sequence[EvalSet]
) -> tuple[list[dict[str, Any]], str | None]:
    """Sets that hold images the model was trained, validated or calibrated on.

    Returns:
        The overlaps; and why the training images were not looked at, or None.
    """
    found = []
    gate, known = bundle.gate(), sets[0]
    # Hashing all again is only worth it where the numbers agree.
    if (
        gate is not None
        and gate.n == len(known)
        and gate.data_sha256 == data_sha256(known.source, known.indices)
    ):
        found.append(_overlap(known, np.ones(len(known), bool), "the calibration images"))
    recorded, why = _recorded(bundle)
    for source in recorded:
        given = fingerprints(source, np.arange(len(source)))
        for one in sets:
            shared = np.isin(one.fingerprints, given)
            if shared.any():
                found.append(_overlap(one, shared, f"{_TRAINING} {source.spec}"))
    return found, why


def sampled_overlaps(
    bundle: Bundle,
    sets: Sequence[EvalSet],
    seen: Mapping[tuple[str, str], Observed],
    exact: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Sets that hold images of the training sample that the bundle carries, if it does.

    Args:
        exact: what ``training_overlaps`` found; a set of which it found as many is left out.
    """
    if bundle.training is None:
        return []
    found = []
    for one in sets:
        shared = overlap_with(bundle.training, seen[one.key].pixels)
        told = [e["n"] for e in exact if e["set"] == one.name and e["with"].startswith(_TRAINING)]
        if shared.matches > sum(told):
            rows = np.isin(np.arange(len(one)), shared.rows)
            found.append(_overlap(one, rows, "the training images", shared.estimated))
    return found


def chosen_on(gate: Gate | None, sets: Sequence[EvalSet]) -> list[tuple[str, str]]:
    """Group and name of each set that had a part in choosing the gate's score, if one was chosen.

    Known by the hash of the whole source, and of the part of it that is used here.
    """
    if gate is None or gate.choice is None:
        return []
    used = set(gate.choice.used_sha256)
    return [
        one.key
        for one in sets
        if data_sha256(one.source) in used or data_sha256(one.source, one.indices) in used
    ]


def training_sample(bundle: Bundle) -> dict[str, int] | None:
    """What the sample the bundle carries can tell: images, sampled, and how many it notices."""
    known = bundle.training
    if known is None:
        return None
    return {"images": known.images, "sampled": known.sampled, "finds": known.finds}


def _recorded(bundle: Bundle) -> tuple[list[Source], str | None]:
    recipe = bundle.manifest.provenance.get("recipe")
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(data.get("train"), str):
        return [], "the bundle does not record what it was trained on"
    specs = [data["train"], *([data["val"]] if isinstance(data.get("val"), str) else [])]
    sources: list[Source] = []
    for spec in specs:
        if spec.startswith("torchvision:"):
            return sources, f"{spec} might have to be downloaded"
        try:
            source = open_source(spec)
        except (MoonError, OSError):
            return sources, f"{spec}, recorded in the bundle, cannot be opened here"
        if len(source) > LARGEST_TRAINING:
            return sources, f"{spec} has more than {LARGEST_TRAINING:,} images"
        sources.append(source)
    return sources, None


def _overlap(
    one: EvalSet, shared: NDArray[np.bool_], where: str, estimated: int | None = None
) -> dict[str, Any]:
    rows = np.flatnonzero(shared)
    names = [os.fspath(one.source.name(int(one.indices[row]))) for row in rows[:_NAMED]]
    return {
        "set": one.name,
        "group": one.group,
        "with": where,
        "n": len(rows),
        "of": len(one),
        "estimated": estimated,
        "examples": names,
    }
