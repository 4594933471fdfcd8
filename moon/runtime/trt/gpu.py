"""The GPUs of this machine, as the CUDA driver names them; no package is needed for that."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moon.errors import BackendError
from moon.runtime.trt.cuda import Driver

__all__ = ["Gpu", "compute_capability", "first_gpu", "gpus"]


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as the driver spells it, such as ``NVIDIA GeForce RTX 3060``.
        sm: compute capability, major and minor in one number: 86, 120.
    """

    name: str
    sm: int

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.sm})"


def gpus() -> tuple[Gpu, ...]:
    """Every GPU that the driver shows to this process; none without a driver."""
    try:
        driver = Driver.load()
        found = [driver.facts(ordinal) for ordinal in range(driver.devices)]
    except BackendError:
        return ()
    return tuple(Gpu(facts.name, facts.sm) for facts in found)


def first_gpu() -> Gpu | None:
    """The GPU that CUDA takes unless told otherwise, or None."""
    return next(iter(gpus()), None)


def compute_capability(text: str) -> int | None:
    """``sm_86``, ``sm86``, ``8.6`` or ``86`` as 86; None where it is no such thing."""
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    return int(found[1] + found[2]) if found else None
