"""Parts of an engine's record: its profile, its tensors, and what 2:4 came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moon.errors import BundleError
from moon.fields import Fields

__all__ = ["Profile", "Sparsity", "Tensor", "bad_record", "maybe_texts"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Numbers of images an engine takes together, and the one that it is fastest for."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return f"{self.min},{self.opt},{self.max}"

    def to_json(self) -> dict[str, int]:
        return {"min": self.min, "opt": self.opt, "max": self.max}

    @classmethod
    def from_json(cls, plain: object) -> Profile:
        fields = Fields(plain, "profile", bad_record)
        profile = cls(**{name: fields.integer(name) for name in ("min", "opt", "max")})
        fields.done()
        if not 1 <= profile.min <= profile.opt <= profile.max:
            raise bad_record(f"a profile must rise from at least 1, not {profile}")
        return profile


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output.

    Attributes:
        dtype: as numpy spells it, such as ``float32``.
        shape: -1 for the batch.
    """

    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, plain: object) -> Tensor:
        fields = Fields(plain, "a tensor", bad_record)
        tensor = cls(dtype=fields.text("dtype"), shape=fields.integers("shape"))
        fields.done()
        return tensor


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What 2:4 came to.

    Attributes:
        pattern: of the model's weights, as its manifest has it.
        asked: whether the builder was told that weights are sparse.
        eligible: layers that could run on sparse tensor cores; None where nobody counted.
        picked: layers for which the builder chose such a kernel; None where it did not say.
        why: the reason for what is None, or "".
    """

    pattern: str
    asked: bool
    eligible: tuple[str, ...] | None
    picked: tuple[str, ...] | None
    why: str

    def to_json(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "asked": self.asked,
            "eligible": None if self.eligible is None else list(self.eligible),
            "picked": None if self.picked is None else list(self.picked),
            "why": self.why,
        }

    @classmethod
    def from_json(cls, plain: object) -> Sparsity:
        fields = Fields(plain, "sparsity", bad_record)
        asked = fields.take("asked")
        if not isinstance(asked, bool):
            raise bad_record("sparsity.asked must be true or false")
        found = cls(
            pattern=fields.text("pattern"),
            asked=asked,
            eligible=maybe_texts(fields, "eligible"),
            picked=maybe_texts(fields, "picked"),
            why=fields.text("why"),
        )
        fields.done()
        return found


def bad_record(cause: str) -> BundleError:
    """The error for a record that cannot be read."""
    return BundleError(cause, remedy="Build the engine again: moon export BUNDLE --trt")


def maybe_texts(fields: Fields, name: str) -> tuple[str, ...] | None:
    """A list of texts, or null."""
    value = fields.take(name)
    if value is None:
        return None
    if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise bad_record(f"{name} must be a list of names or null")
    return tuple(value)
