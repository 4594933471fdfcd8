"""What the graph of a bundle says of its gate, checked against the manifest and gate.json."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.errors import BundleError
from moon.gate import Gate
from moon.manifest import Manifest
from moon.onnxfile import (
    FLOAT32,
    INT64,
    find_initializer,
    has_external_data,
    has_initializer,
    read_matrix,
    read_scalar,
    read_vector,
)
from moon.p_table import WIDTH, PTable

__all__ = ["GatedGraph", "check_graph"]

_REMEDY = "Take a good copy of the bundle, or export it again"
_AGAIN = "Run moon calibrate again"


@dataclass(frozen=True)
class GatedGraph:
    """What was found in the graph.

    Attributes:
        score: the score it gates by.
        by_class: it has a threshold for each class.
    """

    score: str
    by_class: bool


def check_graph(model: bytes, manifest: Manifest, gates: Mapping[str, Gate]) -> GatedGraph:
    """Check the graph against manifest and gates, its thresholds bit for bit.

    Args:
        model: the ONNX file.
        manifest: the bundle's.
        gates: from gate.json, by backend; empty when it is not calibrated.

    Raises:
        BundleError: data outside the file, an initializer of the gate that is missing or of
            the wrong type, or one that contradicts the others.
    """
    external = has_external_data(model)
    if external is not None:
        raise BundleError(
            f"model.onnx keeps the tensor {external} outside the file, which a bundle may not",
            remedy="Export it again with all data inside",
        )
    by_class = has_initializer(model, "thresholds")
    dims: dict[str, tuple[int, ...]] = {"threshold": (), "gate_score": ()}
    if by_class:
        dims["thresholds"] = (len(manifest.classes),)
    p_values = has_initializer(model, "p_scores") or has_initializer(model, "p_levels")
    if p_values:
        dims["p_scores"] = (len(manifest.scores), WIDTH)
        dims["p_levels"] = (len(manifest.scores), WIDTH + 1)
    for name, expected in dims.items():
        found = find_initializer(model, name)
        dtype = INT64 if name == "gate_score" else FLOAT32
        if found.dtype != dtype or found.dims != expected:
            raise BundleError(f"model.onnx: {name} has the wrong type or shape", remedy=_REMEDY)
    index = int(read_scalar(model, "gate_score"))
    if not 0 <= index < len(manifest.scores):
        raise BundleError(f"model.onnx: gate_score {index} names no score", remedy=_REMEDY)
    score = manifest.scores[index]
    _check_gates(gates, score, manifest.classes, by_class)
    _check_threshold(float(read_scalar(model, "threshold")), gates)
    if by_class:
        _check_thresholds(read_vector(model, "thresholds"), manifest.classes, gates)
    if p_values:
        table = PTable(read_matrix(model, "p_scores"), read_matrix(model, "p_levels"))
        _check_p_values(table, index, gates.get("default"))
    return GatedGraph(score, by_class)


def _check_gates(
    gates: Mapping[str, Gate], score: str, classes: tuple[str, ...], by_class: bool
) -> None:
    for backend, gate in gates.items():
        if gate.score != score:
            raise BundleError(
                f"model.onnx gates by {score}, but gate.json ({backend}) by {gate.score}",
                remedy=_AGAIN,
            )
        if gate.per_class is None:
            continue
        if not by_class:
            raise BundleError(
                f"gate.json ({backend}) has thresholds by class, but model.onnx has only one",
                remedy=_REMEDY,
            )
        if gate.per_class.classes != classes:
            raise BundleError(
                f"gate.json ({backend}): the classes of per_class are not the bundle's, in order",
                remedy=_REMEDY,
            )


def _check_threshold(threshold: float, gates: Mapping[str, Gate]) -> None:
    expected = math.inf
    if gates:
        gate = gates["default"]
        expected = gate.threshold if gate.per_class is None else math.nan
    if math.isnan(expected) and not math.isnan(threshold):
        raise BundleError(
            f"the threshold of model.onnx, {threshold!r}, overrides those by class in gate.json",
            remedy=_AGAIN,
        )
    if _bits(threshold) != _bits(expected):
        raise BundleError(
            f"the threshold of model.onnx, {threshold!r}, is not that of gate.json, {expected!r}",
            remedy=_AGAIN,
        )


def _check_thresholds(
    found_K: NDArray[np.float32], classes: tuple[str, ...], gates: Mapping[str, Gate]
) -> None:
    expected_K = np.full(len(classes), np.inf, np.float32)
    if gates:
        expected_K[:] = gates["default"].bars(np.arange(len(classes)))
    for name, found, expected in zip(classes, found_K, expected_K, strict=True):
        if found.tobytes() != expected.tobytes():
            raise BundleError(
                f"the threshold of model.onnx for {name}, {float(found)!r}, is not that of "
                f"gate.json, {float(expected)!r}",
                remedy=_AGAIN,
            )


def _check_p_values(table: PTable, row: int, gate: Gate | None) -> None:
    """The gate score's p-values must be those of gate.json, as far as its thinned scores tell.

    A blank table is always right: it promises nothing.
    """
    fault = table.fault()
    if fault is not None:
        raise BundleError(f"model.onnx: {fault}", remedy=_REMEDY)
    if table.is_blank:
        return
    if gate is None:
        raise BundleError("model.onnx has p-values, but there is no gate.json", remedy=_AGAIN)
    kept = table.scores[row][np.isfinite(table.scores[row])]
    if gate.k is not None and np.float32(gate.threshold) not in kept:
        raise BundleError("the p-values of model.onnx leave out the threshold", remedy=_AGAIN)
    # A level is that just below the next score that is kept; gate.json's own thinning only says
    # between which two counts the number of calibration scores below it lies.
    stored = np.asarray(gate.scores, np.float32)
    reached = np.searchsorted(stored, kept, side="left")
    ranks = np.array([gate.nonfinite, *gate.ranks, gate.n + 1])
    lowest = (1 + ranks[reached]) / (gate.n + 1)
    highest = ranks[reached + 1] / (gate.n + 1)
    found = table.levels[row].astype(np.float64)
    *below, above = found[: len(kept) + 1]
    # Levels are rounded down to float32.
    if (below > highest).any() or (below < lowest * (1 - 1e-6)).any() or above < 1 - 1e-6:
        raise BundleError(
            f"the p-values of model.onnx by {gate.score} are not those of gate.json", remedy=_AGAIN
        )


def _bits(value: float) -> bytes:
    return struct.pack("<f", value)
