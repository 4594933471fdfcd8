"""Choosing the score to gate by, among those a graph carries.

The scores are ranked by how well they separate in-distribution images from out-of-distribution
ones: those given, else ones made from the in-distribution images (:mod:`moon.data.synthetic`).
Made images stand for the unknown, they are not it: real ones, like those to be expected, choose
better.

The choice prefers what is simple. Among scores whose distance to the best is within chance (95%,
paired) it takes the bundle's present score, else one of logits before one of features, and one
without constants before one with them.

Images that choose must not also calibrate: of fifteen thresholds, the one belonging to the score
that looked best on those very images promises more than it keeps. :func:`parts` splits a set, at
random and by no label, so that the calibrating part and what the gate will meet are as
exchangeable as before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.choice import Candidate, Choice
from moon.errors import CalibrationError
from moon.progress import Progress, silent
from moon.runtime.backend import DEFAULT, Backend, open_backend
from moon.runtime.ood_sets import (
    MOST,
    SEED,
    ScoredSet,
    Sources,
    given_set,
    made_sets,
    open_ood,
    refuse_shared,
    sample,
    weighted,
    without_hidden,
)
from moon.runtime.rank import Standing, auroc, compare_scores
from moon.runtime.scoring import Scored, score_images
from moon.runtime.trained import Warn, fitted_scores, refuse_trained, warn_user
from moon.scores import SCORE_TABLE

if TYPE_CHECKING:
    from moon.data.items import Source

__all__ = ["FEWEST", "MOST", "choose_score", "parts", "smallest"]

FEWEST = 30
_SHARE = 5  # one in five
# The best below it: known and unknown images seem to have changed places.
_TURNED_ROUND = 0.4

Ints = NDArray[np.int64]


def choose_score(
    bundle: Bundle | str | os.PathLike[str],
    source: str | Source,
    *,
    ood: Sources = (),
    backend: str = DEFAULT,
    threads: int = 0,
    progress: Progress = silent,
    warn: Warn = warn_user,
) -> Choice:
    """Rank the scores that a bundle carries, and choose one; nothing is written.

    Calibrate by other images than those of ``source``: ``calibrate(score="auto")`` does both,
    and keeps them apart.

    Args:
        bundle: the bundle, or its folder.
        source: held-out in-distribution images; of more than 2,000 a fixed random 2,000.
        ood: sources of out-of-distribution images, at most 2,000 of each; default made ones.
        backend: computes the scores.
        threads: for the backend; 0 for as many as there are cores.
        progress: told how many images are done.
        warn: called with a warning where single images were trained on.

    Raises:
        CalibrationError: fewer than 30 images, images that were trained on or are in both, no score
            that is finite on all, or every score ranks the out-of-distribution images above the
            others.
        DataError, ImageError: a source cannot be read or is empty.
    """
    from moon.data.source import open_source

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    images = open_source(source) if isinstance(source, str) else source
    if len(images) < FEWEST:
        raise CalibrationError(
            f"{len(images)} images are too few to choose a score by",
            remedy=f"Use at least {FEWEST} held-out images",
        )
    rows = sample(len(images))
    runner = open_backend(opened, backend, threads=threads, warn=warn)
    return ranked(opened, runner, images, rows, rows, open_ood(ood), progress, warn)[0]


def parts(rows: Ints) -> tuple[Ints, Ints]:
    """Rows of a source, split at random into those to choose by and those to calibrate by.

    A fifth chooses, at least 30 and at most 2,000; both are ascending. The draw depends on
    nothing but how many there are.
    """
    order = np.random.default_rng([SEED, 2]).permutation(len(rows))
    count = _choosing(len(rows))
    return np.sort(rows[order[:count]]), np.sort(rows[order[count:]])


def smallest(calibrating: int) -> int:
    """How many images it takes for so many to be left for calibrating."""
    n = calibrating + FEWEST
    while n - _choosing(n) < calibrating:
        n += 1
    return n


def _choosing(n: int) -> int:
    return min(n, MOST, max(FEWEST, round(n / _SHARE)))


def ranked(
    bundle: Bundle,
    runner: Backend,
    images: Source,
    everything: Ints,
    choosing: Ints,
    ood: Sequence[Source],
    progress: Progress,
    warn: Warn,
) -> tuple[Choice, dict[str, NDArray[np.uint64]]]:
    """The choice by the rows ``choosing`` of a source, and fingerprints of each given set.

    Args:
        everything: all rows that were given, for the record.

    Raises:
        CalibrationError: see :func:`choose_score`.
    """
    from moon.data.load import data_sha256

    names = bundle.manifest.scores
    known = score_images(bundle, runner, images, choosing, names, progress, "choosing a score")
    refuse_trained(bundle, images.spec, known.fingerprints, warn, "choosing")
    if ood:
        sets = [given_set(bundle, runner, source, names, progress) for source in ood]
    else:
        sets = made_sets(bundle, runner, images, choosing, known, names)
    seen = {one.told.name: one.scored.fingerprints for one in sets if ood}
    refuse_shared(images.spec, known.fingerprints, seen)
    # A score would look better than it is on images it was fitted to.
    excluded = {**_not_finite(names, known, sets), **fitted_scores(bundle, known.fingerprints)}
    left = [name for name in names if name not in excluded]
    if not left:
        raise CalibrationError(
            "no score that the bundle carries is finite on all images",
            remedy="Find out why the model gives NaN or infinite scores, or name a score",
        )
    sets = without_hidden(left, known, sets)
    standings = compare_scores(left, known.scores, weighted(sets))
    best = standings[0]
    _refuse_turned_round(best, bool(ood))
    chosen = _simplest(standings, bundle.gate_score)
    choice = Choice(
        score=chosen.name,
        reason=_reason(chosen, standings, sets, excluded, bundle.gate_score),
        n=len(choosing),
        data_sha256=data_sha256(images, choosing),
        source_sha256=data_sha256(images, everything),
        backend=runner.name,
        ood=tuple(one.told for one in sets),
        candidates=tuple(_candidate(one, known, sets) for one in standings),
        excluded=excluded,
    )
    return choice, seen


def _not_finite(names: Sequence[str], known: Scored, sets: Sequence[ScoredSet]) -> dict[str, str]:
    found = {}
    for name in names:
        parts = [("in-distribution", known), *((one.told.name, one.scored) for one in sets)]
        for where, scored in parts:
            bad = int(np.sum(~np.isfinite(scored.scores[name])))
            if bad:
                found[name] = f"{bad:,} of {len(scored.labels):,} scores on {where} images are "
                found[name] += "NaN or infinite"
                break
    return found


def _refuse_turned_round(best: Standing, given: bool) -> None:
    if best.auroc >= _TURNED_ROUND:
        return
    cause = (
        f"every score is higher on the out-of-distribution images: the best AUROC, of {best.name}, "
        f"is {best.auroc:.3f}, where chance gives 0.5"
    )
    if given:
        raise CalibrationError(cause, remedy="Have --data and --ood changed places?")
    raise CalibrationError(
        cause + ", though they were made from the others",
        remedy="Check that --data holds in-distribution images; give real ones with --ood",
    )


def _simplest(standings: Sequence[Standing], present: str) -> Standing:
    tied = [one for one in standings if _tied(one)]
    return min(tied, key=lambda one: (one.name != present, _complexity(one.name), one.behind))


def _tied(one: Standing) -> bool:
    return one.behind_ci95[0] <= 0


def _complexity(name: str) -> tuple[bool, bool]:
    spec = SCORE_TABLE.get(name)
    return (True, True) if spec is None else ("features" in spec.reads, bool(spec.constants))


def _candidate(one: Standing, known: Scored, sets: Sequence[ScoredSet]) -> Candidate:
    return Candidate(
        score=one.name,
        auroc=one.auroc,
        sets={
            each.told.name: auroc(known.scores[one.name], each.scored.scores[one.name])
            for each in sets
        },
        behind=one.behind,
        behind_ci95=one.behind_ci95,
        tied=_tied(one),
    )


def _reason(
    chosen: Standing,
    standings: Sequence[Standing],
    sets: Sequence[ScoredSet],
    excluded: Mapping[str, str],
    present: str,
) -> str:
    from moon.data.synthetic import KINDS

    best = standings[0]
    made = any(one.rows is not None for one in sets)
    where = f"on the out-of-distribution images {'made' if made else 'given'}"
    if len(standings) == 1:
        text = f"{chosen.name} is the only score to choose; its AUROC {where} is {chosen.auroc:.3f}"
    elif chosen is best:
        ties = sum(_tied(one) for one in standings) - 1
        also = f"; {ties} more may be as good" if ties else ""
        text = f"{chosen.name} has the highest AUROC {where}, {chosen.auroc:.3f}{also}"
    else:
        low, high = chosen.behind_ci95
        why = "it is the present score" if chosen.name == present else "it is simpler"
        text = (
            f"{best.name} has the highest AUROC {where}, {best.auroc:.3f}, but {chosen.name} may "
            f"be as good ({chosen.auroc:.3f}, behind by {low:.3f} to {high:.3f} with 95%) and {why}"
        )
    if chosen.ci95[0] <= 0.5:
        text += ". That is not better than chance for certain: no score may be worth a gate here"
    missing = [kind for kind in KINDS if kind not in [one.told.name for one in sets]]
    if missing and made:
        text += f". Not made, as most such images would be as before: {', '.join(missing)}"
    hidden = [one.told.name for one in sets if not one.told.counted]
    if hidden:
        text += f". Not counted, as no score tells them from known images: {', '.join(hidden)}"
    if excluded:
        text += f". Left out: {'; '.join(f'{name}, {why}' for name, why in excluded.items())}"
    return text + "."
