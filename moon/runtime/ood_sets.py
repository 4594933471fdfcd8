"""The out-of-distribution images that scores are compared on: given ones, or made ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.choice import OodSet
from moon.errors import CalibrationError, DataError, UsageError
from moon.progress import Progress
from moon.runtime.backend import Backend
from moon.runtime.rank import Compared, auroc
from moon.runtime.scoring import Scored, score_images, score_pixels

if TYPE_CHECKING:
    from moon.data.items import Source

__all__ = ["MOST", "ScoredSet", "Sources", "open_ood"]

MOST = 2_000
# With fewer, how much an AUROC varies cannot be told from the images themselves.
FEWEST_OOD = 10
SEED = 0
# No score reaches it on a near kind: that kind may have left images in-distribution.
_TOLD_APART = 0.6

Ints = NDArray[np.int64]
Sources = Sequence["str | os.PathLike[str] | Source"]


def sample(n: int) -> Ints:
    """A fixed random choice of at most :data:`MOST` of n images, ascending."""
    if n <= MOST:
        return np.arange(n)
    return np.sort(np.random.default_rng([SEED, 1]).permutation(n)[:MOST])


def open_ood(given: Sources) -> list[Source]:
    """Sources of out-of-distribution images.

    Raises:
        DataError: one cannot be read or holds no images, naming it.
        UsageError: one is given twice.
    """
    from moon.data.items import Source
    from moon.data.source import open_source

    opened: list[Source] = []
    for one in given:
        spec = one.spec if isinstance(one, Source) else os.fspath(one)
        try:
            source = one if isinstance(one, Source) else open_source(one)
        except DataError as error:
            cause = f"the out-of-distribution set {spec}: {error.cause}"
            raise DataError(cause, remedy=error.remedy) from error
        if not len(source):
            raise DataError(
                f"the out-of-distribution set {spec} holds no images",
                remedy="Check its path, split and filters, or leave it out",
            )
        if len(source) < FEWEST_OOD:
            raise DataError(
                f"the out-of-distribution set {spec} holds {len(source)} images, too few to "
                "compare scores by",
                remedy=f"Use at least {FEWEST_OOD}, or leave it out",
            )
        if spec in [other.spec for other in opened]:
            raise UsageError(
                f"the out-of-distribution set {spec} is given twice", remedy="Give it once"
            )
        opened.append(source)
    return opened


@dataclass(frozen=True, eq=False)
class ScoredSet:
    """One set of out-of-distribution images, scored.

    Attributes:
        told: what is recorded of it.
        scored: its images.
        rows: which in-distribution image each was made from, None for given ones.
    """

    told: OodSet
    scored: Scored
    rows: Ints | None = None


def refuse_shared(
    spec: str, known: NDArray[np.uint64], seen: Mapping[str, NDArray[np.uint64]]
) -> None:
    """Refuse out-of-distribution sets that hold in-distribution images, pixel for pixel.

    Raises:
        CalibrationError: how many, and of which set.
    """
    for name, prints in seen.items():
        shared = int(np.isin(prints, known).sum())
        if shared:
            raise CalibrationError(
                f"{shared:,} of the {len(prints):,} images looked at of the out-of-distribution "
                f"set {name} are among the in-distribution images of {spec}",
                remedy="Give images that are not in-distribution with --ood, or leave it out",
            )


def given_set(
    bundle: Bundle, runner: Backend, source: Source, names: Sequence[str], progress: Progress
) -> ScoredSet:
    from moon.data.load import data_sha256

    rows = sample(len(source))
    scored = score_images(bundle, runner, source, rows, names, progress, f"scoring {source.spec}")
    told = OodSet(name=source.spec, group="given", n=len(rows), data_sha256=data_sha256(source))
    return ScoredSet(told, scored)


def made_sets(
    bundle: Bundle,
    runner: Backend,
    images: Source,
    choosing: Ints,
    known: Scored,
    names: Sequence[str],
) -> list[ScoredSet]:
    from moon.data.load import load_pixels
    from moon.data.synthetic import FAR, KINDS, make_ood

    pixels = load_pixels(images, bundle.preprocess, choosing)
    sets = []
    for kind in KINDS:
        made = make_ood(kind, pixels, known.labels, seed=SEED)
        # Half of them or more hardly changed: this kind does not suit these images.
        if 2 * len(made.rows) <= len(choosing):
            continue
        group = "far" if kind in FAR else "near"
        told = OodSet(name=kind, group=group, n=len(made.rows))
        sets.append(ScoredSet(told, score_pixels(bundle, runner, made.pixels, names), made.rows))
    return sets


def without_hidden(
    names: Sequence[str], known: Scored, sets: Sequence[ScoredSet]
) -> list[ScoredSet]:
    """The sets, near kinds that no score tells from known images marked as not counted."""
    result = []
    for one in sets:
        counted = one.told.group != "near" or any(
            auroc(known.scores[name], one.scored.scores[name]) >= _TOLD_APART for name in names
        )
        result.append(replace(one, told=replace(one.told, counted=counted)))
    return result


def weighted(sets: Sequence[ScoredSet]) -> list[Compared]:
    """Each group weighs the same, and within it each set that counts."""
    members: dict[str, int] = {}
    for one in sets:
        members[one.told.group] = members.get(one.told.group, 0) + one.told.counted
    groups = sum(count > 0 for count in members.values())
    return [
        Compared(
            one.scored.scores,
            1 / (groups * members[one.told.group]) if one.told.counted else 0.0,
            one.rows,
        )
        for one in sets
    ]
