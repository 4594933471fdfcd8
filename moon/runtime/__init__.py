"""Running bundles: backends, the predictor, calibration, checks and measurements.

``import moon.runtime`` itself loads nothing; a prediction needs numpy, Pillow and ONNX
Runtime, and no training library. What is named like its module is taken from there:
``from moon.runtime.calibrate import calibrate``, likewise ``verify`` and ``bench``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moon.runtime.backend import Availability as Availability
    from moon.runtime.backend import Backend as Backend
    from moon.runtime.backend import backends as backends
    from moon.runtime.backend import open_backend as open_backend
    from moon.runtime.bench_compare import compare as compare
    from moon.runtime.choose import choose_score as choose_score
    from moon.runtime.predictor import Predictor as Predictor
    from moon.runtime.sparse.engine import SparseEngine as SparseEngine
    from moon.runtime.unpack import dense_model as dense_model
    from moon.runtime.verify import Check as Check

__all__ = [
    "Availability",
    "Backend",
    "Check",
    "Predictor",
    "SparseEngine",
    "backends",
    "choose_score",
    "compare",
    "dense_model",
    "open_backend",
]

_HOMES = {
    "Availability": "backend",
    "Backend": "backend",
    "Check": "verify",
    "Predictor": "predictor",
    "SparseEngine": "sparse.engine",
    "backends": "backend",
    "choose_score": "choose",
    "compare": "bench_compare",
    "dense_model": "unpack",
    "open_backend": "backend",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"moon.runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moon.runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
