"""What the figures mean, in words: findings, each good, fair or bad.

A finding answers one question a reader comes with: does the promise hold on this data, how well
are near and far inputs told apart, what do corrupted images do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moon.evaluation.by_class import beyond_chance, judged_by_class
from moon.evaluation.measure import GROUPS
from moon.evaluation.observe import Observed
from moon.evaluation.words import asked, percent

__all__ = ["findings", "rejects_more", "were"]

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
# The most unknown images that a gate may let through to be called excellent, very good, good, fair,
# weak, poor: however well its score ranks them, it is the gate that decides.
_LETS_THROUGH = (0.05, 0.15, 0.30, 0.50, 0.80, 1.00)
_MUCH_BETTER = 0.02
# An interval of AUROC wider than this makes any word for it a guess.
_VAGUE, _UNTOLD = 0.15, 0.3
_FEW = 20


def findings(
    gate: Figures | None,
    scores: Figures,
    corruptions: Figures | None,
    jpeg: int | None = None,
    checks: Figures | None = None,
    known: Observed | None = None,
) -> list[dict[str, str]]:
    """``about``, ``state`` (good, fair, bad, none) and ``text`` of each.

    Args:
        jpeg: quality that every image was re-encoded at, or None.
        checks: what was found of overlaps; see :mod:`moon.evaluation.overlap`.
        known: what was observed of the known images.
    """
    # First, since it puts all that follows in doubt.
    found = [] if checks is None else [*_trained_on(checks["overlaps"])]
    found += [_promise(gate) if gate is None or jpeg is None else _unpromised(gate, jpeg)]
    main = gate["score"] if gate else next(iter(scores))
    silent = known is not None and known.nonfinite.get(main) == len(known)
    if silent:
        found.append(("scores", "bad", (
            f"The score {main} of every known image is NaN or infinite: the model is broken, or "
            "does not fit these images, and no figure here means anything."
        )))  # fmt: skip
    for group in GROUPS:
        if scores[main][group] and not silent:
            found.append(_told_apart(group, main, gate, scores))
    if corruptions is not None and gate is not None:
        found += _corrupted(corruptions)
    if checks is not None:
        found += _chosen_on(checks["chosen_on"], main)
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
    if gate.get("by_class"):
        return "promise", *judged_by_class(gate["by_class"], limit, measured)
    promised = f"at most {asked(limit)} was promised"
    if gate["id"]["n"] * limit < 1 and (measured <= limit or chance):
        return "promise", "none", (
            f"{gate['id']['n']} known image{'s are' if gate['id']['n'] > 1 else ' is'} too few to "
            f"check what was promised, at most {asked(limit)} {what}."
        )  # fmt: skip
    if measured <= limit:
        return "promise", "good", f"The promise holds here: {percent(measured)} {what}, {promised}."
    if chance:
        return "promise", "fair", (
            f"The promise is not contradicted: {percent(measured)} {what}; {promised}, and the "
            "difference is within what chance allows."
        )  # fmt: skip
    return "promise", "bad", (
        f"The promise does not hold on this data: {percent(measured)} {what}, {promised}."
    )  # fmt: skip


def _unpromised(gate: Figures, jpeg: int) -> tuple[str, str, str]:
    return "promise", "none", (
        f"Of images re-encoded as JPEG {jpeg} nothing was promised; "
        f"{percent(1 - gate['id']['accept'])} of the known ones are rejected here."
    )  # fmt: skip


def rejects_more(gate: Figures) -> bool:
    """Whether more is rejected than sampling and calibration allow; by class, of any class."""
    if gate.get("by_class"):
        return bool(beyond_chance(gate["by_class"], gate["alpha"]))
    lowest_rejected = 1 - gate["id"]["accept_ci95"][1]
    return bool(lowest_rejected > gate["achieved"]["ci95"][1])


def _told_apart(
    group: str, main: str, gate: Figures | None, scores: Figures
) -> tuple[str, str, str]:
    area = scores[main][group]["auroc"]
    low, high = scores[main][group].get("auroc_ci95") or (area, area)
    missed = None if gate is None else 1 - gate[group]["reject"]
    word, state, alone = _quality(area, missed or 0.0)
    if high - low > _UNTOLD:
        word, state = "not known by so few images", "none"
    elif low <= 0.5 <= high and low < high:
        word, state = "no better than guessing", "bad"
    elif high - low > _VAGUE and state == "good":
        state = "fair"
    text = f"Telling {group} unknown images from known ones: {word} (AUROC {percent(area)}"
    text += f" by {main}"
    if high - low > _VAGUE:
        text += f", and anything from {percent(low)} to {percent(high)} for all that is known"
    if missed is not None:
        lower = word in [name for _, name, _ in _QUALITY] and word != alone
        text += f", {alone} by itself, but" if lower else ";"
        text += f" the gate lets {percent(missed)} of them through"
    text += ")."
    best = max(scores, key=lambda name: scores[name][group]["auroc"])
    if scores[best][group]["auroc"] > max(area + _MUCH_BETTER, 0.5):
        text += f" The score {best} does better here: {percent(scores[best][group]['auroc'])}."
    return group, state, text


def _quality(area: float, missed: float) -> tuple[str, str, str]:
    """Word and state of an AUROC, lowered to what the gate lets through; the word unlowered."""
    ranked = next(i for i, (least, *_) in enumerate(_QUALITY) if area >= least)
    gated = next((i for i, most in enumerate(_LETS_THROUGH) if missed <= most), 0)
    _, word, state = _QUALITY[max(ranked, gated)]
    return word, state, _QUALITY[ranked][1]


def _corrupted(corruptions: Figures) -> Iterator[tuple[str, str, str]]:
    rows = [(kind, row) for kind, rows in corruptions["kinds"].items() for row in rows]
    judged = [(kind, row) for kind, row in rows if row["wrong_accepted"] is not None]
    if not judged or corruptions["n"] < _FEW:
        return
    kind, worst = max(judged, key=lambda pair: pair[1]["wrong_accepted"])
    share = worst["wrong_accepted"]
    if share == 0:
        most = max(row["abstain"] for _, row in judged)
        yield (
            "corruptions",
            "good",
            (
                "Corrupted known images: none is accepted with a wrong label; up to "
                f"{percent(most)} are rejected, {percent(corruptions['clean']['abstain'])} of the "
                "clean ones."
            ),
        )
        return
    state = "good" if share <= 0.05 else "fair" if share <= 0.15 else "bad"
    yield "corruptions", state, (
        f"Corrupted known images: at worst ({kind}, strength {worst['strength']}) "
        f"{percent(share)} are accepted with a wrong label; {percent(worst['abstain'])} are "
        f"rejected there, {percent(corruptions['clean']['abstain'])} of the clean ones."
    )  # fmt: skip


def _trained_on(overlaps: Sequence[Figures]) -> Iterator[tuple[str, str, str]]:
    known = [one for one in overlaps if one["group"] == "id" and "training" in one["with"]]
    if not known:
        return
    # The sample, where it is told of, has found more than the images as they are stored.
    most = max(known, key=lambda one: one["n"])
    guessed = most["estimated"] is not None
    text = f"{'At least ' if guessed else ''}{most['n']:,} of the {most['of']:,} known images"
    text += f" {were(most['n'])} in training"
    text += f" (estimated {most['estimated']:,})" if guessed else ""
    yield "training", "bad", f"{text}, so what is measured on them is too good to believe."


def _chosen_on(sets: Sequence[Figures], main: str) -> Iterator[tuple[str, str, str]]:
    if not sets:
        return
    names = ["the known images" if one["group"] == "id" else one["set"] for one in sets]
    one = len(names) == 1
    yield "choice", "fair", (
        f"{len(names)} of these sets {were(len(names))} used to choose the score {main} "
        f"({', '.join(names)}), so figures on {'it' if one else 'them'} flatter the score: judge "
        "it by sets that had no part in that."
    )  # fmt: skip


def were(count: int) -> str:
    return "was" if count == 1 else "were"
