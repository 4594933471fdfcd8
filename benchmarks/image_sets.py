"""Where a benchmark finds its sets of images, and which sets are near and far for which.

A set has a name, such as `svhn`. It is looked for, in this order, as

    --source svhn=SOURCE     any SOURCE
    DIR/FILE                 under --data DIR, the first of the files below that is there
    torchvision              with --download, into DIR where one is given

    name                file or folder under DIR (#SPLIT)
    cifar10-train       cifar10.npz#train
    cifar10             cifar10.npz#test
    cifar100-train      cifar100.npz#train
    cifar100            cifar100.npz#test
    mnist-train         mnist.npz#train, mnist/ of idx files
    mnist               mnist.npz#test, mnist/ of idx files
    fashionmnist-train  fashionmnist.npz#train, fashion-mnist/ of idx files
    fashionmnist        fashionmnist.npz#test, fashion-mnist/ of idx files
    imagenet-train      imagenet/train/, one folder a class
    imagenet            imagenet/val/
    tinyimagenet        tinyimagenet32_test.npz#test, without the classes of CIFAR-10
    tinyimagenet-all    tinyimagenet32_test.npz#test, all of it
    svhn                svhn_test.npz#test
    textures            dtd10_test.npz#test, dtd/images/
    notmnist            notmnist_test.npz#test
    places365           places365_test.npz#test, places365/
    ssb-hard, ninco, inaturalist, openimage-o     a folder of images of that name

Near and far follow OpenOOD v1.5 (Zhang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moon.errors import UsageError


@dataclass(frozen=True)
class ImageSet:
    """A set by name: its files, most welcome first, and torchvision's name for it."""

    title: str
    files: tuple[str, ...] = ()
    torchvision: str = ""
    fixed: str = ""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The sets of one in-distribution set; `NAME-train` is what it is trained on."""

    known: str
    near: tuple[str, ...]
    far: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A SOURCE, and how to call it wherever the files lie."""

    source: str
    portable: str


SETS: dict[str, ImageSet] = {
    "cifar10-train": ImageSet("CIFAR-10", ("cifar10.npz#train",), "CIFAR10#train"),
    "cifar10": ImageSet("CIFAR-10", ("cifar10.npz#test",), "CIFAR10#test"),
    "cifar100-train": ImageSet("CIFAR-100", ("cifar100.npz#train",), "CIFAR100#train"),
    "cifar100": ImageSet("CIFAR-100", ("cifar100.npz#test",), "CIFAR100#test"),
    "mnist-train": ImageSet("MNIST", ("mnist.npz#train", "mnist#train"), "MNIST#train"),
    "mnist": ImageSet("MNIST", ("mnist.npz#test", "mnist#test"), "MNIST#test"),
    "fashionmnist-train": ImageSet(
        "Fashion-MNIST", ("fashionmnist.npz#train", "fashion-mnist#train"), "FashionMNIST#train"
    ),
    "fashionmnist": ImageSet(
        "Fashion-MNIST", ("fashionmnist.npz#test", "fashion-mnist#test"), "FashionMNIST#test"
    ),
    "imagenet-train": ImageSet("ImageNet", ("imagenet/train",)),
    "imagenet": ImageSet("ImageNet", ("imagenet/val",)),
    "tinyimagenet": ImageSet(
        "Tiny ImageNet", ("tinyimagenet32_test.npz#test{cifar10_overlap==0}",)
    ),
    "tinyimagenet-all": ImageSet("Tiny ImageNet", ("tinyimagenet32_test.npz#test",)),
    "svhn": ImageSet("SVHN", ("svhn_test.npz#test",), "SVHN#test"),
    "textures": ImageSet("DTD", ("dtd10_test.npz#test", "dtd/images"), "DTD#test"),
    "notmnist": ImageSet("notMNIST", ("notmnist_test.npz#test",)),
    "places365": ImageSet("Places365", ("places365_test.npz#test", "places365"), "Places365#val"),
    "ssb-hard": ImageSet("SSB-hard", ("ssb-hard",)),
    "ninco": ImageSet("NINCO", ("ninco",)),
    "inaturalist": ImageSet("iNaturalist", ("inaturalist",)),
    "openimage-o": ImageSet("OpenImage-O", ("openimage-o",)),
    "digits-train": ImageSet("digits 0-7", fixed="sklearn:digits#train{label in 0..7}"),
    "digits": ImageSet("digits 0-7", fixed="sklearn:digits#test{label in 0..7}"),
    "digits-8-9": ImageSet("digits 8-9", fixed="sklearn:digits#test{label in 8..9}"),
    "photos": ImageSet("photographs", fixed="sklearn:photos"),
}

_FAR = ("mnist", "svhn", "textures", "places365")
PROTOCOLS: dict[str, Protocol] = {
    "cifar10": Protocol(known="cifar10", near=("cifar100", "tinyimagenet"), far=_FAR),
    "cifar100": Protocol(known="cifar100", near=("cifar10", "tinyimagenet-all"), far=_FAR),
    "mnist": Protocol(
        known="mnist",
        near=("notmnist", "fashionmnist"),
        far=("textures", "cifar10", "tinyimagenet-all", "places365"),
    ),
    "imagenet": Protocol(
        known="imagenet",
        near=("ssb-hard", "ninco"),
        far=("inaturalist", "textures", "openimage-o"),
    ),
    "digits": Protocol(known="digits", near=("digits-8-9",), far=("photos",)),
}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where to look.

    Args:
        folder: of --data.
        given: SOURCEs of --source by name.
        download: whether torchvision may fetch what is missing.
    """

    folder: Path | None = None
    given: Mapping[str, str] | None = None
    download: bool = False

    def __post_init__(self) -> None:
        for name in self.given or {}:
            if name not in SETS:
                raise UsageError(
                    f"--source names {name!r}, which is no set", remedy=f"The sets: {listed(SETS)}"
                )
        if self.folder is not None and not self.folder.is_dir():
            raise UsageError(f"--data {self.folder} is no folder", remedy="Check the path")

    def find(self, name: str) -> Found | str:
        """The set, or a line on why it is not there and what was looked for."""
        wanted = SETS[name]
        if self.given and name in self.given:
            return Found(source=self.given[name], portable=self.given[name])
        if wanted.fixed:
            return Found(source=wanted.fixed, portable=wanted.fixed)
        for file in wanted.files if self.folder is not None else ():
            place, mark, split = file.partition("#")
            path = Path(self.folder or "", place)
            if path.exists():
                return Found(source=f"{path.resolve()}{mark}{split}", portable=file)
        if self.download and wanted.torchvision:
            dataset, mark, split = wanted.torchvision.partition("#")
            root = f"@{self.folder.resolve()}" if self.folder else ""
            source = f"torchvision:{dataset}{root}{mark}{split}"
            return Found(source=source, portable=f"torchvision:{wanted.torchvision}")
        return self._missing(name, wanted)

    def _missing(self, name: str, wanted: ImageSet) -> str:
        names = [file.partition("#")[0] for file in wanted.files]
        where = f"no {' or '.join(names)} in {self.folder}" if self.folder else "no --data DIR"
        fetch = " or --download" if wanted.torchvision and not self.download else ""
        return f"{wanted.title} not found: {where}; give --source {name}=SOURCE{fetch}"

    def find_all(self, names: Sequence[str]) -> tuple[dict[str, Found], list[str]]:
        """Those that are there by name, and a line for each that is not."""
        looked = {name: self.find(name) for name in names}
        found = {name: place for name, place in looked.items() if isinstance(place, Found)}
        return found, [place for place in looked.values() if isinstance(place, str)]


def listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(names)
