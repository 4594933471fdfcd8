"""The two packages: which are installed, which fits which GPU, and what to install.

``tensorrt`` runs on every NVIDIA GPU from Turing on and builds for the GPU at hand.
``tensorrt_rtx`` is for RTX GPUs, and builds for any of them on a machine without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from typing import Literal

from moon.errors import DISTRIBUTION

__all__ = ["PACKAGES", "RTX_TARGETS", "Name", "Package", "fitting", "installed", "which_fits"]

Name = Literal["tensorrt", "tensorrt_rtx"]

# Compute capabilities that TensorRT-RTX 1.7 builds for; its ComputeCapability lists them.
RTX_TARGETS = frozenset({75, 80, 86, 89, 120, 121})
_OLDEST = 75
# Boards on which people look for the wrong package.
_KNOWN = {
    87: "Jetson Orin",
    90: "H100 or H200",
    100: "B200",
    101: "Jetson Thor",
    103: "B300",
    110: "Jetson Thor",
}


@dataclass(frozen=True)
class Package:
    """One of the two.

    Attributes:
        name: of the module and of moon's backend.
        title: as people know it.
        extra: that brings it.
        oldest: first version whose calls moon makes.
        distributions: that hold it: pip's, or the one a Jetson comes with.
    """

    name: Name
    title: str
    extra: str
    oldest: tuple[int, ...]
    distributions: tuple[str, ...]

    @property
    def install(self) -> str:
        """What to type to get it."""
        return f"pip install '{DISTRIBUTION}[{self.extra}]'"


PACKAGES: dict[Name, Package] = {
    "tensorrt_rtx": Package(
        "tensorrt_rtx",
        "TensorRT-RTX",
        "trt-rtx",
        (1, 1),
        ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    ),
    "tensorrt": Package(
        "tensorrt",
        "TensorRT",
        "trt",
        (10, 3),
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
    ),
}


def installed(name: Name) -> str | None:
    """Version of an installed package, None where it is not; nothing is imported.

    A module without a distribution, as some images for Jetsons have it, gives "".
    """
    # Type stubs alone make a folder of the same name that holds nothing to import.
    spec = PathFinder.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    for distribution in PACKAGES[name].distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def fitting(sm: int) -> tuple[Name, ...]:
    """The packages that run on a GPU of this compute capability, the likelier one first.

    Args:
        sm: such as 86, or 120.
    """
    if sm in RTX_TARGETS:
        return ("tensorrt_rtx", "tensorrt")
    return ("tensorrt",) if sm >= _OLDEST else ()


def which_fits(targets: Sequence[int]) -> str:
    """One sentence without a full stop: what to install for these GPUs."""
    lines = []
    for sm in targets:
        board = f"sm_{sm} ({_KNOWN[sm]})" if sm in _KNOWN else f"sm_{sm}"
        names = fitting(sm)
        if not names:
            lines.append(f"{board} is older than TensorRT 10 supports")
        else:
            ways = " or ".join(f"{PACKAGES[one].title}: {PACKAGES[one].install}" for one in names)
            lines.append(f"{board} needs {ways}")
    return "; ".join(lines)
