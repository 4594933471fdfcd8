"""What engine is asked for, and which package can build it here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moon.errors import BackendError, MissingExtraError, UsageError
from moon.runtime.trt.gpu import Gpu, compute_capability, first_gpu
from moon.runtime.trt.package import PACKAGES, RTX_TARGETS, Name, fitting, installed, which_fits
from moon.runtime.trt.sidecar import Profile

__all__ = [
    "Choice",
    "EngineRequest",
    "Precision",
    "choose",
    "read_profile",
    "read_targets",
    "wanted",
]

Precision = Literal["fp16", "fp32", "int8"]
_PROFILE = Profile(min=1, opt=1, max=32)


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """An engine to build.

    Args:
        targets: compute capabilities, as 86; empty for the GPU at hand.
        package: ``tensorrt`` or ``tensorrt_rtx``; None for the one that fits and is installed.
        precision: of the layers; the last one and the score head are always fp32. An int8 bundle
            has int8 engines whatever is asked for.
        profile: numbers of images together: least, what it is to be fastest for, most.
        compress: store the engine with zstd.

    Raises:
        UsageError: a value is not one of these, or the profile leaves out single images.
    """

    targets: tuple[int, ...] = ()
    package: Name | None = None
    precision: Precision = "fp16"
    profile: Profile = _PROFILE
    compress: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets))))
        for what, value, known in (
            ("precision", self.precision, get_args(Precision)),
            ("package", self.package, (None, *PACKAGES)),
        ):
            if value not in known:
                names = " or ".join(str(one) for one in known if one)
                raise UsageError(f"the engine's {what} must be {names}, not {value!r}")
        if not 1 <= self.profile.min <= self.profile.opt <= self.profile.max:
            raise UsageError(
                f"the batches {self.profile} do not rise from 1", remedy="Write them as 1,8,32"
            )
        if self.profile.min > 1:
            raise UsageError(
                f"the batches {self.profile} leave out a single image, which moon predict, "
                "verify and serve run",
                remedy=f"Begin with 1: 1,{self.profile.opt},{self.profile.max}",
            )


@dataclass(frozen=True)
class Choice:
    """Who builds, and for what.

    Attributes:
        package: that is installed and fits.
        targets: compute capabilities.
        gpu: the GPU it builds on, None where it builds without one.
    """

    package: Name
    targets: tuple[int, ...]
    gpu: Gpu | None


def choose(request: EngineRequest) -> Choice:
    """The package that builds what is asked for on this machine.

    Raises:
        UsageError: no GPU is named and none is here, or no one package serves all that are.
        MissingExtraError, BackendError: what would fit is not installed, or needs the GPU itself.
    """
    here = first_gpu()
    targets = request.targets
    if not targets:
        if here is None:
            raise UsageError(
                "there is no GPU here to build an engine for",
                remedy="Name it with --trt-target, as in --trt-target sm_86",
            )
        targets = (here.sm,)
    names = [request.package] if request.package else _serving(targets)
    if names == ["tensorrt"] and len(targets) > 1:
        raise UsageError(
            f"TensorRT builds for one GPU at a time, and asked for are {_spelled(targets)}",
            remedy="Run moon export BUNDLE --trt on each machine",
        )
    for name in names:
        _check_fits(name, targets)
    have = [name for name in names if installed(name) is not None]
    can = [name for name in have if name == "tensorrt_rtx" or _at_hand(targets, here)]
    if can:
        return Choice(can[0], targets, here)
    if have:
        raise _elsewhere(targets, here)
    if request.package is None:
        raise BackendError(
            "no package that builds TensorRT engines for this GPU is installed",
            remedy=which_fits(targets),
        )
    package = PACKAGES[request.package]
    raise MissingExtraError(package.name, package.extra, f"an engine of {package.title}")


def wanted(trt: EngineRequest | bool) -> EngineRequest | None:
    """The request itself, the default one for True, None for False."""
    return (EngineRequest() if trt else None) if isinstance(trt, bool) else trt


def read_targets(texts: list[str]) -> tuple[int, ...]:
    """``sm_86`` or ``8.6``, several with commas or spaces, as numbers.

    Raises:
        UsageError: a word is no compute capability.
    """
    found = []
    for word in " ".join(texts).replace(",", " ").split():
        sm = compute_capability(word)
        if sm is None:
            raise UsageError(
                f"--trt-target {word!r} is no compute capability",
                remedy="Write it as sm_86 or 8.6; NVIDIA lists them at "
                "developer.nvidia.com/cuda-gpus",
            )
        found.append(sm)
    return tuple(found)


def read_profile(text: str) -> Profile:
    """``1,8,32`` as a profile; one number N is 1,N,N.

    Raises:
        UsageError: it is not one or three whole numbers.
    """
    try:
        sizes = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        sizes = []
    if len(sizes) == 1:
        sizes = [1, *sizes * 2]
    if len(sizes) != 3:
        raise UsageError(
            f"--trt-batch {text!r} is not MIN,OPT,MAX", remedy="Write three numbers, as 1,8,32"
        )
    return Profile(min=sizes[0], opt=sizes[1], max=sizes[2])


def _serving(targets: tuple[int, ...]) -> list[Name]:
    """The packages that serve all of the GPUs."""
    sets = [fitting(sm) for sm in targets]
    names = [name for name in PACKAGES if all(name in one for one in sets)]
    if not names:
        raise UsageError(
            f"no version of TensorRT builds for {_spelled(targets)}", remedy=which_fits(targets)
        )
    return names


def _check_fits(name: Name, targets: tuple[int, ...]) -> None:
    outside = [sm for sm in targets if name not in fitting(sm)]
    if outside:
        known = ", ".join(f"sm_{sm}" for sm in sorted(RTX_TARGETS))
        only = f", which builds for {known}" if name == "tensorrt_rtx" else ""
        raise UsageError(
            f"{_spelled(outside)} is no GPU of {PACKAGES[name].title}{only}",
            remedy=which_fits(outside),
        )


def _at_hand(targets: tuple[int, ...], here: Gpu | None) -> bool:
    return here is not None and targets == (here.sm,)


def _elsewhere(targets: tuple[int, ...], here: Gpu | None) -> BackendError:
    what = "and there is none here" if here is None else f"which is {here}"
    rtx = all(sm in RTX_TARGETS for sm in targets)
    other = f", or install {PACKAGES['tensorrt_rtx'].install}, which needs no GPU" if rtx else ""
    return BackendError(
        f"TensorRT builds for the GPU at hand alone, {what}; asked for is {_spelled(targets)}",
        remedy=f"Copy the bundle to that machine and run moon export BUNDLE --trt there{other}",
    )


def _spelled(targets: tuple[int, ...] | list[int]) -> str:
    return ", ".join(f"sm_{sm}" for sm in targets)
