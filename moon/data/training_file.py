"""training.json: which images a bundle's model, and the scores it carries, have seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moon.data.fingerprint import SCHEMA_VERSION, TrainingSketch
from moon.errors import DataError, MoonError
from moon.fields import Fields
from moon.files import canonical_json

__all__ = ["FittedSketch", "TrainingFile"]

_FITTED = "fitted"


@dataclasses.dataclass(frozen=True)
class FittedSketch:
    """Images that scores were fitted to, though the model was not trained on them.

    Attributes:
        scores: names of the scores.
        sketch: a sample of the images.
    """

    scores: tuple[str, ...]
    sketch: TrainingSketch


@dataclasses.dataclass(frozen=True)
class TrainingFile:
    """The content of training.json.

    Attributes:
        training: a sample of the images the model was trained on, or None when not known.
        fitted: samples of other images, that only scores were fitted to.
    """

    training: TrainingSketch | None = None
    fitted: tuple[FittedSketch, ...] = ()

    def to_bytes(self) -> bytes | None:
        """The file, always the same for the same content; None where there is nothing to say."""
        if self.training is None and not self.fitted:
            return None
        plain: dict[str, Any] = {"schema": SCHEMA_VERSION}
        if self.training is not None:
            plain |= self.training.to_json()
        if self.fitted:
            plain[_FITTED] = [_entry(one) for one in self.fitted]
        return canonical_json(plain) + b"\n"

    @classmethod
    def from_json(
        cls, plain: object, where: str, error: Callable[[str], MoonError] = DataError
    ) -> TrainingFile:
        """What a file holds, read strictly.

        Args:
            where: what to call it in errors.
            error: makes the exception from its cause.

        Raises:
            MoonError: as ``error`` makes it: another schema, or a field that is missing,
                unknown or wrong.
        """
        if not isinstance(plain, dict) or _FITTED not in plain:
            return cls(TrainingSketch.from_json(plain, where, error))
        rest = dict(plain)
        entries = rest.pop(_FITTED)
        if not isinstance(entries, list) or not entries:
            raise error(f"{_FITTED} in {where} must be a list that is not empty")
        # Without the training images there is nothing else but the schema.
        training = None
        if rest != {"schema": SCHEMA_VERSION} or isinstance(rest["schema"], bool):
            training = TrainingSketch.from_json(rest, where, error)
        return cls(training, tuple(_from_entry(one, f"{_FITTED} in {where}", error)
                                   for one in entries))  # fmt: skip


def _entry(one: FittedSketch) -> dict[str, Any]:
    plain = {**one.sketch.to_json(), "scores": list(one.scores)}
    del plain["schema"]
    return plain


def _from_entry(plain: object, where: str, error: Callable[[str], MoonError]) -> FittedSketch:
    fields = Fields(plain, where, error)
    scores = fields.texts("scores")
    if not scores:
        raise error(f"scores in {where} names none")
    names = ("images", "sampled", "fingerprints")
    found = {name: fields.take(name) for name in names}
    fields.done()
    return FittedSketch(
        scores, TrainingSketch.from_json({"schema": SCHEMA_VERSION, **found}, where, error)
    )
