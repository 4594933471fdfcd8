"""Stand-ins for a GPU and an execution context. Nothing here runs on a GPU.

They keep to what CUDA and TensorRT promise, and to no more: work put into a stream is done only
when somebody waits for it, memory on the device is apart from the host's, what is captured is not
run, and a graph holds the addresses and shapes it was captured with. So a copy that is forgotten,
comes too late, or is read before it is waited for gives wrong numbers here as it would there. What
an engine computes is computed by ONNX Runtime from the bytes in "device" memory.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moon.runtime.onnxruntime import OnnxRuntime
from moon.runtime.trt.api import Validity
from moon.runtime.trt.cuda import OUT_OF_MEMORY, CudaError
from moon.runtime.trt.log import Log
from moon.runtime.trt.package import PACKAGES

trt = pytest.importorskip("tensorrt_rtx", reason="its types and enumerations are used")

Work = Callable[[], None]


class StandInDevice:
    """Memory, streams, events and graphs of no GPU; the methods of ``Device``."""

    def __init__(self, memory: int = 1 << 30) -> None:
        self._lock = threading.RLock()
        self._ids = itertools.count(1000)
        self._left = memory
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.pins: set[int] = set()
        self.queues: dict[int, list[Work]] = {}
        self.captures: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, float | None] = {}
        self.log: list[str] = []
        self.clock = 0.0
        self.closed = False
        self.fail_next = ""
        self.no_capture = False
        self._inside = threading.local()

    # What the tests look at.
    @property
    def leaks(self) -> dict[str, int]:
        held = {"memory": self.memory, "pins": self.pins, "streams": self.queues}
        held |= {"graphs": self.graphs, "events": self.events}
        return {name: len(things) for name, things in held.items() if things}

    def __enter__(self) -> None:
        assert not self.closed
        self._inside.depth = getattr(self._inside, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        self._inside.depth -= 1

    def close(self) -> None:
        self.closed = True

    def allocate(self, size: int) -> int:
        self._called("allocate")
        with self._lock:
            if size > self._left:
                raise CudaError("the GPU has too little memory", code=OUT_OF_MEMORY)
            self._left -= size
            address = next(self._ids) << 20
            self.memory[address] = np.full(size, 0xCD, np.uint8)  # never zero by luck
            return address

    def free(self, address: int) -> None:
        with self._lock:
            self._left += len(self.memory.pop(address))

    def pinned(self, size: int) -> NDArray[np.uint8]:
        self._called("pinned")
        memory = np.full(size, 0xAB, np.uint8)
        with self._lock:
            self.pins.add(memory.ctypes.data)
        return memory

    def unpin(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            self.pins.remove(memory.ctypes.data)

    def copy_in(self, address: int, memory: NDArray[np.uint8], size: int, stream: int) -> None:
        assert memory.ctypes.data in self.pins, "only pinned memory is copied asynchronously"

        def work() -> None:
            self.memory[address][:size] = memory[:size]

        self.enqueue(stream, "copy_in", work)

    def copy_out(self, memory: NDArray[np.uint8], address: int, size: int, stream: int) -> None:
        assert memory.ctypes.data in self.pins, "only pinned memory is copied asynchronously"

        def work() -> None:
            memory[:size] = self.memory[address][:size]

        self.enqueue(stream, "copy_out", work)

    def stream(self) -> int:
        with self._lock:
            stream = next(self._ids)
            self.queues[stream] = []
            return stream

    def destroy_stream(self, stream: int) -> None:
        with self._lock:
            del self.queues[stream]

    def wait(self, stream: int) -> None:
        self._called("wait")
        assert stream not in self.captures, "waiting ends a capture"
        with self._lock:
            queue, self.queues[stream] = self.queues[stream], []
        for work in queue:
            work()

    def event(self, *, sleeping: bool = False) -> int:
        with self._lock:
            event = next(self._ids)
            self.events[event] = None
            return event

    def destroy_event(self, event: int) -> None:
        with self._lock:
            del self.events[event]

    def record(self, event: int, stream: int) -> None:
        def work() -> None:
            self.clock += 1.0
            self.events[event] = self.clock

        with self._lock:
            self.events[event] = None
            self.queues[stream].append(work)

    def wait_event(self, event: int) -> None:
        # Whichever stream it was put into: only that much of it would be done there.
        self.log.append("wait_event")
        for stream in list(self.queues):
            if self.events[event] is None:
                self.wait(stream)
        assert self.events[event] is not None

    def elapsed_ms(self, start: int, end: int) -> float:
        first, last = self.events[start], self.events[end]
        assert first is not None and last is not None, "an event that was not reached"
        return last - first

    def begin_capture(self, stream: int) -> None:
        self._called("begin_capture")
        assert not self.queues[stream], "what came before was to be waited for"
        self.captures[stream] = []

    def end_capture(self, stream: int) -> int:
        captured = self.captures.pop(stream)
        if self.no_capture:
            raise CudaError("capturing a CUDA graph failed: CUDA_ERROR_STREAM_CAPTURE", code=900)
        with self._lock:
            graph = next(self._ids)
            self.graphs[graph] = captured
            return graph

    def launch(self, graph: int, stream: int) -> None:
        captured = list(self.graphs[graph])
        self.enqueue(stream, "launch", lambda: [work() for work in captured] and None)

    def destroy_graph(self, graph: int) -> None:
        with self._lock:
            del self.graphs[graph]

    def enqueue(self, stream: int, what: str, work: Work) -> None:
        """Put work into a stream, or into what is being captured of it."""
        self._called(what)
        with self._lock:
            self.captures.get(stream, self.queues[stream]).append(work)

    def _called(self, what: str) -> None:
        assert getattr(self._inside, "depth", 0) > 0, f"{what} without the GPU being current"
        self.log.append(what)
        if self.fail_next == what:
            self.fail_next = ""
            raise CudaError(f"{what} failed: CUDA_ERROR_LAUNCH_FAILED (719)", code=719)


class StandInContext:
    """``IExecutionContext`` of an engine that is an ONNX file; its methods and their results."""

    def __init__(self, device: StandInDevice, engine: StandInEngine) -> None:
        self._device, self._engine = device, engine
        self.addresses: dict[str, int] = {}
        self.dims: tuple[int, ...] = ()
        self.users = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.profile
        if name != self._engine.image or not least <= shape[0] <= most:
            return False
        self.dims = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine.names or memory not in self._device.memory:
            return False
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if set(self.addresses) != set(self._engine.names) or not self.dims:
            return False
        addresses, dims = dict(self.addresses), self.dims

        def work() -> None:
            self.users += 1
            assert self.users == 1, "two threads in one execution context"
            # Whoever changed shapes or addresses after a capture has a graph of the old ones.
            assert addresses == self.addresses and dims == self.dims, "a stale graph"
            self._engine.compute(self._device.memory, addresses, dims)
            self.users -= 1

        self._device.enqueue(stream_handle, "compute", work)
        return True


class StandInEngine:
    """``ICudaEngine`` of an ONNX file, its types and enumerations the real package's."""

    def __init__(
        self,
        device: StandInDevice,
        model: bytes,
        profile: tuple[int, int, int],
        settings: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        self._device, self.profile = device, profile
        self._ort = OnnxRuntime(model)
        self.image = "input"
        session = self._ort._session
        shape = session.get_inputs()[0].shape
        self._shapes = {"input": (-1, *shape[1:])}
        self._types: dict[str, np.dtype[Any]] = {"input": self._ort._dtype}
        for node in session.get_outputs():
            self._shapes[node.name] = (-1, *node.shape[1:])
            kinds = {"tensor(int64)": np.int64, "tensor(bool)": np.bool_}
            self._types[node.name] = np.dtype(kinds.get(node.type, np.float32))
        self._settings = settings or {}
        for name, value in self._settings.items():
            self._shapes[name], self._types[name] = value.shape, value.dtype
        self.names = list(self._shapes)
        self.contexts: list[StandInContext] = []
        self.most_contexts = 99

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = trt.TensorIOMode
        return mode.INPUT if name == "input" or name in self._settings else mode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return trt.TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> Any:
        return trt.Dims(list(self._shapes[name]))

    def get_tensor_dtype(self, name: str) -> Any:
        types = trt.DataType
        known = {"float32": types.FLOAT, "int64": types.INT64, "bool": types.BOOL}
        known |= {"uint8": types.UINT8}
        return known[self._types[name].name]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        rest = list(self._shapes[name][1:])
        return [trt.Dims([rows, *rest]) for rows in self.profile]

    def create_execution_context(self, *_: Any) -> StandInContext | None:
        if len(self.contexts) >= self.most_contexts:
            return None
        self.contexts.append(StandInContext(self._device, self))
        return self.contexts[-1]

    def compute(
        self,
        memory: dict[int, NDArray[np.uint8]],
        addresses: dict[str, int],
        dims: tuple[int, ...],
    ) -> None:
        def there(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
            size = int(np.prod(shape)) * self._types[name].itemsize
            view: NDArray[Any] = memory[addresses[name]][:size].view(self._types[name])
            return view.reshape(shape)

        for name, value in self._settings.items():
            assert there(name, value.shape).tobytes() == value.tobytes(), f"{name} never came"
        found = self._ort.run(there("input", dims).copy())
        for name, value in found.items():
            there(name, value.shape)[...] = value


class StandInApi:
    """An ``Api`` whose runtime gives an engine that stands in for one."""

    def __init__(self, engine: StandInEngine | None, why: str = "") -> None:
        # TensorRT's own enumerations, without those that only TensorRT-RTX has.
        names = ("TensorIOMode", "TensorLocation", "DataType", "nptype")
        self.trt = SimpleNamespace(**{name: getattr(trt, name) for name in names})
        self.name, self.version, self.package = "tensorrt", "11.4.0", PACKAGES["tensorrt"]
        self.title, self.log, self._engine, self._why = "TensorRT 11.4.0", Log(), engine, why

    def runtime(self) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine)

    def check(self, data: bytes, runtime: Any) -> Validity:
        return Validity(ok=not self._why, why=self._why, complete=True)


RECORD = SimpleNamespace(
    file="engines/stand-in.engine",
    precision="fp32",
    sparsity=SimpleNamespace(eligible=("a", "b"), picked=None, why="nobody looked"),
)
