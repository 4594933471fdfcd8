"""What the figures mean, in words: findings, each good, fair or bad, and warnings.

A finding answers one question a reader comes with: does the promise hold on this data, how well
are near and far inputs told apart, what do corrupted images do. A warning says why a figure may
not mean what it seems to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moon.bundle import Bundle
from moon.data.source import Source
from moon.data.spec import parse
from moon.errors import MoonError
from moon.evaluation.measure import GROUPS
from moon.evaluation.observe import Observed
from moon.evaluation.sets import EvalSet
from moon.evaluation.words import percent

__all__ = ["findings", "overlap_warnings", "set_warnings", "turned_round"]

Figures = Mapping[str, Any]
# Lowest AUROC, its word, and how good that is.
_QUALITY = (
    (0.99, "excellent", "good"),
    (0.95, "very good", "good"),
    (0.90, "good", "good"),
    (0.80, "fair", "fair"),
    (0.65, "weak", "bad"),
    (0.50, "poor", "bad"),
    (0.00, "the wrong way round", "bad"),
)
_SWAPPED = 0.3
_MUCH_BETTER = 0.02


def findings(
    gate: Figures | None, scores: Figures, corruptions: Figures | None, jpeg: int | None = None
) -> list[dict[str, str]]:
    """``about``, ``state`` (good, fair, bad, none) and ``text`` of each.

    Args:
        jpeg: quality that every image was re-encoded at, or None.
    """
    found = [_promise(gate) if gate is None or jpeg is None else _unpromised(gate, jpeg)]
    main = gate["score"] if gate else next(iter(scores))
    for group in GROUPS:
        if scores[main][group]:
            found.append(_told_apart(group, main, gate, scores))
    if corruptions is not None and gate is not None:
        found += _corrupted(corruptions)
    return [{"about": about, "state": state, "text": text} for about, state, text in found]


def _promise(gate: Figures | None) -> tuple[str, str, str]:
    if gate is None:
        return "promise", "none", "Nothing is promised: the bundle is not calibrated."
    if gate["method"] == "risk":
        if gate["id"]["accuracy"] is None:
            return "promise", "none", "Without labels the promised error cannot be checked."
        measured, limit = 1 - gate["id"]["accuracy"], gate["risk"]
        low = 1 - gate["id"]["accuracy_ci95"][1]
        what, chance = "errors among the accepted known images", low <= limit
    else:
        measured, limit = 1 - gate["id"]["accept"], gate["alpha"]
        low = 1 - gate["id"]["accept_ci95"][1]
        what, chance = "of known images rejected", not rejects_more(gate)
    asked = f"at most {_asked(limit)} was promised"
    if measured <= limit:
        return "promise", "good", f"The promise holds here: {percent(measured)} {what}, {asked}."
    if chance:
        return "promise", "fair", (
            f"The promise is not contradicted: {percent(measured)} {what}; {asked}, and the "
            "difference is within what chance allows."
        )  # fmt: skip
    return "promise", "bad", (
        f"The promise does not hold on this data: {percent(measured)} {what}, {asked}."
    )  # fmt: skip


def _unpromised(gate: Figures, jpeg: int) -> tuple[str, str, str]:
    return "promise", "none", (
        f"Of images re-encoded as JPEG {jpeg} nothing was promised; "
        f"{percent(1 - gate['id']['accept'])} of the known ones are rejected here."
    )  # fmt: skip


def rejects_more(gate: Figures) -> bool:
    """Whether the measured reject rate is beyond both intervals: sampling and calibration."""
    lowest_rejected = 1 - gate["id"]["accept_ci95"][1]
    return bool(lowest_rejected > gate["achieved"]["ci95"][1])


def _told_apart(
    group: str, main: str, gate: Figures | None, scores: Figures
) -> tuple[str, str, str]:
    area = scores[main][group]["auroc"]
    word, state = next((word, state) for least, word, state in _QUALITY if area >= least)
    text = f"Telling {group} unknown images from known ones: {word} (AUROC {percent(area)}"
    text += f" by {main}"
    if gate is not None:
        missed = 1 - gate[group]["reject"]
        text += f"; the gate lets {percent(missed)} of them through"
    text += ")."
    best = max(scores, key=lambda name: scores[name][group]["auroc"])
    if scores[best][group]["auroc"] > area + _MUCH_BETTER:
        text += f" The score {best} does better here: {percent(scores[best][group]['auroc'])}."
    return group, state, text


def _corrupted(corruptions: Figures) -> Iterator[tuple[str, str, str]]:
    rows = [(kind, row) for kind, rows in corruptions["kinds"].items() for row in rows]
    judged = [(kind, row) for kind, row in rows if row["wrong_accepted"] is not None]
    if not judged:
        return
    kind, worst = max(judged, key=lambda pair: pair[1]["wrong_accepted"])
    share = worst["wrong_accepted"]
    state = "good" if share <= 0.05 else "fair" if share <= 0.15 else "bad"
    yield "corruptions", state, (
        f"Corrupted known images: at worst ({kind}, strength {worst['strength']}) "
        f"{percent(share)} are accepted with a wrong label; {percent(worst['abstain'])} are "
        f"rejected there, {percent(corruptions['clean']['abstain'])} of the clean ones."
    )  # fmt: skip


def set_warnings(
    bundle: Bundle,
    sets: Sequence[EvalSet],
    seen: Mapping[tuple[str, str], Observed],
    gate: Figures | None,
    labelled: bool,
    jpeg: int | None = None,
) -> Iterator[str]:
    """Of the gate, the labels, scores that are not finite, and classes named alike."""
    known = sets[0]
    if gate is None:
        yield "The bundle is not calibrated: run moon calibrate to give it a threshold."
    elif jpeg is None and rejects_more(gate):
        yield (
            f"It rejects {1 - gate['id']['accept']:.1%} of these known inputs, more than its "
            "calibration makes likely: they may not be like the images it was calibrated on."
        )
    if not labelled:
        yield "The known inputs have no labels, so accuracy and ECE are not known."
    for one in sets:
        count = max(seen[one.key].nonfinite.values(), default=0)
        if count:
            names = ", ".join(seen[one.key].nonfinite)
            yield (
                f"{one.name}: {count} of {len(one)} images have a score that is not finite "
                f"({names}); the gate rejects them, and they rank lowest here."
            )
        if one.group != "id":
            yield from _shared_classes(one, known, bundle)


def overlap_warnings(found: Sequence[Figures]) -> Iterator[str]:
    for one in found:
        names = ", ".join(one["examples"]) + (", ..." if one["n"] > len(one["examples"]) else "")
        what = f"{one['n']:,} of {one['of']:,} images are also among {one['with']} ({names})"
        meaning = (
            "the figures on it are too good to believe"
            if one["group"] == "id"
            else "they are not unknown inputs, and no score can tell them apart"
            if one["with"].startswith("the known")
            else "the model has learnt from them"
        )
        yield f"{one['set']}: {what}; {meaning}."


def turned_round(scores: Figures, gate: Figures | None) -> Iterator[str]:
    """Sets that the gate's score takes for more known than the known images themselves."""
    main = gate["score"] if gate else next(iter(scores))
    role = "the gate's score" if gate else "the first score"
    for group in GROUPS:
        for name, figures in (scores[main][group] or {"sets": {}})["sets"].items():
            if figures["auroc"] >= 0.5:
                continue
            said = (
                f"{name}: {role}, {main}, ranks it above the known images "
                f"(AUROC {figures['auroc']:.1%}), so no threshold on it can help there."
            )
            if figures["auroc"] < _SWAPPED:
                said += " That far below 50%, look whether the known and unknown sets are swapped."
            yield said


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


def _asked(rate: float) -> str:
    return f"{100 * rate:.6g}%"
