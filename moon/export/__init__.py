"""From a trained checkpoint, or one's own ONNX classifier, to a bundle."""

from __future__ import annotations

from moon.export.build import Options
from moon.export.foreign import from_onnx
from moon.export.to_bundle import to_bundle

__all__ = ["Options", "from_onnx", "to_bundle"]
