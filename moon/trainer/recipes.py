"""The built-in recipes: DATA x MODEL x RULE and SPARSITY x VARIANT.

A name is ``DATA-MODEL-RULE[SPARSITY][-VARIANT]``, such as ``cifar10-resnet18-rigl95-moon``:
the paper's settings (Lei et al., TMLR) for ResNet-18, ResNet-50 and WRN-28-10, and shorter
runs of the small ``cnn`` that train on a CPU. No variant is the baseline without MOON;
``moon-nolm``, ``moon-noat`` and ``moon-novt`` take one of its three parts away: the
unknown-aware loss, the tuning of w, the voting. They keep MOON's learning rates. The others
are the methods the paper compares with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moon.data.preprocess import Preprocess
from moon.errors import RecipeError
from moon.trainer.methods import CigLRecipe, DacRecipe, LogitNormRecipe, MixupRecipe, VosRecipe
from moon.trainer.recipe import DataRecipe, MoonRecipe, Recipe, UpdateRecipe

__all__ = ["RECIPES", "SPARSITIES", "VARIANTS", "Variant", "find_recipe"]

SPARSITIES = (50, 60, 70, 80, 90, 95, 99)
SPARSE_RULES = ("static", "set", "rigl", "gmp")


@dataclass(frozen=True, kw_only=True)
class _Base:
    """What the recipes of one data set and model share."""

    data: DataRecipe
    w_final: float
    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.1
    interval: int = 100


def _grey(side: int) -> Preprocess:
    return Preprocess(crop=(side, side), mean=(0.5,), std=(0.5,))


def _colour(side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocess:
    return Preprocess(crop=(side, side), mean=mean, std=std)


_CIFAR10 = DataRecipe(
    train="torchvision:CIFAR10#train",
    val=5000,
    preprocess=_colour(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    augment="crop-flip",
)
_CIFAR100 = replace(
    _CIFAR10,
    train="torchvision:CIFAR100#train",
    preprocess=_colour(32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
)
_MNIST = DataRecipe(train="torchvision:MNIST#train", val=5000, preprocess=_grey(28))
# As in the paper's experiments, so that colour images stay what they are as OOD inputs.
_RGB32 = _colour(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = DataRecipe(
    train="torchvision:ImageNet#train",
    val=10_000,
    preprocess=Preprocess(
        crop=(224, 224), resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    augment="resized-crop",
)
# Two of the ten digits are left out, to play the unknown.
_DIGITS = DataRecipe(train="sklearn:digits#train{label in 0..7}", val=150, preprocess=_grey(8))
_FASHION = replace(_MNIST, train="torchvision:FashionMNIST#train")

_BASES: dict[str, _Base] = {
    "digits-cnn": _Base(data=_DIGITS, w_final=4.0, epochs=60, batch_size=32, interval=20),
    "mnist-cnn": _Base(data=_MNIST, w_final=0.01, epochs=20),
    "mnist-resnet18": _Base(data=replace(_MNIST, preprocess=_RGB32), w_final=0.01),
    "fashionmnist-cnn": _Base(data=_FASHION, w_final=1.0, epochs=30),
    "fashionmnist-resnet18": _Base(data=replace(_FASHION, preprocess=_RGB32), w_final=1.0),
    "cifar10-cnn": _Base(data=_CIFAR10, w_final=1.0, epochs=60),
    "cifar10-resnet18": _Base(data=_CIFAR10, w_final=1.0),
    "cifar10-wrn28-10": _Base(data=_CIFAR10, w_final=1.0),
    "cifar100-cnn": _Base(data=_CIFAR100, w_final=2.0, epochs=60),
    "cifar100-resnet18": _Base(data=_CIFAR100, w_final=2.0),
    "cifar100-wrn28-10": _Base(data=_CIFAR100, w_final=2.0),
    # A quarter of the batch: topology updates as far apart in images as elsewhere.
    "imagenet-resnet50": _Base(data=_IMAGENET, w_final=0.001, batch_size=32, interval=400),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is done besides sparse training, and in a few words."""

    says: str
    moon: MoonRecipe = field(default_factory=MoonRecipe)
    changes: Mapping[str, Any] = field(default_factory=dict)


_MOON = MoonRecipe(enabled=True)

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "": Variant(says="the baseline, without MOON"),
        "moon": Variant(says="MOON: unknown class, its loss, voting", moon=_MOON),
        "moon-nolm": Variant(
            says="without the unknown-aware loss", moon=replace(_MOON, loss=False)
        ),
        "moon-noat": Variant(says="without the tuning of w", moon=replace(_MOON, auto=False)),
        "moon-novt": Variant(says="without voting", moon=replace(_MOON, vote=False)),
        "moon-official": Variant(
            says="as the authors' code differs (not gmp)",
            moon=_MOON,
            changes={"compat": ("official",)},
        ),
        "moon-logitnorm": Variant(
            says="MOON on normalised logits", moon=_MOON, changes={"logitnorm": LogitNormRecipe()}
        ),
        "dac": Variant(says="deep abstaining classifier", changes={"dac": DacRecipe()}),
        "logitnorm": Variant(says="LogitNorm", changes={"logitnorm": LogitNormRecipe()}),
        "vos": Variant(says="virtual outlier synthesis", changes={"vos": VosRecipe()}),
        "mixup": Variant(says="Mixup", changes={"mixup": MixupRecipe()}),
        "cigl": Variant(
            says="CigL: random masks and averaging (sparse only)", changes={"cigl": CigLRecipe()}
        ),
        "ts": Variant(says="temperature scaling", changes={"temperature": True}),
    }
)


def _recipe(stem: str, rule: str, percent: int, variant: str) -> Recipe:
    base = _BASES[stem]
    kind = VARIANTS[variant]
    tail = f"-{variant}" if variant else ""
    averaged = kind.moon.enabled or "cigl" in kind.changes
    # The authors' code updates every 80 steps, the first of them while anything still moves.
    interval = base.interval * 4 // 5 if "compat" in kind.changes else base.interval
    return Recipe(
        name=f"{stem}-{rule}{percent or ''}{tail}",
        model=stem.partition("-")[2],
        data=base.data,
        rule=rule,
        sparsity=percent / 100,
        # As published 99% runs do, whose first convolution would have next to nothing left.
        dense=("stem",) if percent == 99 else (),
        epochs=base.epochs,
        batch_size=base.batch_size,
        lr=base.lr,
        # The average wants a rate that stands still.
        schedule="moon" if averaged else "cosine",
        update=UpdateRecipe(interval=interval),
        moon=replace(kind.moon, w_final=base.w_final),
        **kind.changes,
    )


def _keys() -> Iterator[tuple[str, str, int, str]]:
    for stem in _BASES:
        for variant in VARIANTS:
            if variant != "cigl":
                yield stem, "dense", 0, variant
        for rule in SPARSE_RULES:
            for percent in SPARSITIES:
                for variant in VARIANTS:
                    if (rule, variant) != ("gmp", "moon-official"):
                        yield stem, rule, percent, variant


class _BuiltIns(Mapping[str, Recipe]):
    """All recipes by name, each made when it is asked for."""

    def __init__(self) -> None:
        self._keys = {
            f"{stem}-{rule}{percent or ''}{'-' if variant else ''}{variant}": (
                stem,
                rule,
                percent,
                variant,
            )
            for stem, rule, percent, variant in _keys()
        }

    def __getitem__(self, name: str) -> Recipe:
        return _recipe(*self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


RECIPES: Mapping[str, Recipe] = _BuiltIns()


def find_recipe(name: str) -> Recipe:
    """A built-in recipe by name, or the recipe of a .toml file.

    Raises:
        RecipeError: there is none of that name (with the nearest), or the file is wrong.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".toml") or Path(name).is_file():
        return Recipe.load(name)
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"there is no recipe {name}",
        remedy=f"{hint}`moon recipes` lists them all, and a .toml file is one too",
    )
