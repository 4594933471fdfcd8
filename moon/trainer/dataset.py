"""From a recipe's sources to batches of training and of held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moon.data.fingerprint import TrainingSketch, sketch
from moon.data.items import Source
from moon.data.load import data_sha256, match_labels, split_validation
from moon.data.source import open_source
from moon.errors import DataError
from moon.progress import Progress, silent
from moon.trainer.batches import Batches
from moon.trainer.checkpoint import Validation
from moon.trainer.pixels import MEMORY_BUDGET, open_pixels
from moon.trainer.ranks import Ranks
from moon.trainer.recipe import Recipe

__all__ = ["Dataset", "open_dataset", "training_source"]

VALIDATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and held-out batches.

    Args:
        classes: names of the known classes, in the order of the labels.
        train: shuffled and augmented.
        validation: in order, as they are.
        held_out: what the held-out images are.
        trained_on: a sample of the training images' fingerprints.
        scaling: every other held-out image, which then counts as one no longer, to fit a
            temperature to; whole on every rank, and None where the recipe wants none.
    """

    classes: tuple[str, ...]
    train: Batches
    validation: Batches
    held_out: Validation
    trained_on: TrainingSketch
    scaling: Batches | None = None


def open_dataset(
    recipe: Recipe,
    device: torch.device,
    *,
    budget: int = MEMORY_BUDGET,
    workers: int | None = None,
    progress: Progress = silent,
    ranks: Ranks | None = None,
) -> Dataset:
    """Open, split, and where it fits the budget decode, a recipe's images.

    Args:
        budget: bytes of decoded images that are kept in memory, for each of the two sets.
        workers: processes that decode larger sets; the batches do not depend on it.
        ranks: who shares the batches out; rank 0 opens the sources first, since that may
            download them.

    Raises:
        DataError: a source cannot be read, or has no labels to train with.
    """
    data = recipe.data
    ranks = ranks or Ranks()
    with ranks.in_turn():
        train, held_out, classes = _parts(recipe)
    _check_outliers(recipe, train, classes)
    scaling = None
    if recipe.temperature:
        scaling, held_out = _halves(held_out)
    options: dict[str, Any] = {"budget": budget, "workers": workers, "progress": progress}
    options["sharing"] = ranks.local_world
    shared: dict[str, Any] = {"rank": ranks.rank, "world": ranks.world}
    resized = recipe.seed if data.augment == "resized-crop" else None
    pixels = open_pixels(
        train.source, data.preprocess, train.chosen, device, resized_crop=resized, **options
    )
    val_pixels = open_pixels(held_out.source, data.preprocess, held_out.chosen, device, **options)
    every = isinstance(data.val, str) and scaling is None
    return Dataset(
        classes=classes,
        train=Batches(
            pixels,
            train.labels,
            data.preprocess,
            recipe.batch_size,
            device,
            augment=data.augment,
            seed=recipe.seed,
            **shared,
        ),
        validation=Batches(
            val_pixels, held_out.labels, data.preprocess, VALIDATION_BATCH, device, **shared
        ),
        held_out=Validation(
            source=held_out.source.spec,
            indices=None if every else tuple(held_out.chosen.tolist()),
            sha256=data_sha256(held_out.source, held_out.chosen),
        ),
        trained_on=sketch(train.source, data.preprocess, train.chosen),
        scaling=None
        if scaling is None
        else Batches(
            open_pixels(scaling.source, data.preprocess, scaling.chosen, device, **options),
            scaling.labels,
            data.preprocess,
            VALIDATION_BATCH,
            device,
        ),
    )


def training_source(recipe: Recipe) -> Source:
    """The images a recipe trains on, in order, with their labels; those held out are not there.

    Raises:
        DataError: the source cannot be read, or has no labels to train with.
    """
    train, _, _ = _parts(recipe)
    return train.source.select(train.chosen)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some items of a source, and the class of each of them."""

    source: Source
    chosen: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def _parts(recipe: Recipe) -> tuple[_Part, _Part, tuple[str, ...]]:
    """What is trained on, what is held out, and the classes."""
    source = open_source(recipe.data.train)
    labels = _labels(source)
    classes = _classes(source, labels)
    if isinstance(recipe.data.val, str):
        other = open_source(recipe.data.val)
        train = _Part(source=source, chosen=np.arange(len(source)), labels=labels)
        held_out = _Part(
            source=other, chosen=np.arange(len(other)), labels=_matching_labels(other, classes)
        )
        return train, held_out, classes
    chosen, val_chosen = split_validation(labels, recipe.data.val, recipe.seed)
    train = _Part(source=source, chosen=chosen, labels=labels[chosen])
    return train, _Part(source=source, chosen=val_chosen, labels=labels[val_chosen]), classes


def _halves(part: _Part) -> tuple[_Part, _Part]:
    """Every other item, from the first on and from the second on."""
    if len(part.chosen) < 2:
        raise DataError(
            f"{len(part.chosen)} held-out image cannot be halved for a temperature",
            remedy="Hold out more (data.val), or set temperature=false",
        )
    first, second = (
        replace(part, chosen=part.chosen[start::2], labels=part.labels[start::2])
        for start in (0, 1)
    )
    return first, second


def _check_outliers(recipe: Recipe, train: _Part, classes: tuple[str, ...]) -> None:
    """Virtual outliers begin with the first epoch that finds the queue of every class full."""
    if recipe.vos is None:
        return
    images = np.bincount(train.labels, minlength=len(classes))
    rarest = int(images.argmin())
    needed = math.ceil(recipe.vos.queue / max(1, int(images[rarest]))) + 1
    if needed > recipe.epochs:
        raise DataError(
            f"vos would never begin: the {images[rarest]} training images of the class "
            f"{classes[rarest]} do not fill a queue of {recipe.vos.queue} within "
            f"{recipe.epochs - 1} epochs",
            remedy=f"Set vos.queue lower, or epochs to at least {needed}",
        )


def _labels(source: Source) -> npt.NDArray[np.int64]:
    if source.labels is None:
        raise DataError(
            f"{source.spec} has no labels, so nothing can be learned from it",
            remedy="Give a folder with one folder a class, or another labelled SOURCE",
        )
    unknown = np.flatnonzero(source.labels < 0)
    if len(unknown):
        raise DataError(
            f"{source.name(int(unknown[0]))} has no known label (-1)",
            remedy="Filter the training set with {label>=0}",
        )
    return source.labels


def _classes(source: Source, labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    count = int(labels.max()) + 1
    classes = source.class_names or tuple(str(label) for label in range(count))
    if len(classes) < 2:
        raise DataError(
            f"{source.spec} has one class only, {classes[0]}", remedy="Give at least two classes"
        )
    present = np.unique(labels).tolist()
    if len(present) < 2:
        raise DataError(
            f"{source.spec} has images of one class only, {classes[present[0]]}",
            remedy="Give at least two classes",
        )
    absent = sorted(set(range(len(classes))) - set(present))
    if absent:
        last = int(labels.argmax())
        raise DataError(
            f"{source.spec} has no image of the class {classes[absent[0]]}, yet "
            f"{source.name(last)} has the label {labels[last]}",
            remedy="Number the labels 0, 1, 2 ... without a gap, or add images of it",
        )
    return classes


def _matching_labels(source: Source, classes: tuple[str, ...]) -> npt.NDArray[np.int64]:
    labels = match_labels(source, classes)
    if labels is None:
        raise DataError(
            f"{source.spec} has no labels to validate with",
            remedy="Give a labelled SOURCE as data.val, or a share of the training set",
        )
    strange = np.flatnonzero(labels < 0)
    if len(strange):
        raise DataError(
            f"{source.name(int(strange[0]))} is of none of the {len(classes)} classes trained",
            remedy="Filter data.val to the classes of data.train",
        )
    return labels
