"""Recipe: the complete, frozen description of a training run."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moon.data.preprocess import Preprocess
from moon.errors import RecipeError
from moon.files import canonical_json
from moon.trainer.keys import apply_overrides, parse_toml, read, to_dict

__all__ = [
    "AUGMENTS",
    "DISTRIBUTIONS",
    "MOVING_RULES",
    "RULES",
    "SCHEDULES",
    "STRUCTURES",
    "DataRecipe",
    "MoonRecipe",
    "Recipe",
    "UpdateRecipe",
]

RULES = ("dense", "static", "set", "rigl")
STRUCTURES = ("unstructured",)
DISTRIBUTIONS = ("uniform", "er", "erk")
SCHEDULES = ("cosine", "moon")
AUGMENTS = ("none", "crop", "crop-flip", "resized-crop")
MOVING_RULES = ("set", "rigl")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Where the images come from and how they become the model's input.

    ``val`` is a SOURCE of its own, a share of the training set in (0, 1), or a count of
    its images. ``augment``: ``crop`` pads an eighth of the side with black and crops at
    random, ``crop-flip`` also mirrors, ``resized-crop`` is the ImageNet crop of random
    area and aspect, mirrored.
    """

    train: str
    val: str | float | int = 0.1
    preprocess: Preprocess
    augment: str = "none"

    def __post_init__(self) -> None:
        _require(bool(self.train), "data.train is empty", "Name a SOURCE of labelled images")
        _one_of("data.augment", self.augment, AUGMENTS)
        if isinstance(self.val, str):
            _require(bool(self.val), "data.val is empty", "Name a SOURCE, a share or a count")
        elif isinstance(self.val, int):
            _require(self.val >= 1, f"data.val is {self.val}", "Give a count of at least 1")
        else:
            good = math.isfinite(self.val) and 0 < self.val < 1
            _require(good, f"data.val is {self.val}", "Give a share between 0 and 1, or a count")


@dataclass(frozen=True, kw_only=True)
class UpdateRecipe:
    """When and how much the topology changes: every ``interval`` steps, dropping a share
    that falls by cosine from ``drop_fraction`` to zero at ``stop`` (a share of training)."""

    interval: int = 100
    drop_fraction: float = 0.3
    stop: float = 0.7

    def __post_init__(self) -> None:
        _at_least("update.interval", self.interval, 1)
        good = 0 < self.drop_fraction < 1
        _require(good, f"update.drop_fraction is {self.drop_fraction}", "Give one within (0, 1)")
        _require(0 < self.stop <= 1, f"update.stop is {self.stop}", "Give a share within (0, 1]")


@dataclass(frozen=True, kw_only=True)
class MoonRecipe:
    """The three parts of MOON and their constants (Lei et al., TMLR).

    ``enabled`` gives the classifier its unknown output; ``loss``, ``auto`` and ``vote``
    switch the unknown-aware loss, the tuning of its weight w and the voting of weights
    off one by one. ``warmup_epochs`` left out is 5% of the epochs (at least one) and
    ``vote_epochs`` left out is the last 20% (rounded down): 5 and 20 of the paper's 100.
    """

    enabled: bool = False
    loss: bool = True
    auto: bool = True
    vote: bool = True
    w_final: float = 1.0
    init_factor: float = 64.0
    warmup_epochs: int | None = None
    vote_epochs: int | None = None

    def __post_init__(self) -> None:
        good = math.isfinite(self.w_final) and self.w_final >= 0
        _require(good, f"moon.w_final is {self.w_final}", "Give a number of at least 0")
        good = math.isfinite(self.init_factor) and self.init_factor > 0
        _require(good, f"moon.init_factor is {self.init_factor}", "Give a number above 0")
        for key in ("warmup_epochs", "vote_epochs"):
            if getattr(self, key) is not None:
                _at_least(f"moon.{key}", getattr(self, key), 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete training run; the defaults are the paper's settings.

    ``schedule``: ``cosine`` takes the learning rate from ``lr`` to 1e-6; ``moon`` takes it
    from 1.2 to 0.08 times ``lr`` and then holds it over the voting epochs.
    ``dense`` names layers to leave dense (``stem``, ``head``, or a module's name).

    Raises:
        RecipeError: a value out of its range, or two that contradict each other.
    """

    name: str = "recipe"
    model: str = "resnet18"
    pretrained: str | None = None
    sparsity: float = 0.0
    rule: str = "dense"
    structure: str = "unstructured"
    distribution: str = "erk"
    dense: tuple[str, ...] = ()
    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    seed: int = 0
    data: DataRecipe
    update: UpdateRecipe = field(default_factory=UpdateRecipe)
    moon: MoonRecipe = field(default_factory=MoonRecipe)

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), "name is empty", "Give the recipe a name")
        _require(bool(self.model), "model is empty", "Name a model, such as cnn or resnet18")
        _one_of("rule", self.rule, RULES)
        _one_of("structure", self.structure, STRUCTURES)
        _one_of("distribution", self.distribution, DISTRIBUTIONS)
        _one_of("schedule", self.schedule, SCHEDULES)
        self._check_sparsity()
        self._check_optimizer()
        self._check_phases()

    def _check_sparsity(self) -> None:
        good = 0 <= self.sparsity < 1
        _require(good, f"sparsity is {self.sparsity}", "Give the share of zeros, within [0, 1)")
        if self.rule == "dense" and self.sparsity > 0:
            remedy = f"Set rule to one of {', '.join(RULES[1:])}, or sparsity=0"
            raise RecipeError(f"rule dense cannot have sparsity {self.sparsity}", remedy=remedy)
        if self.rule != "dense" and self.sparsity == 0:
            raise RecipeError(f"rule {self.rule} has sparsity 0", remedy="Set sparsity above 0")

    def _check_optimizer(self) -> None:
        _at_least("epochs", self.epochs, 1)
        _at_least("batch_size", self.batch_size, 2)
        _at_least("seed", self.seed, 0)
        good = math.isfinite(self.lr) and self.lr > 0
        _require(good, f"lr is {self.lr}", "Give a learning rate above 0")
        _require(0 <= self.momentum < 1, f"momentum is {self.momentum}", "Give one within [0, 1)")
        good = not (self.nesterov and self.momentum == 0)
        _require(good, "nesterov needs a momentum above 0", "Set nesterov=false")
        good = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        _require(good, f"weight_decay is {self.weight_decay}", "Give a number of at least 0")

    def _check_phases(self) -> None:
        for key, value in (
            ("warmup_epochs", self.moon.warmup_epochs),
            ("vote_epochs", self.moon.vote_epochs),
        ):
            if value is not None and value >= self.epochs:
                remedy = f"Set moon.{key} below epochs, or leave it out"
                raise RecipeError(f"moon.{key} is {value} of {self.epochs} epochs", remedy=remedy)
        frozen = (self.epochs - self.vote_epochs) / self.epochs
        if self.rule in MOVING_RULES and self.vote_epochs and self.update.stop > frozen:
            raise RecipeError(
                f"update.stop is {self.update.stop}, but the topology must be frozen before the "
                f"last {self.vote_epochs} of {self.epochs} epochs vote",
                remedy=f"Set update.stop to at most {math.floor(frozen * 1000) / 1000:g}",
            )

    @property
    def warmup_epochs(self) -> int:
        """Epochs of MOON's warm-up, during which w is zero."""
        if self.moon.warmup_epochs is not None:
            return self.moon.warmup_epochs
        return min(max(1, round(0.05 * self.epochs)), self.epochs - 1)

    @property
    def plateau_epochs(self) -> int:
        """Epochs at the end over which the ``moon`` schedule holds the learning rate."""
        if self.moon.vote_epochs is not None:
            return self.moon.vote_epochs
        return self.epochs // 5

    @property
    def vote_epochs(self) -> int:
        """Epochs at the end whose weights are averaged; 0 where nothing votes."""
        return self.plateau_epochs if self.moon.enabled and self.moon.vote else 0

    @property
    def hash(self) -> str:
        """SHA-256 over everything but the name: equal hashes are equal runs."""
        table = to_dict(Recipe.from_dict(self.to_dict()).resolved())
        del table["name"]
        return hashlib.sha256(canonical_json(table)).hexdigest()

    def resolved(self) -> Recipe:
        """The same run with the phases that follow from ``epochs`` written out."""
        moon = dataclasses.replace(
            self.moon, warmup_epochs=self.warmup_epochs, vote_epochs=self.plateau_epochs
        )
        return dataclasses.replace(self, moon=moon)

    def override(self, settings: Sequence[str]) -> Recipe:
        """The recipe with ``key=value`` texts, as of ``--set``, laid over it."""
        return read(Recipe, apply_overrides(Recipe, self.to_dict(), settings))

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        return read(cls, table)

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str, *, name: str = "recipe") -> Recipe:
        """Read TOML; a recipe without a name of its own takes ``name``."""
        return cls.from_dict({"name": name, **parse_toml(text, f"recipe {name}")})

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a .toml file; without a name of its own it is named after the file."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(
                f"there is no recipe file {path}",
                remedy="Name a .toml file, or a built-in recipe as `moon recipes` lists them",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read {path}: {error}", remedy="Give a TOML file") from error
        return cls.from_toml(text, name=path.stem)


def _require(good: bool, cause: str, remedy: str) -> None:
    if not good:
        raise RecipeError(cause, remedy=remedy)


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    _require(value in allowed, f"{key} is {value!r}", f"Give one of {', '.join(allowed)}")


def _at_least(key: str, value: int, least: int) -> None:
    _require(value >= least, f"{key} is {value}", f"Give a whole number of at least {least}")
