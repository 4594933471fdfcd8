"""One GPU: memory, streams, events and captured graphs."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_float, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.trt.cuda import MORE_MEMORY, OUT_OF_MEMORY, CudaError, Driver

__all__ = ["Device"]

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the legacy default stream is not waited for
_BLOCKING_SYNC = 1  # CU_EVENT_BLOCKING_SYNC
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile


class Device:
    """One GPU: memory, streams, events and captured graphs, as integers that stand for them.

    Use it within ``with device:``, which makes it the calling thread's own; any number of threads
    may. Nothing is freed by itself: who makes, frees.

    Args:
        driver: of this machine.
        ordinal: which GPU.

    Raises:
        CudaError: it cannot be used, such as for want of memory.
    """

    def __init__(self, driver: Driver, ordinal: int = 0) -> None:
        self._call = driver.call
        self._device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(self._device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device, what="using the GPU")
        self._context: c_void_p | None = context
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the GPU, once; what was made on it must have been freed."""
        with self._lock:
            held, self._context = self._context, None
        if held is not None:
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def __enter__(self) -> None:
        if self._context is None:
            raise BackendError("the GPU was let go of", remedy="Open the model again")
        self._call("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *_: object) -> None:
        self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def allocate(self, size: int) -> int:
        """Memory on the GPU, in bytes; its address."""
        found = c_uint64()
        try:
            self._call("cuMemAlloc_v2", byref(found), size)
        except CudaError as error:
            if not error.out_of_memory:
                raise
            raise self._too_little(size) from error
        return found.value

    def free_memory(self) -> int:
        """Bytes that are free on the GPU, whoever uses the rest."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def _too_little(self, size: int) -> CudaError:
        return CudaError(
            f"the GPU has too little memory: {size >> 20:,} MiB more were wanted, and "
            f"{self.free_memory() >> 20:,} MiB are free",
            code=OUT_OF_MEMORY,
            remedy=MORE_MEMORY,
        )

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Host memory, [size], that the GPU copies from and to by itself. See :meth:`unpin`."""
        found = c_void_p()
        what = f"pinning {size >> 20:,} MiB of host memory"
        self._call("cuMemHostAlloc", byref(found), size, 0, what=what)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(found.value or 0))

    def unpin(self, memory: NDArray[np.uint8]) -> None:
        """Free what :meth:`pinned` gave; nothing may look at it any more."""
        self._call("cuMemFreeHost", memory.ctypes.data)

    def copy_in(self, address: int, memory: NDArray[np.uint8], size: int, stream: int) -> None:
        """Enqueue the copy of the first ``size`` bytes of pinned memory to the GPU."""
        self._call(
            "cuMemcpyHtoDAsync_v2", address, memory.ctypes.data, size, stream, what="copying in"
        )

    def copy_out(self, memory: NDArray[np.uint8], address: int, size: int, stream: int) -> None:
        """Enqueue the copy of ``size`` bytes from the GPU to pinned memory."""
        self._call(
            "cuMemcpyDtoHAsync_v2", memory.ctypes.data, address, size, stream, what="copying out"
        )

    def stream(self) -> int:
        """A queue of work, run in order and apart from all others."""
        return self._made("cuStreamCreate", _NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def wait(self, stream: int) -> None:
        """Until all that was enqueued is done.

        Raises:
            CudaError: some of it failed, whenever that was.
        """
        self._call("cuStreamSynchronize", stream, what="the inference")

    def event(self, *, sleeping: bool = False) -> int:
        """A mark to put into a stream; ``sleeping`` lets who waits for it sleep, not spin."""
        return self._made("cuEventCreate", _BLOCKING_SYNC if sleeping else 0)

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", event)

    def record(self, event: int, stream: int) -> None:
        """Enqueue the mark."""
        self._call("cuEventRecord", event, stream)

    def wait_event(self, event: int) -> None:
        """Until the mark is reached; raises as :meth:`wait`."""
        self._call("cuEventSynchronize", event, what="the inference")

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two marks that were reached."""
        found = c_float()
        self._call("cuEventElapsedTime", byref(found), start, end)
        return found.value

    def begin_capture(self, stream: int) -> None:
        """From here on what is enqueued is not run but noted down."""
        self._call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL, what="capturing a CUDA graph")

    def end_capture(self, stream: int) -> int:
        """What was noted down, as one graph that can be launched.

        Raises:
            CudaError: something was enqueued that cannot be captured. The stream is as before.
        """
        graph = c_void_p()
        what = "capturing a CUDA graph"
        self._call("cuStreamEndCapture", stream, byref(graph), what=what)
        try:
            return self._made("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue all of a graph."""
        self._call("cuGraphLaunch", graph, stream, what="launching a CUDA graph")

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def _made(self, function: str, *arguments: Any) -> int:
        found = c_void_p()
        self._call(function, byref(found), *arguments)
        return found.value or 0
