"""The seam between a bundle and whatever computes its graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from moon.errors import BackendError

if TYPE_CHECKING:
    from moon.bundle import Bundle

__all__ = ["DEFAULT", "NAMES", "Availability", "Backend", "backends", "open_backend"]

DEFAULT = "onnxruntime"
# Names users may meet, and why those that are missing are missing.
_NOT_IN_THIS_VERSION = {
    "sparse": "the sparse CPU engine",
    "tensorrt": "the TensorRT backend",
    "tensorrt_rtx": "the TensorRT-RTX backend",
    "torch": "the PyTorch backend",
}
NAMES = ("onnxruntime", *_NOT_IN_THIS_VERSION, "fake")


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
        """``name``, ``version``, ``provider``, ``precision`` and ``threads``."""


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


def open_backend(
    model: Bundle | bytes, name: str = DEFAULT, *, threads: int = 1, spin: bool = True
) -> Backend:
    """Load a bundle, or the bytes of an ONNX graph like a bundle's, into a backend.

    Args:
        model: the bundle or ONNX bytes.
        name: one of :data:`NAMES`.
        threads: threads for one inference; 0 leaves it to the backend.
        spin: let idle threads spin, which is faster and keeps the cores busy.

    Raises:
        BackendError: no such backend, or it cannot run here.
    """
    if threads < 0:
        raise BackendError(f"threads must be 0 or more, not {threads}")
    if name == "onnxruntime":
        from moon.runtime.onnxruntime import OnnxRuntime

        if isinstance(model, bytes):
            return OnnxRuntime(model, threads=threads, spin=spin)
        precision = model.manifest.precision
        return OnnxRuntime(model.model_bytes(), threads=threads, spin=spin, precision=precision)
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
    found: dict[str, Availability] = {"onnxruntime": _onnxruntime()}
    for name, what in _NOT_IN_THIS_VERSION.items():
        found[name] = Availability(False, f"{what} is not in this version of moon")
    found["fake"] = Availability(True, "makes up its outputs; for tests only")
    return found


def _onnxruntime() -> Availability:
    if find_spec("onnxruntime") is None:
        return Availability(False, "onnxruntime is not installed", "pip install onnxruntime")
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return Availability(True, f"{package} {version(package)}, CPU")
        except PackageNotFoundError:
            continue
    return Availability(True, "onnxruntime, CPU")
