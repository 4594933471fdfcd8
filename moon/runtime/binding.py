"""Inputs and outputs of ONNX Runtime that keep their place in a device's memory.

A plain run takes device memory for every input anew. Bound, a batch is copied into the tensor
that the last batch of its size was in. A CUDA graph needs more: it replays what was captured,
at the addresses of then, so its outputs keep their place too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.ending import UNDER_WAY

__all__ = ["Binding"]

# Sizes of batches that are kept for each thread; a service sees few.
_KEPT = 8
_CAPTURES = ("enable_cuda_graph", "trt_cuda_graph_enable")
_NO_GRAPH = "-1"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class _Place:
    """What batches of one shape are bound to."""

    binding: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    run_options: Any


class Binding:
    """Runs a session with its tensors bound. Safe to use from several threads at once.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        device: where its provider's tensors lie, as ONNX Runtime calls it: ``cuda``, or ``cpu``.
        options: of the provider: ``device_id``, and whether CUDA graphs are captured.

    Raises:
        BackendError: the device's number is not one.
    """

    def __init__(self, session: Any, device: str, options: Mapping[str, str]) -> None:
        number = options.get("device_id", "0")
        if not number.isdecimal():
            raise BackendError(f"device_id={number} is no number", remedy="Write device_id=0")
        self._session, self._device, self._number = session, device, int(number)
        self.captures = any(options.get(key, "0").lower() in ("1", "true") for key in _CAPTURES)
        self._outputs = {one.name: one for one in session.get_outputs()}
        # ONNX Runtime keeps the captured graphs of each thread apart, so these are, too.
        self._own = threading.local()
        self._one_at_a_time = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output, on the host.

        Raises:
            BackendError: ONNX Runtime fails.
        """
        try:
            # A device runs one batch after the other in any case.
            with UNDER_WAY, self._one_at_a_time:
                place = self._place(feeds)
                for name, value in feeds.items():
                    place.inputs[name].update_inplace(np.ascontiguousarray(value))
                self._session.run_with_iobinding(place.binding, place.run_options)
                if place.outputs:
                    place.binding.synchronize_outputs()
                    return {name: np.array(v.numpy()) for name, v in place.outputs.items()}
                values = place.binding.copy_outputs_to_cpu()
                return dict(zip(self._outputs, values, strict=True))
        except Exception as error:  # its exceptions share no base class but Exception
            raise BackendError(f"ONNX Runtime failed: {error}") from error

    def _place(self, feeds: Mapping[str, NDArray[Any]]) -> _Place:
        kept: OrderedDict[Any, _Place] | None = getattr(self._own, "kept", None)
        if kept is None:
            kept = self._own.kept = OrderedDict()
        key = tuple((name, value.shape) for name, value in sorted(feeds.items()))
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
        if self.captures and len(kept) >= _KEPT:
            # Captured graphs hold their memory to the end: a further size goes without one.
            return self._made(feeds, _NO_GRAPH)
        kept[key] = self._made(feeds, str(len(kept) + 1) if self.captures else "")
        while len(kept) > _KEPT:
            kept.popitem(last=False)
        return kept[key]

    def _made(self, feeds: Mapping[str, NDArray[Any]], graph: str) -> _Place:
        import onnxruntime as ort

        def tensor(shape: list[int], dtype: Any) -> Any:
            make = ort.OrtValue.ortvalue_from_shape_and_type
            return make(shape, dtype, self._device, self._number)

        binding = self._session.io_binding()
        inputs = {name: tensor(list(v.shape), v.dtype.type) for name, v in feeds.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        outputs = {}
        captured = graph not in ("", _NO_GRAPH)
        rows = max((value.shape[0] for value in feeds.values() if value.ndim), default=1)
        for name, one in self._outputs.items():
            if captured:
                shape = [size if isinstance(size, int) else rows for size in one.shape]
                outputs[name] = tensor(shape, _DTYPES[one.type])
                binding.bind_ortvalue_output(name, outputs[name])
            else:
                binding.bind_output(name, "cpu")
        run_options = None
        if graph:
            run_options = ort.RunOptions()
            run_options.add_run_config_entry("gpu_graph_id", graph)
        return _Place(binding, inputs, outputs, run_options)
