"""Caveats: why a figure of the report may not mean what it seems to, a sentence each.

Of the gate, the labels, scores that are not finite, sets too small or told apart by colour, images
and classes that two sets share, and how far the training images could be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moon.bundle import Bundle
from moon.data.source import Source
from moon.data.spec import parse
from moon.errors import MoonError
from moon.evaluation.by_class import beyond_chance
from moon.evaluation.findings import rejects_more, were
from moon.evaluation.measure import GROUPS
from moon.evaluation.metrics import Ints
from moon.evaluation.observe import Observed
from moon.evaluation.sets import EvalSet
from moon.evaluation.words import percent

__all__ = ["overlap_warnings", "set_warnings", "training_checked", "turned_round"]

Figures = Mapping[str, Any]
_SWAPPED = 0.3
# Images below which a set is too small for its figures to mean much.
_FEW = 20
_MOSTLY = 0.9


def set_warnings(
    bundle: Bundle,
    sets: Sequence[EvalSet],
    seen: Mapping[tuple[str, str], Observed],
    gate: Figures | None,
    labels: Ints | None,
    jpeg: int | None = None,
) -> Iterator[str]:
    """Of the gate, the labels, scores that are not finite, and classes named alike."""
    known = sets[0]
    if gate is None:
        yield "The bundle is not calibrated: run moon calibrate to give it a threshold."
    elif jpeg is None and rejects_more(gate):
        yield (
            f"It rejects {_too_many(gate)}, more than its calibration makes likely: they may not "
            "be like the images it was calibrated on."
        )
    if labels is None:
        yield "The known inputs have no labels, so accuracy and ECE are not known."
    else:
        yield from _absent_classes(bundle, labels)
    for one in sets:
        count = max(seen[one.key].nonfinite.values(), default=0)
        if count:
            names = ", ".join(seen[one.key].nonfinite)
            yield (
                f"{one.name}: {count} of {len(one)} images have a score that is not finite "
                f"({names}); {'the' if gate else 'a'} gate rejects them, and they rank lowest here."
            )
        if len(one) < _FEW:
            yield (
                f"{one.name}: {len(one)} image{'s are' if len(one) > 1 else ' is'} too few for "
                "any figure on this set to mean much."
            )
        if one.group != "id":
            yield from _shared_classes(one, known, bundle)
            yield from _by_colour(one, seen[one.key], seen[known.key])


def overlap_warnings(found: Sequence[Figures]) -> Iterator[str]:
    for one in found:
        names = ", ".join(one["examples"]) + (", ..." if one["n"] > len(one["examples"]) else "")
        what = f"{one['n']:,} of {one['of']:,} images are also among {one['with']} ({names})"
        if one.get("estimated") is not None:
            what = (
                f"at least {one['n']:,} of {one['of']:,} images {were(one['n'])} in training, "
                f"estimated {one['estimated']:,} ({names})"
            )
        meaning = (
            "the figures on it are too good to believe"
            if one["group"] == "id"
            else "they are not unknown inputs, and no score can tell them apart"
            if one["with"].startswith("the known")
            else f"they count twice, in the figures of {_both(one)}"
            if one.get("of_group")
            else "the model has learnt from them"
        )
        yield f"{one['set']}: {what}; {meaning}."


def _both(one: Figures) -> str:
    group, other = one["group"], one["of_group"]
    return f"both sets and the mean of {group}" if group == other else f"{group} and of {other}"


def training_checked(checks: Figures | None) -> str | None:
    """In words, what the images of an evaluation could be compared with; None where unknown."""
    if checks is None:
        return None
    why, sample = checks["training_unchecked"], checks.get("training_sample")
    if why is None:
        return "All sets were compared, file by file, with the images the model was trained on."
    if sample is None:
        return f"Whether any of these images were trained on could not be checked: {why}."
    if sample["sampled"] == sample["images"]:
        return f"All sets were compared with the {sample['images']:,} training images, by pixels."
    return (
        f"All sets were compared with a sample of the training images, {sample['sampled']:,} of "
        f"{sample['images']:,}, by pixels ({why}). {sample['finds']:,} or more in common would be "
        "noticed with a chance of 95%."
    )


def turned_round(scores: Figures, gate: Figures | None) -> Iterator[str]:
    """Sets that the gate's score takes for more known than the known images themselves."""
    main = gate["score"] if gate else next(iter(scores))
    role = "the gate's score" if gate else "the first score"
    for group in GROUPS:
        for name, figures in (scores[main][group] or {"sets": {}})["sets"].items():
            _, high = figures.get("auroc_ci95") or (0.0, figures["auroc"])
            if figures["auroc"] >= 0.5 or high >= 0.5:
                continue
            said = (
                f"{name}: {role}, {main}, ranks it above the known images "
                f"(AUROC {figures['auroc']:.1%}), so no threshold on it can help there."
            )
            if figures["auroc"] < _SWAPPED:
                said += " That far below 50%, look whether the known and unknown sets are swapped."
            yield said


def _too_many(gate: Figures) -> str:
    if not gate.get("by_class"):
        return f"{1 - gate['id']['accept']:.1%} of these known inputs"
    surest, *others = beyond_chance(gate["by_class"], gate["alpha"])
    names = ", ".join(surest["classes"][:3]) + (", ..." if len(surest["classes"]) > 3 else "")
    more = f", and too many of {len(others)} other classes" if others else ""
    return f"{surest['reject']:.1%} of the known inputs predicted as {names}{more}"


def _absent_classes(bundle: Bundle, labels: Ints) -> Iterator[str]:
    counts = np.bincount(labels[labels >= 0], minlength=len(bundle.classes))
    absent = [
        name for name, count in zip(bundle.classes, counts.tolist(), strict=True) if not count
    ]
    if absent:
        listed = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        yield (
            f"None of the known images is of {len(absent)} of the {len(bundle.classes)} classes "
            f"({listed}): accuracy and what the gate rejects are not those of all classes."
        )


def _by_colour(one: EvalSet, seen: Observed, known: Observed) -> Iterator[str]:
    """A set may be told from the known images by colour alone."""
    if not len(seen.grey) or not len(known.grey):
        return
    here, there = float(seen.grey.mean()), float(known.grey.mean())
    if max(here, there) >= _MOSTLY and min(here, there) <= 1 - _MOSTLY:
        yield (
            f"{one.name}: {percent(here)} of its images are grey, of the known ones "
            f"{percent(there)}; a score may tell them apart by colour alone."
        )


def _shared_classes(one: EvalSet, known: EvalSet, bundle: Bundle) -> Iterator[str]:
    source = one.source
    if source.labels is None or source.class_names is None:
        return
    # Classes called 0, 1, 2 say nothing: digits in one set, anything at all in another.
    tell = _base(source) == _base(known.source)
    shared = [
        i
        for i, name in enumerate(source.class_names)
        if name in bundle.classes and (tell or any(c.isalpha() for c in name))
    ]
    hits = np.isin(source.labels[one.indices], shared)
    if hits.any():
        present = np.unique(source.labels[one.indices][hits]).tolist()
        names = [source.class_names[i] for i in present]
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        yield (
            f"{one.name}: {int(hits.sum())} of {len(one)} images are of classes named as known "
            f"ones are ({listed}); if they show the same, they are not unknown inputs."
        )


def _base(source: Source) -> str:
    try:
        return parse(source.spec).base
    except MoonError:
        return source.spec
