"""A lane: one execution context, with a stream, buffers and a CUDA graph of its own.

Rows are copied into pinned memory, from there to the GPU, computed, and copied back, all on the
lane's stream, and waited for once. A lane serves one thread at a time.

A graph is captured of the computation alone, as TensorRT asks: on a stream that is not the default
one, after the same shapes were run once and waited for, and dropped when shapes or addresses
change, since both are fixed in it. Whatever cannot be captured runs as it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.trt.device import Device
from moon.runtime.trt.execution import Execution
from moon.runtime.trt.tensor import Ports, Tensor

__all__ = ["Lane", "Timings"]


@dataclass(frozen=True)
class Timings:
    """Milliseconds on the GPU's own clock.

    Attributes:
        host_to_device_ms: copying the images in.
        compute_ms: the engine.
        device_to_host_ms: copying the results out.
    """

    host_to_device_ms: float
    compute_ms: float
    device_to_host_ms: float

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            self.host_to_device_ms + other.host_to_device_ms,
            self.compute_ms + other.compute_ms,
            self.device_to_host_ms + other.device_to_host_ms,
        )


class Lane:
    """Runs batches that fit the engine's profile. Not safe for two threads at once.

    Args:
        device: the GPU.
        execution: the context.
        ports: what goes into the engine and comes out of it.
        settings: values of the inputs that are no images, by name.
        wanted: names of the outputs to return; every output needs memory, wanted or not.
        graphs: capture CUDA graphs; False where the package does so by itself, or nobody should.
        sleeping: sleep while waiting, and leave the core to others; else as the driver sees fit.

    Attributes:
        rows: how many rows it last ran, 0 at first.
        no_graph: why no graph could be captured, "" where none was refused.
    """

    def __init__(
        self,
        device: Device,
        execution: Execution,
        ports: Ports,
        settings: Mapping[str, NDArray[Any]],
        wanted: Collection[str],
        *,
        graphs: bool = True,
        sleeping: bool = False,
    ) -> None:
        self._device, self._execution, self._profile = device, execution, ports.profile
        self._image, self._outputs, self._wanted = ports.image, ports.outputs, frozenset(wanted)
        self._graphs, self._sleeping = graphs, sleeping
        self.rows = 0
        self.no_graph = ""
        self._capacity = 0
        self._addresses: dict[str, int] = {}
        self._pinned: dict[str, NDArray[np.uint8]] = {}
        self._settings: list[int] = []
        self._graph: int | None = None
        self._warm = False
        self._events: list[int] = []
        self._done: int | None = None
        self._stream: int | None = None
        with device:
            self._stream = device.stream()
        try:
            with device:
                for tensor in ports.settings:
                    self._set(tensor, settings[tensor.name])
        except BaseException:
            self.close()
            raise

    def run(self, rows_N: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The wanted outputs for a batch, [N, ...], N from 1 to the profile's most.

        Raises:
            BackendError: the GPU or TensorRT failed.
        """
        return self._run(rows_N, lambda mark: None)

    def timed(self, rows_N: NDArray[Any]) -> tuple[dict[str, NDArray[Any]], Timings]:
        """As :meth:`run`, and how long each part took on the GPU."""
        with self._device:
            while len(self._events) < 4:
                self._events.append(self._device.event())
        marks, stream = self._events, self._on
        found = self._run(rows_N, lambda mark: self._device.record(marks[mark], stream))
        with self._device:
            spans = [self._device.elapsed_ms(marks[i], marks[i + 1]) for i in range(3)]
        return found, Timings(*spans)

    def close(self) -> None:
        """Free everything, once; what is under way is waited for."""
        if self._stream is None:
            return
        with self._device:
            with suppress(BackendError):  # it may be what failed
                self._device.wait(self._stream)
            self._forget_graph()
            self._execution.close()
            self._release()
            for address in self._settings:
                self._freed(self._device.free, address)
            for event in [*self._events, *([] if self._done is None else [self._done])]:
                self._freed(self._device.destroy_event, event)
            self._freed(self._device.destroy_stream, self._stream)
        self._stream, self._events, self._done = None, [], None

    def _run(self, rows_N: NDArray[Any], mark: Callable[[int], None]) -> dict[str, NDArray[Any]]:
        device, stream, image = self._device, self._on, self._image
        with device:
            total = self._profile.padded(len(rows_N))
            self._fit(total)
            if self._graph is None and self._graphs and self._warm:
                self._graph = self._captured()
            self._profile.fill(self._rows(image), rows_N)
            size = total * image.bytes
            mark(0)
            device.copy_in(self._addresses[image.name], self._pinned[image.name], size, stream)
            mark(1)
            self._compute()
            mark(2)
            wanted = [one for one in self._outputs if one.name in self._wanted]
            for one in wanted:
                size = total * one.bytes
                device.copy_out(self._pinned[one.name], self._addresses[one.name], size, stream)
            mark(3)
            self._wait()
        # The pinned memory is the next batch's.
        return {one.name: self._rows(one)[: len(rows_N)].copy() for one in wanted}

    def _set(self, tensor: Tensor, value: NDArray[Any]) -> None:
        """Put the value of an input that stays the same on the GPU."""
        data = np.ascontiguousarray(value, tensor.dtype)
        address = self._device.allocate(data.nbytes)
        self._settings.append(address)
        self._execution.address(tensor.name, address)
        memory = self._device.pinned(data.nbytes)
        try:
            memory[:] = np.frombuffer(data.tobytes(), np.uint8)
            self._device.copy_in(address, memory, data.nbytes, self._on)
            self._device.wait(self._on)
        finally:
            self._device.unpin(memory)

    @property
    def _on(self) -> int:
        if self._stream is None:
            raise BackendError("the engine was closed", remedy="Open the model again")
        return self._stream

    def _rows(self, tensor: Tensor) -> NDArray[Any]:
        """Pinned memory as rows, [capacity, ...]."""
        view: NDArray[Any] = self._pinned[tensor.name].view(tensor.dtype)
        return view.reshape(self._capacity, *tensor.row)

    def _fit(self, rows: int) -> None:
        """Memory and shapes for so many rows."""
        if rows > self._capacity:
            self._grow(min(self._profile.most, max(rows, 2 * self._capacity)))
        if rows != self.rows:
            self._forget_graph()
            self.rows = 0
            self._execution.shape(self._image.name, (rows, *self._image.row))
            self.rows = rows

    def _grow(self, capacity: int) -> None:
        self._forget_graph()
        self._release()
        for tensor in (self._image, *self._outputs):
            size = capacity * tensor.bytes
            self._addresses[tensor.name] = self._device.allocate(size)
            if tensor is self._image or tensor.name in self._wanted:
                self._pinned[tensor.name] = self._device.pinned(size)
            self._execution.address(tensor.name, self._addresses[tensor.name])
        self._capacity = capacity

    def _compute(self) -> None:
        if self._graph is None:
            self._execution.enqueue(self._on)
        else:
            self._device.launch(self._graph, self._on)
        self._warm = True

    def _captured(self) -> int | None:
        """A graph of the computation, None where that cannot be."""
        failed = None
        self._device.begin_capture(self._on)
        try:
            self._execution.enqueue(self._on)
        except BackendError as error:
            failed = error
        try:
            graph = self._device.end_capture(self._on)
        except BackendError as error:
            failed = failed or error
        if failed is None:
            return graph
        self._graphs, self.no_graph = False, failed.cause
        return None

    def _wait(self) -> None:
        if not self._sleeping:
            self._device.wait(self._on)
            return
        if self._done is None:
            self._done = self._device.event(sleeping=True)
        self._device.record(self._done, self._on)
        self._device.wait_event(self._done)

    def _forget_graph(self) -> None:
        graph, self._graph, self._warm = self._graph, None, False
        if graph is not None:
            self._freed(self._device.destroy_graph, graph)

    def _release(self) -> None:
        addresses, self._addresses = self._addresses, {}
        pinned, self._pinned = self._pinned, {}
        self._capacity = 0
        for address in addresses.values():
            self._freed(self._device.free, address)
        for memory in pinned.values():
            self._freed(self._device.unpin, memory)

    def _freed(self, free: Callable[[Any], None], what: Any) -> None:
        # After an error that stays, every call fails, and the memory is gone with the context.
        with suppress(BackendError):
            free(what)
