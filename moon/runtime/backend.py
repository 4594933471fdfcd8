"""The seam between a bundle and whatever computes its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from moon.backend_name import BackendName
from moon.errors import DISTRIBUTION, BackendError

if TYPE_CHECKING:
    from moon.bundle import Bundle

__all__ = ["DEFAULT", "NAMES", "Availability", "Backend", "backends", "open_backend"]

DEFAULT = "onnxruntime"
# Names users may meet, and why those that are missing are missing.
_NOT_IN_THIS_VERSION = {
    "tensorrt": "the TensorRT backend",
    "tensorrt_rtx": "the TensorRT-RTX backend",
    "torch": "the PyTorch backend",
}
NAMES = ("onnxruntime", "sparse", *_NOT_IN_THIS_VERSION, "fake")


class Backend(Protocol):
    """Computes a bundle's graph. Safe to call from several threads at once."""

    @property
    def name(self) -> str:
        """As users spell it, such as ``onnxruntime``."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs ``run`` returns."""

    def run(self, batch: NDArray[Any], threshold: float | None = None) -> dict[str, NDArray[Any]]:
        """Every output for a batch.

        Args:
            batch: float32 [N, C, H, W], or uint8 [N, H, W, C] where the bundle says so.
            threshold: replaces the graph's own threshold for this call.

        Raises:
            BackendError: another shape or type, or the backend failed.
        """

    def info(self) -> dict[str, Any]:
        """``name``, ``version``, ``provider``, ``precision`` and ``threads``.

        Also ``largest_batch``, where it takes only so many images at once.
        """


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here.

    Attributes:
        ok: it can.
        reason: what there is, or what is missing.
        install: what to type to get it, "" when nothing helps or nothing is needed.
    """

    ok: bool
    reason: str
    install: str = ""


def _silent(message: str) -> None:
    """Nobody is told."""


def open_backend(
    model: Bundle | bytes,
    name: str = DEFAULT,
    *,
    threads: int = 1,
    spin: bool | None = None,
    warn: Callable[[str], None] = _silent,
) -> Backend:
    """Load a bundle, or the bytes of an ONNX graph like a bundle's, into a backend.

    Args:
        model: the bundle or ONNX bytes.
        name: one of :data:`NAMES`, ``onnxruntime`` also with a provider and options as
            :mod:`moon.backend_name` describes.
        threads: threads for one inference; 0 leaves it to the backend.
        spin: let idle threads spin between runs, which is faster and keeps the cores busy; None
            for what the backend does by itself: ``onnxruntime`` does, ``sparse`` does not.
        warn: told, in a line, of what may make the backend slower than expected.

    Raises:
        BackendError: no such backend, or it cannot run here.
        UsageError: the name is not well formed.
        MissingExtraError: a package it needs is not installed.
    """
    if threads < 0:
        raise BackendError(f"threads must be 0 or more, not {threads}")
    asked = BackendName.parse(name)
    name = asked.name
    if name == "onnxruntime":
        from moon.runtime.onnxruntime import OnnxRuntime

        data, precision = _model(model)
        return OnnxRuntime(
            data,
            on=asked,
            threads=threads,
            spin=spin is not False,
            precision=precision,
            warn=warn,
        )
    if name == "sparse":
        from moon.runtime.sparse.backend import SparseBackend
        from moon.runtime.sparse.stored import find

        data, precision = _model(model)
        tuning, passed_over = (None, "") if isinstance(model, bytes) else find(model, data)
        if passed_over:
            warn(passed_over)
        spin = bool(spin)
        return SparseBackend(
            data, threads=threads, spin=bool(spin), precision=precision, warn=warn, tuning=tuning
        )
    if name == "fake":
        from moon.runtime.fake import FakeBackend

        if isinstance(model, bytes):
            raise BackendError("the fake backend needs a bundle, not ONNX bytes")
        return FakeBackend.of(model)
    if name in _NOT_IN_THIS_VERSION:
        raise BackendError(
            f"{_NOT_IN_THIS_VERSION[name]} is not in this version of moon",
            remedy="Use --backend onnxruntime",
        )
    raise BackendError(f"no backend is called {name}", remedy=f"Choose one of {', '.join(NAMES)}")


def backends() -> Mapping[str, Availability]:
    """Every backend by name, and whether it can run here.

    Installed means found: nothing is imported.
    """
    found: dict[str, Availability] = {"onnxruntime": _onnxruntime(), "sparse": _sparse()}
    for name, what in _NOT_IN_THIS_VERSION.items():
        found[name] = Availability(False, f"{what} is not in this version of moon")
    found["fake"] = Availability(True, "makes up its outputs; for tests only")
    return found


def _model(model: Bundle | bytes) -> tuple[bytes, str]:
    """The ONNX file, and what it computes in."""
    if isinstance(model, bytes):
        return model, "fp32"
    return model.model_bytes(), model.manifest.precision


def _sparse() -> Availability:
    from moon.runtime.sparse.opening import verified_here

    if elsewhere := verified_here():
        return Availability(False, f"{elsewhere}; what it is given, ONNX Runtime runs")
    if find_spec("llvmlite") is None:
        install = f"pip install '{DISTRIBUTION}[engine]'"
        return Availability(False, "llvmlite is not installed", install)
    return Availability(True, f"moon's own engine, with llvmlite {version('llvmlite')}, CPU")


def _onnxruntime() -> Availability:
    if find_spec("onnxruntime") is None:
        return Availability(False, "onnxruntime is not installed", "pip install onnxruntime")
    brands = ("gpu", "openvino", "directml", "qnn")
    for package in ("onnxruntime", *(f"onnxruntime-{brand}" for brand in brands)):
        try:
            return Availability(True, f"{package} {version(package)}, CPU")
        except PackageNotFoundError:
            continue
    return Availability(True, "onnxruntime, CPU")
