"""Whether a package can run engines on this machine, and what to install otherwise."""

from __future__ import annotations

from moon.errors import BackendError
from moon.runtime.backend import Availability
from moon.runtime.trt.cuda import Driver, GpuFacts
from moon.runtime.trt.package import PACKAGES, Name, fitting, installed, which_fits

__all__ = ["available"]


def available(name: Name) -> Availability:
    """Package, driver and GPU, in that order; the package is looked for, not imported.

    Args:
        name: of the package.
    """
    package, version = PACKAGES[name], installed(name)
    gpu, reason = _gpu()
    if gpu is not None and name not in fitting(gpu.sm):
        return Availability(
            False, f"{package.title} does not run on {gpu.name}; {which_fits([gpu.sm])}"
        )
    if version is None:
        # Without a GPU it would not help to have the package.
        missing = f"the package {name} is not installed"
        if gpu is None:
            return Availability(False, f"{missing}, and {reason}")
        return Availability(
            False, f"{missing}; it would fit {gpu.name} (sm_{gpu.sm})", package.install
        )
    title = f"{package.title} {version}".rstrip()
    if gpu is None:
        return Availability(False, f"{title} is installed, and {reason}")
    return Availability(True, f"{title} on {gpu.name} (sm_{gpu.sm})")


def _gpu() -> tuple[GpuFacts | None, str]:
    try:
        return Driver.load().facts(), ""
    except BackendError as error:
        return None, error.cause
