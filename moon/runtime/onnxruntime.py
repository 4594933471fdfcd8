"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError
from moon.runtime.ending import UNDER_WAY

__all__ = ["OnnxRuntime", "open_session", "run_session"]

_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}


def open_session(
    model: bytes | str, *, threads: int = 1, spin: bool = True, optimise: bool = True
) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: an ONNX file, or its path: values in other files are looked for beside it.
        threads: threads for one inference; 0 for as many as there are cores.
        spin: let idle threads spin between runs.
        optimise: let it change the graph.

    Raises:
        BackendError: ONNX Runtime is missing, or refuses the model.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be loaded: {error}", remedy="pip install onnxruntime"
        ) from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # its warnings go straight to stderr
    if not spin:
        # Within a run they do: there is more to do in a moment.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        with UNDER_WAY:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class but Exception
        raise BackendError(f"ONNX Runtime cannot load the model: {error}") from error


def run_session(
    session: Any, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Outputs of these names, of an ``onnxruntime.InferenceSession``.

    Raises:
        BackendError: ONNX Runtime fails.
    """
    try:
        with UNDER_WAY:
            values = session.run(names, feeds)
    except Exception as error:  # its exceptions share no base class but Exception
        raise BackendError(f"ONNX Runtime failed: {error}") from error
    return dict(zip(names, values, strict=True))


class OnnxRuntime:
    """A graph that follows the bundle's conventions, run by ONNX Runtime on the CPU.

    Args:
        model: the ONNX file.
        threads: threads for one inference; 0 for as many as there are cores.
        spin: let idle threads spin.
        precision: what the graph computes in, for :meth:`info`.

    Raises:
        BackendError: ONNX Runtime is missing, or refuses the model.
    """

    name = "onnxruntime"

    def __init__(
        self, model: bytes, *, threads: int = 1, spin: bool = True, precision: str = "fp32"
    ) -> None:
        self._session = open_session(model, threads=threads, spin=spin)
        self._threads, self._precision = threads, precision
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())
        inputs = {node.name: node for node in self._session.get_inputs()}
        images = [node for name, node in inputs.items() if name != "threshold"]
        if len(images) != 1 or images[0].type not in _DTYPES or len(images[0].shape) != 4:
            raise BackendError(
                "the graph must have one image input, float32 or uint8 of four dimensions",
                remedy="Export the model with moon export",
            )
        self._input: str = images[0].name
        self._dtype = np.dtype(_DTYPES[images[0].type])
        self._shape: tuple[Any, ...] = tuple(images[0].shape[1:])
        # An initializer that is also an optional input is listed apart.
        overridable = self._session.get_overridable_initializers()
        self._takes_threshold = "threshold" in {*inputs, *(node.name for node in overridable)}

    def run(self, batch: NDArray[Any], threshold: float | None = None) -> dict[str, NDArray[Any]]:
        """See :class:`moon.runtime.backend.Backend`."""
        self._check(batch)
        feeds: dict[str, NDArray[Any]] = {self._input: batch}
        if threshold is not None:
            if not self._takes_threshold:
                raise BackendError("the graph's threshold is not an input, so it is fixed")
            feeds["threshold"] = np.array(threshold, dtype=np.float32)
        return run_session(self._session, self.outputs, feeds)

    def info(self) -> dict[str, Any]:
        """Name, version, provider, precision and threads."""
        import onnxruntime as ort

        return {
            "name": self.name,
            "version": ort.__version__,
            "provider": self._session.get_providers()[0],
            "precision": self._precision,
            "threads": self._threads,
        }

    def _check(self, batch: NDArray[Any]) -> None:
        shape = self._shape
        fits = batch.ndim == 4 and all(
            want == got or not isinstance(want, int)
            for want, got in zip(shape, batch.shape[1:], strict=True)
        )
        if not fits or batch.dtype != self._dtype:
            raise BackendError(
                f"the model takes {self._dtype} [N, {', '.join(map(str, shape))}], "
                f"not {batch.dtype} {list(batch.shape)}"
            )
