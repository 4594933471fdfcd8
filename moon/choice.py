"""What a choice among a bundle's scores rested on, as gate.json records it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moon.errors import BundleError
from moon.fields import Fields

__all__ = ["GROUPS", "Candidate", "Choice", "OodSet"]

GROUPS = ("near", "far", "given")
Bad = Callable[[str], BundleError]


@dataclass(frozen=True, kw_only=True)
class OodSet:
    """Out-of-distribution images that scores were compared on.

    Attributes:
        name: a kind of :mod:`moon.data.synthetic`, or the SOURCE as it was given.
        group: near or far for made ones, given for real ones.
        n: images used.
        data_sha256: of the whole source, as :func:`moon.data.load.data_sha256`; "" when made.
        counted: False for a near kind that no score tells from known images.
    """

    name: str
    group: str
    n: int
    data_sha256: str = ""
    counted: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "group": self.group,
            "n": self.n,
            "data_sha256": self.data_sha256,
            "counted": self.counted,
        }

    @classmethod
    def from_json(cls, plain: object, bad: Bad) -> OodSet:
        fields = Fields(plain, "choice.ood", bad)
        counted = fields.take("counted")
        found = cls(
            name=fields.text("name"),
            group=fields.text("group"),
            n=fields.integer("n"),
            data_sha256=fields.text("data_sha256"),
            counted=counted is True,
        )
        fields.done()
        if not isinstance(counted, bool) or found.group not in GROUPS or found.n < 1:
            raise bad(f"choice.ood: {found.name} is not described as a set of images")
        return found


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A score that was compared.

    Attributes:
        score: its name.
        auroc: what it was ranked by: see :class:`Choice`.
        sets: its AUROC on each set, by name; also of those not counted.
        behind: by how much its ``auroc`` is below the best one's.
        behind_ci95: 95% interval of that, the two scores seen on the same images.
        tied: the interval reaches 0, so it may be as good as the best.
    """

    score: str
    auroc: float
    sets: Mapping[str, float]
    behind: float
    behind_ci95: tuple[float, float]
    tied: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "auroc": self.auroc,
            "sets": dict(self.sets),
            "behind": self.behind,
            "behind_ci95": list(self.behind_ci95),
            "tied": self.tied,
        }

    @classmethod
    def from_json(cls, plain: object, bad: Bad) -> Candidate:
        fields = Fields(plain, "choice.candidates", bad)
        score, auroc = fields.text("score"), fields.number("auroc")
        held = fields.mapping("sets")
        sets = Fields(held, "choice.candidates.sets", bad)
        figures = {name: sets.number(name) for name in held}
        behind, interval = fields.number("behind"), fields.numbers("behind_ci95")
        tied = fields.take("tied")
        fields.done()
        if len(interval) != 2 or not isinstance(tied, bool):
            raise bad(f"choice.candidates: the figures of {score} are incomplete")
        return cls(
            score=score,
            auroc=auroc,
            sets=figures,
            behind=behind,
            behind_ci95=(interval[0], interval[1]),
            tied=tied,
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A score chosen among those a bundle's graph carries, and on what grounds.

    Scores are ranked by AUROC between the choosing images and each set of out-of-distribution
    images: the mean over given sets, or with made ones the mean of near and far, each the
    unweighted mean over its kinds.

    Attributes:
        score: the one chosen.
        reason: why, in a sentence or a few.
        n: in-distribution images it was chosen by.
        data_sha256: of those, as :func:`moon.data.load.data_sha256`.
        source_sha256: of all the in-distribution images given, of which they are a part.
        backend: what computed the scores.
        ood: the sets compared on.
        candidates: the scores compared, best first.
        excluded: scores that could not be compared, and why.
    """

    score: str
    reason: str
    n: int
    data_sha256: str
    source_sha256: str
    backend: str
    ood: tuple[OodSet, ...]
    candidates: tuple[Candidate, ...]
    excluded: Mapping[str, str] = field(default_factory=dict)

    @property
    def used_sha256(self) -> tuple[str, ...]:
        """Hashes of the sources that had a part in it: none of them is a fair test of it."""
        given = [self.data_sha256, self.source_sha256, *(one.data_sha256 for one in self.ood)]
        return tuple(dict.fromkeys(sha for sha in given if sha))

    def to_json(self) -> dict[str, Any]:
        """The field ``choice`` of a gate in gate.json."""
        return {
            "score": self.score,
            "reason": self.reason,
            "n": self.n,
            "data_sha256": self.data_sha256,
            "source_sha256": self.source_sha256,
            "backend": self.backend,
            "ood": [one.to_json() for one in self.ood],
            "candidates": [one.to_json() for one in self.candidates],
            "excluded": dict(self.excluded),
        }

    @classmethod
    def from_json(cls, plain: object, bad: Bad) -> Choice:
        """Read the field.

        Raises:
            BundleError: made by ``bad`` from its cause.
        """
        fields = Fields(plain, "choice", bad)
        held = fields.mapping("excluded")
        excluded = Fields(held, "choice.excluded", bad)
        found = cls(
            score=fields.text("score"),
            reason=fields.text("reason"),
            n=fields.integer("n"),
            data_sha256=fields.text("data_sha256"),
            source_sha256=fields.text("source_sha256"),
            backend=fields.text("backend"),
            ood=tuple(OodSet.from_json(one, bad) for one in _items(fields, "ood", bad)),
            candidates=tuple(
                Candidate.from_json(one, bad) for one in _items(fields, "candidates", bad)
            ),
            excluded={name: excluded.text(name) for name in held},
        )
        fields.done()
        if found.score not in [one.score for one in found.candidates]:
            raise bad(f"choice: the score {found.score} is none of its candidates")
        return found


def _items(fields: Fields, name: str, bad: Bad) -> list[Any]:
    value = fields.take(name)
    if not isinstance(value, list):
        raise bad(f"{name} in choice must be a list")
    return value
