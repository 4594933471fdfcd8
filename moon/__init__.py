"""moon: sparse image classifiers that know what they do not know.

Train a sparse network with an unknown class, export it to one small ONNX bundle, give
it a threshold with a guarantee, and run, measure or serve it. The names below load what
they need when first used, so ``import moon`` itself costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moon.bundle import Bundle as Bundle
    from moon.export.to_bundle import to_bundle as to_bundle
    from moon.runtime.calibrate import calibrate as calibrate
    from moon.runtime.predictor import Predictor as Predictor
    from moon.trainer.fit import fit as fit
    from moon.trainer.recipe import Recipe as Recipe

__version__ = "0.1.0"

# ONNX Runtime would otherwise write a device id to the user's cache and report events.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Bundle", "Predictor", "Recipe", "__version__", "calibrate", "fit", "to_bundle"]

_HOMES = {
    "Bundle": "moon.bundle",
    "Predictor": "moon.runtime.predictor",
    "Recipe": "moon.trainer.recipe",
    "calibrate": "moon.runtime.calibrate",
    "fit": "moon.trainer.fit",
    "to_bundle": "moon.export.to_bundle",
}
# So that `import moon; moon.trainer.Sparsifier(...)` works as it is written.
_ROOMS = frozenset({"data", "evaluation", "export", "runtime", "serve", "trainer"})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"moon.{name}")
    raise AttributeError(f"module 'moon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
