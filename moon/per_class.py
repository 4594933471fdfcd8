"""Thresholds by predicted class.

The predicted class, the arg max over the known classes, is all that is known of an input's
class when it is decided, so thresholds and promises are by it and not by the true class.
Classes predicted for too few calibration images to have a threshold share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moon.errors import BundleError
from moon.fields import Fields
from moon.threshold import STORED_SCORES, Bad, Threshold

__all__ = ["PerClass"]


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """A threshold for every predicted class.

    Attributes:
        classes: names of the K known classes, in the order of the graph's ``label``.
        fewest: calibration images, predicted as one class, that admit a threshold.
        own: classes with a threshold of their own.
        pooled: the other classes, and how many calibration images were predicted as each.
        pool: the threshold that the pooled classes share; None when there are none.
    """

    classes: tuple[str, ...]
    fewest: int
    own: Mapping[str, Threshold]
    pooled: Mapping[str, int]
    pool: Threshold | None

    def of(self, label: int) -> Threshold:
        """The threshold of inputs predicted as class number ``label``."""
        found = self.own.get(self.classes[label], self.pool)
        assert found is not None  # as checked
        return found

    def thresholds(self, labels_N: ArrayLike) -> NDArray[np.float32]:
        """What the score of each input is compared with, [N], by its predicted class."""
        found: NDArray[np.float32] = self.values[np.asarray(labels_N)]
        return found

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """The threshold of each class, [K]."""
        return np.array([self.of(i).value for i in range(len(self.classes))], dtype=np.float32)

    @property
    def groups(self) -> tuple[Threshold, ...]:
        """Every threshold once: those of classes of their own, then the pool's."""
        return (*self.own.values(), *(() if self.pool is None else (self.pool,)))

    def check(self, n: int, nonfinite: int, bad: Bad) -> None:
        """Refuse what contradicts itself, or a gate of ``n`` calibration scores.

        Raises:
            BundleError: made by ``bad`` from its cause.
        """
        named = {*self.own, *self.pooled}
        if named != set(self.classes) or len(self.own) + len(self.pooled) != len(self.classes):
            raise bad("per_class must give each class once, its own threshold or the pool's")
        if (self.pool is None) == bool(self.pooled):
            raise bad("per_class must have a pool where classes are pooled, and only there")
        if min(self.pooled.values(), default=0) < 0:
            raise bad("per_class: n must not be negative")
        if self.pool is not None and sum(self.pooled.values()) != self.pool.n:
            raise bad("per_class: the pooled classes' n are not the pool's")
        for name, group in self.own.items():
            _check(group, f"the class {name}", bad)
        if self.pool is not None:
            _check(self.pool, "the pool", bad)
        if sum(group.n for group in self.groups) != n:
            raise bad("per_class: the classes' n are not the gate's")
        if sum(group.nonfinite for group in self.groups) != nonfinite:
            raise bad("per_class: the classes' nonfinite are not the gate's")
        stored = sum(len(group.scores) for group in self.groups)
        if stored > max(STORED_SCORES, 3 * len(self.groups)):
            raise bad(f"per_class holds {stored:,} scores, more than {STORED_SCORES:,}")

    def to_json(self, *, stored: bool = True) -> dict[str, Any]:
        """The field ``per_class`` of gate.json; ``stored`` False leaves stored scores out."""
        return {
            "fewest": self.fewest,
            "classes": {name: self._entry(name, stored) for name in self.classes},
            "pooled": [name for name in self.classes if name in self.pooled],
            "pool": None if self.pool is None else self.pool.to_json(stored=stored),
        }

    def _entry(self, name: str, stored: bool) -> dict[str, Any]:
        if name in self.own:
            return self.own[name].to_json(stored=stored)
        assert self.pool is not None
        n = self.pooled[name]
        return {"threshold": self.pool.value, "n": n, "k": None, "achieved": None}

    @classmethod
    def from_json(cls, plain: object, bad: Bad) -> PerClass:
        """Read the field ``per_class`` of gate.json.

        Raises:
            BundleError: a field is missing, of the wrong type, or contradicts another.
        """
        fields = Fields(plain, "per_class", bad)
        fewest, pooled = fields.integer("fewest"), fields.texts("pooled")
        entries, shared = fields.mapping("classes"), fields.take("pool")
        fields.done()
        if fewest < 1 or len(set(pooled)) != len(pooled) or not set(pooled) <= set(entries):
            raise bad("per_class: pooled must name some of classes, each once")
        pool = None if shared is None else _threshold(shared, "the pool", bad)
        own, counts = {}, {}
        for name, entry in entries.items():
            if name in pooled:
                counts[name] = _pooled(entry, name, pool, bad)
            else:
                own[name] = _threshold(entry, f"the class {name}", bad)
        return cls(classes=tuple(entries), fewest=fewest, own=own, pooled=counts, pool=pool)


def _check(group: Threshold, what: str, bad: Bad) -> None:
    def worse(cause: str) -> BundleError:
        return bad(f"{what}: {cause}")

    group.check(worse)
    group.check_rank(worse)


def _threshold(plain: object, what: str, bad: Bad) -> Threshold:
    fields = Fields(plain, what, bad)
    found = Threshold.take(fields, bad)
    fields.done()
    return found


def _pooled(plain: object, name: str, pool: Threshold | None, bad: Bad) -> int:
    fields = Fields(plain, f"the class {name}", bad)
    threshold, n = fields.number("threshold"), fields.integer("n")
    k, achieved = fields.take_or("k", None), fields.take_or("achieved", None)
    fields.done()
    if k is not None or achieved is not None:
        raise bad(f"the class {name} is pooled, so it has no k and achieved of its own")
    if pool is not None and threshold != pool.value:
        raise bad(f"the threshold of the pooled class {name} is not the pool's")
    return n
