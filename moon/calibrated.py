"""What calibrating changes in a bundle's graph: a few initializers, and nothing else.

A compiled engine takes them as inputs, so that it follows gate.json without being built again.
Its record, like tuning plans, names the model by a hash in which they count as zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.errors import BundleError
from moon.files import sha256_bytes
from moon.onnxfile import (
    find_initializer,
    has_initializer,
    patch_matrix,
    patch_scalar,
    patch_vector,
    read_matrix,
    read_scalar,
    read_vector,
)

__all__ = ["CALIBRATED", "calibrated_values", "model_hash"]

CALIBRATED: tuple[str, ...] = ("threshold", "gate_score", "thresholds", "p_scores", "p_levels")


def calibrated_values(model: bytes) -> dict[str, NDArray[Any]]:
    """Values of those of :data:`CALIBRATED` that a bundle's graph has, by name.

    ``threshold`` float32 [], NaN where the gate is by class; ``gate_score`` int64 [];
    ``thresholds`` float32 [K]; ``p_scores`` float32 [S, 1024] and ``p_levels`` [S, 1025].

    Args:
        model: an ONNX file.

    Raises:
        BundleError: the file is malformed, or one of them is of another type.
    """
    found: dict[str, NDArray[Any]] = {}
    for name in CALIBRATED:
        if not has_initializer(model, name):
            continue
        rank = len(find_initializer(model, name).dims)
        if rank == 0:
            value = read_scalar(model, name)
            found[name] = np.array(value, np.int64 if isinstance(value, int) else np.float32)
        else:
            found[name] = (read_vector if rank == 1 else read_matrix)(model, name)
    return found


def model_hash(model: bytes) -> str:
    """SHA-256 of an ONNX file, what calibrating changes in a bundle's taken as zero."""
    for name in CALIBRATED:
        try:
            model = _blank(model, name)
        except BundleError:  # a graph unlike a bundle's, of which nothing is changed
            continue
    return sha256_bytes(model)


def _blank(model: bytes, name: str) -> bytes:
    if not has_initializer(model, name):
        return model
    dims = find_initializer(model, name).dims
    if not dims:
        return patch_scalar(model, name, 0)
    patch = patch_vector if len(dims) == 1 else patch_matrix
    return patch(model, name, np.zeros(dims, np.float32))
