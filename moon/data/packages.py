"""Data sets that come with, or through, other packages: scikit-learn and torchvision."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moon.data.items import Labels, Source, checked_labels, shown
from moon.data.split import split_validation
from moon.errors import DataError, ImageError, MissingExtraError

__all__ = ["open_sklearn", "open_torchvision"]

_TEST_SHARE = 0.3
_CROP = 32
_SPLITS: dict[str, tuple[str, ...]] = {"digits": ("train", "test"), "photos": ()}
# MNIST and its kin call their classes "0 - zero".
_NUMBERED_CLASS = re.compile(r"(\d+) - \w+")


@dataclass(frozen=True)
class _Arrays:
    """Pixels as images, which are converted to whatever size a model wants."""

    pixels: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def open_sklearn(spec: str, name: str, split: str | None) -> Source:
    """``digits`` (1,797 grey images of 8x8, 10 classes) or ``photos``.

    ``digits`` has the splits train and test, a fixed stratified 70 : 30; without a split it
    is all of them. ``photos`` is every 32x32 crop, without overlap, of two photographs.

    Raises:
        DataError: no such set or split.
        MissingExtraError: scikit-learn is not installed.
    """
    if name not in _SPLITS:
        raise DataError(f"there is no sklearn:{name}; the sets are {shown(list(_SPLITS))}")
    if split is not None and split not in _SPLITS[name]:
        raise DataError(
            f"sklearn:{name} has no split {split}; its splits are {shown(_SPLITS[name])}"
        )
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train", f"the source {spec}") from error
    if name == "digits":
        return _digits(spec, datasets.load_digits(), split)
    photos = datasets.load_sample_images().images
    return Source(spec=spec, items=_Arrays(np.concatenate([_crops(photo) for photo in photos])))


def _digits(spec: str, digits: Any, split: str | None) -> Source:
    # Stored as counts from 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    source = Source(
        spec=spec,
        items=_Arrays(pixels),
        names=[f"sklearn:digits[{i}]" for i in range(len(pixels))],
        labels=labels,
        class_names=tuple(map(str, digits.target_names)),
    )
    if split is None:
        return source
    train, test = split_validation(labels, _TEST_SHARE, seed=0)
    return source.select(train if split == "train" else test)


def _crops(photo: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    rows, columns = photo.shape[0] // _CROP, photo.shape[1] // _CROP
    tiles = photo[: rows * _CROP, : columns * _CROP].reshape(rows, _CROP, columns, _CROP, 3)
    return np.ascontiguousarray(tiles.swapaxes(1, 2).reshape(-1, _CROP, _CROP, 3))


@dataclass(frozen=True)
class _Dataset:
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            image = self.dataset[index][0]
        # Whatever its files make torchvision, or the packages below it, raise.
        except Exception as error:
            raise ImageError(f"torchvision could not read item {index}: {error}") from error
        if not isinstance(image, Image.Image):
            raise ImageError(f"item {index} is a {type(image).__name__}, not an image")
        return image


def open_torchvision(spec: str, name: str, root: Path | None, split: str | None) -> Source:
    """A data set of torchvision.datasets by its name, in any case.

    It is downloaded where it is missing and torchvision knows from where. The root is by
    default ``moon/datasets`` in the user's cache folder.

    Raises:
        DataError: no such set or split, or neither there nor to be downloaded.
        MissingExtraError: torchvision is not installed.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingExtraError("torchvision", "train", f"the source {spec}") from error
    known = {key.lower(): key for key in datasets.__all__ if key[:1].isupper()}
    if name.lower() not in known:
        raise DataError(
            f"torchvision has no data set {name}", remedy=f"It has {shown(sorted(known.values()))}"
        )
    name = known[name.lower()]
    factory = getattr(datasets, name)
    if "root" not in inspect.signature(factory).parameters:
        raise DataError(f"torchvision:{name} is not a data set that lies in a folder")
    place = _cache() if root is None else root
    dataset = _built(factory, name, place, _split_argument(factory, name, split))
    if not len(dataset):
        raise DataError(f"torchvision:{name} in {place} has no images")
    return _from_dataset(spec, name, dataset)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "moon" / "datasets"


def _split_argument(factory: Callable[..., Any], name: str, split: str | None) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    if split is None:
        required = parameters.get("split")
        if required is not None and required.default is inspect.Parameter.empty:
            raise DataError(
                f"torchvision:{name} needs a split", remedy=f"Write torchvision:{name}#SPLIT"
            )
        return {}
    if "train" in parameters:
        if split not in ("train", "test"):
            raise DataError(f"torchvision:{name} has no split {split}; it has train and test")
        return {"train": split == "train"}
    for argument in ("split", "image_set"):
        if argument in parameters:
            return {argument: split}
    raise DataError(f"torchvision:{name} has no splits", remedy="Leave #" + split + " out")


def _built(factory: Callable[..., Any], name: str, root: Path, chosen: dict[str, Any]) -> Any:
    # Data sets print what they do; standard output belongs to the command's own results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return factory(root=str(root), **chosen)
        except ValueError as error:
            raise DataError(f"torchvision:{name} refuses {chosen}: {error}") from error
        # Missing and damaged files raise anything from RuntimeError to UnpicklingError.
        except Exception as error:
            if "download" not in inspect.signature(factory).parameters:
                raise _absent(name, root, error) from error
        try:
            root.mkdir(parents=True, exist_ok=True)
            return factory(root=str(root), download=True, **chosen)
        except Exception as error:
            raise _absent(name, root, error) from error


def _absent(name: str, root: Path, error: Exception) -> DataError:
    return DataError(
        f"torchvision:{name} is not in {root} and could not be downloaded ({error})",
        remedy=f"Put its files there, or name another folder: torchvision:{name}@FOLDER",
    )


def _from_dataset(spec: str, name: str, dataset: Any) -> Source:
    classes = getattr(dataset, "classes", None)
    names: tuple[str, ...] | None = None
    if isinstance(classes, list | tuple) and classes:
        names = tuple(_class_name(each) for each in classes)
    values = _labels(dataset)
    labels: Labels | None = None
    if values is not None:
        labels = checked_labels(values, len(dataset), names, f"torchvision:{name}")
    return Source(spec=spec, items=_Dataset(dataset), labels=labels, class_names=names)


def _class_name(value: Any) -> str:
    # ImageNet gives every class a tuple of synonyms.
    text = str(value[0] if isinstance(value, tuple) and value else value)
    match = _NUMBERED_CLASS.fullmatch(text)
    return match[1] if match else text


def _labels(dataset: Any) -> npt.NDArray[Any] | None:
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            values = np.asarray(found)
            return values if values.ndim == 1 and values.dtype.kind in "iu" else None
    for attribute in ("samples", "_samples", "imgs"):
        pairs = getattr(dataset, attribute, None)
        if pairs is not None and len(pairs) == len(dataset):
            return np.array([pair[1] for pair in pairs])
    return None
