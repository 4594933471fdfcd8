"""The scores of logits alone, as values beside those that have constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import UsageError
from moon.scores import logits
from moon.scores.fitted import Fitted, real, whole
from moon.scores.logits import Floats
from moon.scores.training import Ints, Training

__all__ = ["Ebo", "Gen", "Mls", "Msp", "Unknown", "fit_ebo", "fit_gen", "fit_mls", "fit_msp"]
__all__ += ["fit_unknown"]

NONE = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plain(Fitted):
    """What such a score must know of the model.

    Attributes:
        outputs: L, int64 [].
        unknown: logit of the unknown class, int64 []; -1 is none.
    """

    reads: ClassVar = ("logits",)
    shapes: ClassVar = {"outputs": "", "unknown": ""}
    integers: ClassVar = frozenset({"outputs", "unknown"})

    outputs: Ints
    unknown: Ints

    def __post_init__(self) -> None:
        super().__post_init__()
        if not NONE <= int(self.unknown) < int(self.outputs):
            raise UsageError(f"the unknown logit of the score {self.name} is none of its logits")

    @property
    def unknown_index(self) -> int | None:
        return None if int(self.unknown) == NONE else int(self.unknown)

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        return logits.SCORES[self.name](z_BL, self.unknown_index)


class Msp(_Plain):
    """:func:`moon.scores.msp`."""

    name = "msp"


class Ebo(_Plain):
    """:func:`moon.scores.ebo` at T = 1 over the known logits."""

    name = "ebo"


class Mls(_Plain):
    """:func:`moon.scores.mls`."""

    name = "mls"


class Unknown(_Plain):
    """:func:`moon.scores.unknown`."""

    name = "unknown"


@dataclass(frozen=True, kw_only=True, eq=False)
class Gen(_Plain):
    """:func:`moon.scores.gen`.

    Attributes:
        gamma: float64 [].
        top: M, int64 [].
    """

    name = "gen"
    shapes: ClassVar = {"outputs": "", "unknown": "", "gamma": "", "top": ""}
    integers: ClassVar = frozenset({"outputs", "unknown", "top"})

    gamma: Floats
    top: Ints

    def __post_init__(self) -> None:
        super().__post_init__()
        logits.check_gamma(float(self.gamma))
        logits.top_count(int(self.top), int(self.outputs) - (self.unknown_index is not None))

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        return logits.gen(z_BL, self.unknown_index, gamma=float(self.gamma), top=int(self.top))


def fit_msp(training: Training) -> Msp:
    return Msp(**_model(training))


def fit_ebo(training: Training) -> Ebo:
    return Ebo(**_model(training))


def fit_mls(training: Training) -> Mls:
    return Mls(**_model(training))


def fit_unknown(training: Training) -> Unknown:
    """
    Raises:
        UsageError: the model has no unknown class.
    """
    if training.unknown_index is None:
        raise logits.no_unknown()
    return Unknown(**_model(training))


def fit_gen(training: Training, *, gamma: float = 0.1, top: int | None = None) -> Gen:
    """
    Args:
        gamma, top: as of :func:`moon.scores.gen`.
    """
    logits.check_gamma(gamma)
    count = logits.top_count(top, len(training.known))
    return Gen(**_model(training), gamma=real(gamma), top=whole(count))


def _model(training: Training) -> dict[str, Ints]:
    outputs, unknown = training.outputs, training.unknown_index
    return {
        "outputs": whole(outputs),
        "unknown": whole(NONE if unknown is None else int(np.arange(outputs)[unknown])),
    }
