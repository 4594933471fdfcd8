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
from moon.errors import RecipeError, UsageError
from moon.files import canonical_json
from moon.trainer.keys import apply_overrides, parse_toml, read, to_dict
from moon.trainer.methods import CigLRecipe, DacRecipe, LogitNormRecipe, MixupRecipe, VosRecipe
from moon.trainer.ranges import at_least, one_of, positive, require
from moon.trainer.sparsity.structure import parse_structure

__all__ = [
    "AUGMENTS",
    "COMPAT",
    "DISTRIBUTIONS",
    "MOVING_RULES",
    "OFFICIAL",
    "RULES",
    "SCHEDULES",
    "DataRecipe",
    "MoonRecipe",
    "Recipe",
    "UpdateRecipe",
]

RULES = ("dense", "static", "set", "rigl", "gmp")
DISTRIBUTIONS = ("uniform", "er", "erk")
SCHEDULES = ("cosine", "moon")
AUGMENTS = ("none", "crop", "crop-flip", "resized-crop")
# Rules whose topology moves until ``update.stop``.
MOVING_RULES = ("set", "rigl", "gmp")
# Where the authors' published code differs from the paper.
OFFICIAL = ("votes", "drop-schedule", "dropconnect", "bernoulli")
COMPAT = ("official", *OFFICIAL)


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
        require(bool(self.train), "data.train is empty", "Name a SOURCE of labelled images")
        one_of("data.augment", self.augment, AUGMENTS)
        if isinstance(self.val, str):
            require(bool(self.val), "data.val is empty", "Name a SOURCE, a share or a count")
        elif isinstance(self.val, int):
            require(self.val >= 1, f"data.val is {self.val}", "Give a count of at least 1")
        else:
            good = math.isfinite(self.val) and 0 < self.val < 1
            require(good, f"data.val is {self.val}", "Give a share between 0 and 1, or a count")


@dataclass(frozen=True, kw_only=True)
class UpdateRecipe:
    """When and how much the topology changes: every ``interval`` steps, dropping a share
    that falls by cosine from ``drop_fraction`` to zero at ``stop`` (a share of training)."""

    interval: int = 100
    drop_fraction: float = 0.3
    stop: float = 0.7

    def __post_init__(self) -> None:
        at_least("update.interval", self.interval, 1)
        good = 0 < self.drop_fraction < 1
        require(good, f"update.drop_fraction is {self.drop_fraction}", "Give one within (0, 1)")
        require(0 < self.stop <= 1, f"update.stop is {self.stop}", "Give a share within (0, 1]")


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
        at_least("moon.w_final", self.w_final, 0)
        positive("moon.init_factor", self.init_factor)
        for key in ("warmup_epochs", "vote_epochs"):
            if getattr(self, key) is not None:
                at_least(f"moon.{key}", getattr(self, key), 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete training run; the defaults are the paper's settings.

    ``schedule``: ``cosine`` takes the learning rate from ``lr`` to 1e-6; ``moon`` takes it
    from 1.2 to 0.08 times ``lr`` and then holds it over the voting epochs.
    ``dense`` names layers to leave dense (``stem``, ``head``, or a module's name).
    ``structure`` says what connections live and die together, as of ``Sparsifier``.
    ``temperature`` ends with temperature scaling: the head is divided by the T that fits
    half of the held-out images best, and the other half stays for the calibration.
    ``logitnorm``, ``mixup``, ``dac``, ``vos`` and ``cigl`` are methods to compare with; a
    table that is there, if only as ``logitnorm.tau=0.04``, turns its method on.
    ``compat`` names differences of the authors' published code to follow: ``votes`` (at
    every step of the first tenth of a voting epoch), ``drop-schedule`` (the drop fraction's
    cosine ends after as many steps as there are epochs), ``dropconnect`` (1% of the active
    weights set aside at every step), ``bernoulli`` (a layer's first connections are drawn
    one by one, so that their number varies), ``official`` for all of them.

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
    temperature: bool = False
    logitnorm: LogitNormRecipe | None = None
    mixup: MixupRecipe | None = None
    dac: DacRecipe | None = None
    vos: VosRecipe | None = None
    cigl: CigLRecipe | None = None
    compat: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "name is empty", "Give the recipe a name")
        require(bool(self.model), "model is empty", "Name a model, such as cnn or resnet18")
        one_of("rule", self.rule, RULES)
        self._check_structure()
        one_of("distribution", self.distribution, DISTRIBUTIONS)
        one_of("schedule", self.schedule, SCHEDULES)
        self._check_sparsity()
        self._check_optimizer()
        self._check_methods()
        self._check_phases()

    def _check_structure(self) -> None:
        try:
            parse_structure(self.structure)
        except UsageError as error:
            raise RecipeError(error.cause, remedy=error.remedy) from error

    def _check_methods(self) -> None:
        for name in self.compat:
            one_of("compat", name, COMPAT)
        drawn = self.follows("bernoulli") and self.rule != "dense"
        plain = self.structure == "unstructured" and self.rule != "gmp" and not self.pretrained
        require(
            plain or not drawn,
            "compat bernoulli needs the structure unstructured, a rule other than gmp and nothing "
            "pretrained",
            "Name the other differences alone",
        )
        rivals = [name for name in ("dac", "vos") if getattr(self, name) is not None]
        if self.moon.enabled and self.moon.loss:
            rivals.append("moon")
        require(
            len(rivals) < 2,
            f"{' and '.join(rivals)} each have a loss of their own",
            f"Set {rivals[0] if rivals else ''}=none, or moon.loss=false",
        )
        alone = self.mixup is None or self.vos is None
        require(alone, "vos needs images of one class, not mixup's", "Set mixup=none")
        if self.rule == "dense" and self.cigl is not None:
            raise RecipeError("cigl is for sparse training", remedy="Set rule and sparsity")
        if self.cigl is not None and self.follows("dropconnect"):
            remedy = "Name the other differences alone, or set cigl=none"
            raise RecipeError("cigl and compat dropconnect are two random masks", remedy=remedy)
        if self.dac is not None and self.epochs == 1:
            raise RecipeError("dac needs an epoch to warm up", remedy="Set epochs to at least 2")

    def _check_sparsity(self) -> None:
        good = 0 <= self.sparsity < 1
        require(good, f"sparsity is {self.sparsity}", "Give the share of zeros, within [0, 1)")
        if self.rule == "dense" and self.sparsity > 0:
            remedy = f"Set rule to one of {', '.join(RULES[1:])}, or sparsity=0"
            raise RecipeError(f"rule dense cannot have sparsity {self.sparsity}", remedy=remedy)
        if self.rule != "dense" and self.sparsity == 0:
            raise RecipeError(f"rule {self.rule} has sparsity 0", remedy="Set sparsity above 0")

    def _check_optimizer(self) -> None:
        at_least("epochs", self.epochs, 1)
        at_least("batch_size", self.batch_size, 2)
        at_least("seed", self.seed, 0)
        require(self.seed < 2**63, f"seed is {self.seed}", "Give a whole number below 2**63")
        positive("lr", self.lr)
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}", "Give one within [0, 1)")
        good = not (self.nesterov and self.momentum == 0)
        require(good, "nesterov needs a momentum above 0", "Set nesterov=false")
        at_least("weight_decay", self.weight_decay, 0)

    def _check_phases(self) -> None:
        for key, value in (
            ("moon.warmup_epochs", self.moon.warmup_epochs),
            ("moon.vote_epochs", self.moon.vote_epochs),
            ("dac.warmup_epochs", None if self.dac is None else self.dac_warmup_epochs),
            ("vos.warmup_epochs", None if self.vos is None else self.vos_warmup_epochs),
        ):
            if value is not None and value >= self.epochs:
                remedy = f"Set {key} below epochs, or leave it out"
                raise RecipeError(f"{key} is {value} of {self.epochs} epochs", remedy=remedy)
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
    def dac_warmup_epochs(self) -> int:
        """Epochs of plain cross-entropy before ``dac`` may abstain."""
        given = None if self.dac is None else self.dac.warmup_epochs
        return max(1, self.epochs // 5) if given is None else given

    @property
    def vos_warmup_epochs(self) -> int:
        """Epochs before ``vos`` draws outliers."""
        given = None if self.vos is None else self.vos.warmup_epochs
        return 2 * self.epochs // 5 if given is None else given

    @property
    def plateau_epochs(self) -> int:
        """Epochs at the end over which the ``moon`` schedule holds the learning rate."""
        if self.moon.vote_epochs is not None:
            return self.moon.vote_epochs
        return self.epochs // 5

    @property
    def votes(self) -> bool:
        """Whether the last epochs' weights are averaged."""
        return self.cigl is not None or (self.moon.enabled and self.moon.vote)

    @property
    def vote_epochs(self) -> int:
        """Epochs at the end whose weights are averaged; 0 where nothing votes."""
        return self.plateau_epochs if self.votes else 0

    @property
    def unknown(self) -> bool:
        """Whether there is an output for the unknown."""
        return self.moon.enabled or self.dac is not None

    def follows(self, difference: str) -> bool:
        """Whether the run follows the authors' code in one of its differences."""
        return difference in self.compat or (difference in OFFICIAL and "official" in self.compat)

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
