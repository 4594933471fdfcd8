"""The few calls of the CUDA driver that running an engine takes, through ctypes.

The driver's own library, libcuda, rather than the CUDA runtime or a package that wraps it: it is
there wherever a GPU can be used at all, JetPack included, where neither libcudart need be on
the path nor cuda-python be installed; nothing has to match the toolkit that TensorRT was built
with; and its symbols carry their version in their name, so that these are the same functions in
every driver since CUDA 11.4. Handles of streams are those of the runtime, and the primary context,
used here, is the one that TensorRT's own copy of the runtime works in.

What a call is for, what came and what to do are in the message of every error. Calls release the
interpreter's lock while they are under way.
"""

from __future__ import annotations

import ctypes
import re
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moon.errors import BackendError

__all__ = ["MORE_MEMORY", "OUT_OF_MEMORY", "CudaError", "Driver", "GpuFacts"]

# Where libcuda is when the loader does not know: JetPack 5 and 6, and Linux within Windows.
_LIBRARIES = (
    ("nvcuda.dll",)
    if sys.platform == "win32"
    else (
        "libcuda.so.1",
        "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",
        "/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
        "/usr/lib/wsl/lib/libcuda.so.1",
    )
)
_NO_DRIVER = (
    "Run on a machine with an NVIDIA GPU and its driver (in a container: with --gpus all), "
    "or use --backend onnxruntime"
)
MORE_MEMORY = "Use a smaller batch, or end what else uses the GPU"
_AGAIN = "Start the process again; if it comes back, report it with the model"
_REMEDIES = {
    2: MORE_MEMORY,
    3: "A process that was forked after CUDA was started cannot use it: start processes by spawn",
    34: "The library found is the toolkit's stub: take it off the library path",
    46: "Another process has the GPU to itself (compute mode exclusive): end it, or change that",
    100: _NO_DRIVER,
    101: "Check CUDA_VISIBLE_DEVICES",
    700: _AGAIN,
    719: _AGAIN,
    803: "Kernel module and libcuda are of two driver versions: restart the machine",
    804: "Install a newer NVIDIA driver: this GPU allows no forward compatibility",
    999: "Check that nvidia-smi works; restart the machine if it does not",
}
OUT_OF_MEMORY = 2
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_RELEASE_FILE = Path("/proc/driver/nvidia/version")

_HANDLE, _ADDRESS = POINTER(c_void_p), POINTER(c_uint64)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_HANDLE,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (_ADDRESS, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (_HANDLE, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}


class CudaError(BackendError):
    """A call of the driver that failed.

    Attributes:
        code: the driver's number for it, such as 2.
    """

    def __init__(self, cause: str, *, code: int, remedy: str = "") -> None:
        super().__init__(cause, remedy=remedy)
        self.code = code

    @property
    def out_of_memory(self) -> bool:
        return self.code == OUT_OF_MEMORY


@dataclass(frozen=True)
class GpuFacts:
    """What a GPU is.

    Attributes:
        name: as its maker says, such as ``NVIDIA RTX A4000``.
        compute_capability: major and minor, such as (8, 6).
        memory: in bytes.
        integrated: it shares the host's memory, as on a Jetson.
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int
    integrated: bool

    @property
    def sm(self) -> int:
        """The compute capability as one number: 86, 120."""
        return 10 * self.compute_capability[0] + self.compute_capability[1]


class Driver:
    """The CUDA driver. Make one with :meth:`load`.

    Args:
        library: libcuda as ctypes loads it.

    Raises:
        CudaError: it finds no GPU, or cannot start.
        BackendError: it is too old to have what is needed.
    """

    def __init__(self, library: Any) -> None:
        for name, arguments in _PROTOTYPES.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise BackendError(
                    f"the NVIDIA driver lacks {name}", remedy="Install one for CUDA 12 or later"
                ) from error
            function.argtypes, function.restype = arguments, c_int
        self._library = library
        self.call("cuInit", 0, what="starting CUDA")

    @classmethod
    def load(cls) -> Driver:
        """The driver of this machine; the same one each time.

        Raises:
            BackendError: there is none, it finds no GPU, or is too old.
        """
        return _loaded()

    @property
    def cuda_version(self) -> tuple[int, int]:
        """The newest CUDA that it serves, such as (13, 0)."""
        found = c_int()
        self.call("cuDriverGetVersion", byref(found))
        return found.value // 1000, found.value % 1000 // 10

    @property
    def release(self) -> str:
        """The driver's own version, such as ``580.65.06``; "" where the kernel does not tell."""
        try:
            text = _RELEASE_FILE.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        found = re.search(r"\b\d{3,}(\.\d+)+\b", text)
        return found.group() if found else ""

    @property
    def devices(self) -> int:
        """How many GPUs this process may use."""
        found = c_int()
        self.call("cuDeviceGetCount", byref(found))
        return found.value

    def facts(self, ordinal: int = 0) -> GpuFacts:
        """What GPU number ``ordinal`` is."""
        device, name, memory = c_int(), ctypes.create_string_buffer(256), c_size_t()
        self.call("cuDeviceGet", byref(device), ordinal)
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", byref(memory), device)
        major, minor, integrated = (
            self._attribute(which, device) for which in (_MAJOR, _MINOR, _INTEGRATED)
        )
        return GpuFacts(
            name.value.decode(errors="replace"), (major, minor), memory.value, bool(integrated)
        )

    def _attribute(self, which: int, device: c_int) -> int:
        found = c_int()
        self.call("cuDeviceGetAttribute", byref(found), which, device)
        return found.value

    def call(self, name: str, *arguments: Any, what: str = "") -> None:
        """Call a function of the driver.

        Raises:
            CudaError: it returned anything but success.
        """
        code: int = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(
                f"{what or name} failed: {self._text('cuGetErrorName', code)} ({code}), "
                f"{self._text('cuGetErrorString', code)}",
                code=code,
                remedy=_REMEDIES.get(code, ""),
            )

    def _text(self, function: str, code: int) -> str:
        found = c_char_p()
        getattr(self._library, function)(code, byref(found))
        return (found.value or b"an error unknown to the driver").decode(errors="replace")


@cache
def _loaded() -> Driver:
    reasons = []
    for name in _LIBRARIES:
        try:
            # Global, so that TensorRT finds the one that is loaded wherever it lay.
            return Driver(ctypes.CDLL(name, mode=getattr(ctypes, "RTLD_GLOBAL", 0)))
        except OSError as error:
            reasons.append(str(error))
    raise BackendError(
        f"there is no NVIDIA driver here ({reasons[0].partition(':')[0]} cannot be loaded)",
        remedy=_NO_DRIVER,
    )
