"""ONNX Runtime, on the CPU or on another of its providers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.backend_name import BackendName
from moon.errors import BackendError
from moon.runtime.ending import UNDER_WAY
from moon.runtime.heap import give_back
from moon.threshold import accepts

if TYPE_CHECKING:
    from moon.runtime.binding import Binding
    from moon.runtime.placement import Placement

__all__ = ["DTYPES", "OnnxRuntime", "open_session", "run_session", "session_options"]

DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
_NONE: Mapping[str, str] = MappingProxyType({})


def open_session(
    model: bytes | str,
    *,
    threads: int = 1,
    spin: bool = True,
    optimise: bool = True,
    entries: Mapping[str, str] = _NONE,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: an ONNX file, or its path: values in other files are looked for beside it.
        threads: threads for one inference; 0 for as many as there are cores.
        spin: let idle threads spin between runs.
        optimise: let it change the graph.
        entries: of the session's configuration.

    Raises:
        BackendError: ONNX Runtime is missing, or refuses the model.
    """
    options = session_options(threads=threads, spin=spin, entries=entries)
    import onnxruntime as ort

    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        with UNDER_WAY:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class but Exception
        raise BackendError(f"ONNX Runtime cannot load the model: {error}") from error


def session_options(*, threads: int, spin: bool, entries: Mapping[str, str] = _NONE) -> Any:
    """An ``onnxruntime.SessionOptions``, quiet; the arguments are as above.

    Raises:
        BackendError: ONNX Runtime is missing.
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
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


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


def _silent(message: str) -> None:
    """Nobody is told."""


class OnnxRuntime:
    """A graph that follows the bundle's conventions, run by ONNX Runtime.

    Args:
        model: the ONNX file.
        on: the provider and its options; default the CPU's.
        threads: threads of the CPU for one inference; 0 for as many as there are cores.
        spin: let idle threads spin.
        precision: what the graph computes in, for :meth:`info`.
        warn: told, in a line, of what runs on the CPU though another provider was asked for.

    Attributes:
        name: ``onnxruntime``, with the provider that runs it where that is not the CPU's.

    Raises:
        BackendError: ONNX Runtime is missing or refuses the model, or the provider cannot run it.
    """

    def __init__(
        self,
        model: bytes,
        *,
        on: BackendName | None = None,
        threads: int = 1,
        spin: bool = True,
        precision: str = "fp32",
        warn: Callable[[str], None] = _silent,
    ) -> None:
        asked = BackendName("onnxruntime") if on is None else on
        self._session, self._placement = _opened(model, asked, threads, spin, warn)
        give_back()
        self._elsewhere = self._placement is not None and not self._placement.fell_back
        self.name = asked.key if self._elsewhere else "onnxruntime"
        self._on = asked
        self._threads, self._precision = threads, precision
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())
        inputs = {node.name: node for node in self._session.get_inputs()}
        images = [node for name, node in inputs.items() if name != "threshold"]
        if len(images) != 1 or images[0].type not in DTYPES or len(images[0].shape) != 4:
            raise BackendError(
                "the graph must have one image input, float32 or uint8 of four dimensions",
                remedy="Export the model with moon export",
            )
        self._input: str = images[0].name
        self._dtype = np.dtype(DTYPES[images[0].type])
        self._shape: tuple[Any, ...] = tuple(images[0].shape[1:])
        # An initializer that is also an optional input is listed apart.
        overridable = self._session.get_overridable_initializers()
        self._takes_threshold = "threshold" in {*inputs, *(node.name for node in overridable)}
        self._bound = _binding(self._session, asked) if self._elsewhere else None

    def run(self, batch: NDArray[Any], threshold: float | None = None) -> dict[str, NDArray[Any]]:
        """See :class:`moon.runtime.backend.Backend`."""
        self._check(batch)
        feeds: dict[str, NDArray[Any]] = {self._input: batch}
        if threshold is not None and not self._takes_threshold:
            raise BackendError("the graph's threshold is not an input, so it is fixed")
        if threshold is not None and not self._elsewhere:
            feeds["threshold"] = np.array(threshold, dtype=np.float32)
        if self._bound is None:
            found = run_session(self._session, self.outputs, feeds)
        else:
            found = self._bound.run(feeds)
        if threshold is not None and self._elsewhere:
            # OpenVINO takes an initializer for a constant, and what is fed for it for nothing.
            found["accept"] = accepts(found["score"], np.float32(threshold))
        return found

    def info(self) -> dict[str, Any]:
        """Name, version, provider, precision and threads; of another provider than the CPU's more.

        ``options`` and ``entries`` are those given, ``nodes`` says how many each provider runs,
        ``on_cpu`` which the CPU's does, and ``fell_back`` why it runs them all, or None.
        """
        import onnxruntime as ort

        found = {
            "name": self.name,
            "version": ort.__version__,
            "provider": self._session.get_providers()[0],
            "precision": self._precision,
            "threads": self._threads,
        }
        if self._on.entries:
            found["entries"] = dict(self._on.entries)
        if self._placement is not None:
            found |= {"options": dict(self._on.options), **self._placement.to_json()}
        return found

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


def _opened(
    model: bytes, on: BackendName, threads: int, spin: bool, warn: Callable[[str], None]
) -> tuple[Any, Placement | None]:
    """The session, and where its nodes run; None for the CPU."""
    if not on.provider:
        return open_session(model, threads=threads, spin=spin, entries=on.entries), None
    from moon.runtime.provider_session import open_on_provider

    return open_on_provider(model, on, threads=threads, spin=spin, warn=warn)


def _binding(session: Any, on: BackendName) -> Binding | None:
    """Tensors that stay on the provider's device; None where it has no memory of its own."""
    from moon.runtime.binding import Binding
    from moon.runtime.providers import provider_of

    provider = provider_of(on)
    if provider is None or provider.memory == "cpu":
        return None
    return Binding(session, provider.memory, on.options)
