"""The sets of an evaluation: which images, in what group, and a hash that knows them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moon.data.fingerprint import Fingerprints, fingerprints
from moon.data.source import Source, open_source
from moon.errors import DataError, UsageError
from moon.evaluation.metrics import Ints
from moon.evaluation.observe import sample

__all__ = ["EvalSet", "described", "open_sets"]

KNOWN = "ID"


@dataclass(frozen=True)
class EvalSet:
    """A set of images and the part of it that is used.

    Attributes:
        group: id, near or far.
        name: what to call it; ID for the known images.
        source: where the images come from.
        indices: which of them, [N].
    """

    group: str
    name: str
    source: Source
    indices: Ints

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def key(self) -> tuple[str, str]:
        """Group and name: what tells it from every other set."""
        return self.group, self.name

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """Of each image as it is stored, [N]; read once, not decoded."""
        return fingerprints(self.source, self.indices)

    @cached_property
    def sha256(self) -> str:
        """Of the images as they are stored, in order."""
        return hashlib.sha256(self.fingerprints.tobytes()).hexdigest()


def open_sets(
    known: Source | str | Any,
    near: Mapping[str, Any],
    far: Mapping[str, Any],
    limit: int | None,
) -> tuple[EvalSet, ...]:
    """The known set first, then the near and the far ones, each at most ``limit`` images.

    Raises:
        UsageError: a name is both a near and a far set.
        DataError: a set is unreadable or empty; names it.
    """
    both = sorted(set(near) & set(far))
    if both:
        raise UsageError(
            f"{both[0]} is both a near and a far set", remedy="Give each set its own name"
        )
    if KNOWN in near or KNOWN in far:
        raise UsageError(
            f"{KNOWN} stands for the known images", remedy="Give the unknown set another name"
        )
    groups: Iterable[tuple[str, Mapping[str, Any]]]
    groups = (("id", {KNOWN: known}), ("near", near), ("far", far))
    return tuple(
        _opened(group, name, given, limit)
        for group, members in groups
        for name, given in members.items()
    )


def described(sets: Iterable[EvalSet]) -> dict[str, Any]:
    """Source and number of images of every set, by group and name."""
    plain: dict[str, Any] = {"id": {}, "near": {}, "far": {}}
    for one in sets:
        facts = {"source": one.source.spec, "n": len(one), "of": len(one.source)}
        plain[one.group][one.name] = facts
    return plain


def _opened(group: str, name: str, given: Any, limit: int | None) -> EvalSet:
    what = "the in-distribution set" if group == "id" else f"the {group} set {name}"
    try:
        source = given if isinstance(given, Source) else open_source(given)
    except DataError as error:
        raise DataError(f"{what}: {error.cause}", remedy=error.remedy) from error
    if len(source) == 0:
        raise DataError(
            f"{what} holds no images: {source.spec}",
            remedy="Check its path, split and filters, or leave the set out",
        )
    return EvalSet(group, name, source, sample(source, limit))
