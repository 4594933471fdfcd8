"""OpenOOD's benchmarks by name: which sets are near and far, and where they lie under a root.

Each set is looked for as OpenOOD v1.5 stores it, an image list
``benchmark_imglist/BENCHMARK/test_SET.txt`` whose paths are relative to ``images_classic/`` or
``images_largescale/``; and then as a packed archive, ``SET.npz#test``, or a folder of images.

Source: Zhang et al., "OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection", 2023.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from moon.errors import DataError, UsageError

__all__ = ["BENCHMARKS", "Benchmark", "Layout", "find_benchmark"]

_ROOTS = ("images_classic", "images_largescale")


@dataclass(frozen=True)
class Layout:
    """The sets of a benchmark, as OpenOOD names them."""

    known: str
    near: tuple[str, ...]
    far: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was found: a SOURCE for each set that is there.

    Attributes:
        name: of the benchmark.
        id: SOURCE of the in-distribution test images.
        near, far: SOURCEs by name.
        missing: a line for each set that is not there, its name first.
    """

    name: str
    id: str
    near: dict[str, str]
    far: dict[str, str]
    missing: tuple[str, ...]


_CLASSIC_FAR = ("mnist", "svhn", "texture", "places365")
BENCHMARKS: dict[str, Layout] = {
    "cifar10": Layout("cifar10", ("cifar100", "tin"), _CLASSIC_FAR),
    "cifar100": Layout("cifar100", ("cifar10", "tin"), _CLASSIC_FAR),
    "mnist": Layout(
        "mnist", ("notmnist", "fashionmnist"), ("texture", "cifar10", "tin", "places365")
    ),
    "imagenet": Layout(
        "imagenet", ("ssb_hard", "ninco"), ("inaturalist", "textures", "openimage_o")
    ),
}
# Other names of a set's list, and its packed files and folders, most welcome first.
_LISTS = {"textures": ("textures", "texture"), "texture": ("texture", "textures")}
_PACKED: dict[str, tuple[str, ...]] = {
    "cifar10": ("cifar10.npz#test",),
    "cifar100": ("cifar100.npz#test",),
    "mnist": ("mnist.npz#test", "mnist#test"),
    "fashionmnist": ("fashionmnist.npz#test", "fashion-mnist#test"),
    "notmnist": ("notmnist_test.npz#test", "notmnist"),
    "tin": ("tinyimagenet32_test.npz#test", "tin"),
    "svhn": ("svhn_test.npz#test", "svhn"),
    "texture": ("dtd10_test.npz#test", "dtd/images", "texture"),
    "textures": ("dtd10_test.npz#test", "dtd/images", "textures"),
    "places365": ("places365_test.npz#test", "places365"),
    "imagenet": ("imagenet/val",),
    "ssb_hard": ("ssb_hard", "ssb-hard"),
    "ninco": ("ninco",),
    "inaturalist": ("inaturalist",),
    "openimage_o": ("openimage_o", "openimage-o"),
}
# Tiny ImageNet shares classes with CIFAR-10; OpenOOD's own list leaves them out.
_FILTERED = {("cifar10", "tinyimagenet32_test.npz#test"): "{cifar10_overlap==0}"}


def find_benchmark(
    name: str,
    root: str | os.PathLike[str],
    *,
    known: str | None = None,
    given: Collection[str] = (),
) -> Benchmark:
    """Look for every set of a benchmark under a folder.

    Args:
        known: SOURCE of the known set, where it is not the one under ``root``.
        given: names of sets that the caller has from elsewhere; not looked for.

    Raises:
        UsageError: no such benchmark, or ``root`` is no folder.
        DataError: the known set is not there, or none of the unknown ones is.
    """
    layout = BENCHMARKS.get(name)
    if layout is None:
        raise UsageError(
            f"there is no benchmark {name!r}", remedy=f"Choose from {', '.join(BENCHMARKS)}"
        )
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--root {root} is no folder", remedy="Name the folder of the data")
    known = known or _find(name, layout.known, folder)
    near = {one: _find(name, one, folder) for one in layout.near if one not in given}
    far = {one: _find(name, one, folder) for one in layout.far if one not in given}
    if known is None:
        raise DataError(
            f"the benchmark {name} needs its known set: {_absent(name, layout.known, folder)}",
            remedy="Put it there, or name it by --id SOURCE",
        )
    missing = [one for one, source in {**near, **far}.items() if source is None]
    if missing and not given and len(missing) == len(near) + len(far):
        raise DataError(
            f"none of the unknown sets of the benchmark {name} is under {folder}: "
            f"{', '.join(missing)}",
            remedy=f"Put at least one there, as {_absent(name, missing[0], folder)} says",
        )
    return Benchmark(
        name=name,
        id=known,
        near={one: source for one, source in near.items() if source is not None},
        far={one: source for one, source in far.items() if source is not None},
        missing=tuple(_absent(name, one, folder) for one in missing),
    )


def _find(benchmark: str, name: str, folder: Path) -> str | None:
    for listed in _LISTS.get(name, (name,)):
        listing = folder / "benchmark_imglist" / benchmark / f"test_{listed}.txt"
        if not listing.is_file():
            continue
        first = _first_path(listing)
        for images in _ROOTS:
            if first and (folder / images / first).is_file():
                return f"{listing}@{folder / images}"
    for packed in _PACKED[name]:
        place, mark, split = packed.partition("#")
        if (folder / place).exists():
            return f"{folder / place}{mark}{split}{_FILTERED.get((benchmark, packed), '')}"
    return None


def _first_path(listing: Path) -> str:
    """The first path of an image list: lists come for all sets, images for those fetched."""
    try:
        with listing.open(encoding="utf-8-sig") as lines:
            first = next((line.strip() for line in lines if line.strip()), "")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"could not read the image list {listing}: {error}") from error
    path, _, label = first.rpartition(" ")
    return path.strip() if label.lstrip("-").isdigit() else first


def _absent(benchmark: str, name: str, folder: Path) -> str:
    lists = folder / "benchmark_imglist" / benchmark / f"test_{name}.txt"
    what = "its list is there but not its images" if lists.is_file() else f"no {lists}"
    return f"{name}: {what}, and no {' or '.join(_PACKED[name])} in {folder}"
