"""The GPUs of this machine, as the CUDA driver names them; no package is needed for that."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

__all__ = ["Gpu", "compute_capability", "first_gpu", "gpus"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")


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
    driver = _driver()
    if driver is None or driver.cuInit(0) != 0:
        return ()
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = (_gpu(driver, index) for index in range(count.value))
    return tuple(gpu for gpu in found if gpu is not None)


def first_gpu() -> Gpu | None:
    """The GPU that CUDA takes unless told otherwise, or None."""
    return next(iter(gpus()), None)


def compute_capability(text: str) -> int | None:
    """``sm_86``, ``sm86``, ``8.6`` or ``86`` as 86; None where it is no such thing."""
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    return int(found[1] + found[2]) if found else None


def _driver() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu | None:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return None
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        parts.append(value.value)
    if driver.cuDeviceGetName(name, len(name), device) != 0:
        return None
    return Gpu(name.value.decode(errors="replace"), 10 * parts[0] + parts[1])
