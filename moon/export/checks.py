"""What must hold before a graph becomes a bundle: the same answers, and the zeros still there.

Every failure is a ParityError or ExportError with the figures, and stops the export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from moon.errors import BackendError, ExportError, ParityError
from moon.export.classifier import classifier_input
from moon.export.graph import array, copied, densify, initializers, prune, weight_names
from moon.export.score_errors import ScoreParityError
from moon.export.session import Session, run
from moon.runtime.agreement import tolerance
from moon.runtime.sampled import BATCHES
from moon.scores import FittedScore

__all__ = [
    "Parity",
    "check_batches",
    "check_onnx",
    "check_packed",
    "check_scores",
    "check_zeros",
    "compare",
    "require",
]

_SCORE = 1e-4
# Characters of what ONNX Runtime says.
_MOST_CAUSE = 200

Floats = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How two sets of logits compare.

    Attributes:
        images: how many.
        max_abs: largest absolute difference of a logit.
        top1_agreement: share of images with the same arg max.
    """

    images: int
    max_abs: float
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(reference_NL: Floats, logits_NL: Floats) -> Parity:
    """Compare two sets of logits of the same images.

    Raises:
        ParityError: shapes differ, or one side has a number that is not finite.
    """
    if reference_NL.shape != logits_NL.shape:
        raise ParityError(
            f"logits have shape {list(logits_NL.shape)}, expected {list(reference_NL.shape)}"
        )
    for which, values in (("model", reference_NL), ("exported graph", logits_NL)):
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        if bad:
            raise ParityError(
                f"the {which} gives NaN or infinite logits for {bad} of {len(values)} images",
                remedy="Check that the training converged; with fp16, use --precision fp32",
            )
    difference = np.abs(reference_NL.astype(np.float64) - logits_NL)
    same = reference_NL.argmax(axis=1) == logits_NL.argmax(axis=1)
    return Parity(
        images=len(reference_NL),
        max_abs=float(difference.max(initial=0.0)),
        top1_agreement=float(same.mean()) if len(same) else 1.0,
    )


def require(reference_NL: Floats, logits_NL: Floats, precision: str, what: str) -> Parity:
    """Compare, and refuse a difference beyond the tolerance.

    Raises:
        ParityError: with both figures.
    """
    parity = compare(reference_NL, logits_NL)
    allowed = tolerance(reference_NL, precision)
    if parity.max_abs > allowed:
        raise ParityError(
            f"{what} differs by {parity.max_abs:.3g} from the model, more than {allowed:.3g}, "
            f"over {parity.images} images"
        )
    return parity


def check_batches(
    graph: Session, items: Floats, reference_NL: Floats, precision: str = "fp32"
) -> None:
    """The graph gives the reference's logits in batches of 1, 2 and 7.

    Raises:
        ParityError, ExportError: a batch size fails or gives other logits.
    """
    for size in BATCHES:
        # Wraps around, so that few items still make a batch of seven.
        chosen = np.arange(size) % len(items)
        try:
            logits = graph.run({"input": items[chosen]})["logits"]
        except BackendError as error:
            raise ExportError(
                f"the graph does not run with a batch of {size}: {_short(error.cause)}",
                remedy="Export the model with a free batch size",
            ) from error
        try:
            require(reference_NL[chosen], logits, precision, f"the graph with a batch of {size}")
        except ParityError as error:
            if error.remedy:
                raise
            raise ParityError(
                f"an image's logits depend on its batch: {error.cause}",
                remedy="Export the model with a free batch size, after model.eval()",
            ) from error


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CAUSE else f"{text[:_MOST_CAUSE]}..."


def check_onnx(model: ModelProto, *, full: bool = True) -> None:
    """The ONNX checker accepts the graph.

    Args:
        full: with shape inference; it does not know sparse initializers.

    Raises:
        ExportError: it does not.
    """
    try:
        onnx.checker.check_model(model, full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the graph: {str(error)[:300]}") from error


def check_zeros(masks: Mapping[str, NDArray[np.bool_]], body: ModelProto) -> None:
    """Every weight a mask removed is exactly zero in the graph.

    Args:
        masks: by weight name in the graph, True where a weight may be kept.
        body: graph whose weights are plain initializers.

    Raises:
        ExportError: a masked weight came to life, or the layer is not in the graph.
    """
    held = initializers(body)
    names = weight_names(body)
    for name, mask in masks.items():
        found = _matching(name, mask, held, names)
        alive = int(np.count_nonzero(array(held[found[0]])[~found[1]]))
        if alive:
            raise ExportError(f"{alive} masked weights of {name} are not zero in the graph")


def _matching(
    name: str, mask: NDArray[np.bool_], held: Mapping[str, TensorProto], names: list[str]
) -> tuple[str, NDArray[np.bool_]]:
    """The initializer of a masked weight: under its own name, else transposed under another."""
    if name in held and tuple(held[name].dims) == mask.shape:
        return name, mask
    # A linear layer without bias becomes a MatMul by the transposed weight, newly named.
    for other in names:
        if tuple(held[other].dims) == mask.shape[::-1] and mask.ndim == 2:
            fits = not np.count_nonzero(array(held[other])[~mask.T])
            if fits:
                return other, np.ascontiguousarray(mask.T)
    raise ExportError(f"the sparse layer {name} is not among the weights of the exported graph")


def check_packed(packed: ModelProto, rounded: ModelProto) -> None:
    """The packed graph's own operators, run by ONNX Runtime, give every weight back bit for bit.

    Raises:
        ParityError: a weight differs.
    """
    expected = {name: array(initializers(rounded)[name]) for name in weight_names(rounded)}
    probe = copied(packed)
    densify(probe)
    plain = {name: array(t) for name, t in initializers(probe).items() if name in expected}
    computed = [name for name in expected if name not in plain]
    del probe.graph.output[:]
    for name in computed:
        kind = helper.np_dtype_to_tensor_dtype(expected[name].dtype)
        probe.graph.output.append(helper.make_tensor_value_info(name, kind, expected[name].shape))
    del probe.graph.input[:]
    prune(probe)
    decoded = {**plain, **(run(probe, {}) if computed else {})}
    for name, weight in expected.items():
        got = decoded[name]
        if got.shape != weight.shape or got.tobytes() != weight.tobytes():
            wrong = int((got != weight).sum()) if got.shape == weight.shape else weight.size
            raise ParityError(f"packing changed {wrong} of {weight.size} weights of {name}")


def check_scores(
    model: ModelProto, fitted: Sequence[FittedScore], items: Floats
) -> dict[str, float]:
    """Each fitted score of the graph is the one its constants define.

    Args:
        model: a graph with its head, its weights plain initializers.
        fitted: the scores with constants that it carries.
        items: inputs, [n, ...].

    Returns:
        By score, the largest difference, as a share of the score's size.

    Raises:
        ScoreParityError: a score differs by more than 1e-4 of its size.
    """
    if not fitted:
        return {}
    probe = copied(model)
    name = classifier_input(probe)
    if name is not None and name not in {value.name for value in probe.graph.output}:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        probe.graph.output.append(value)
    outputs = Session(probe).run_batches("input", items)
    found = {}
    for one in fitted:
        given = {"logits": outputs["logits"], "features": outputs.get(name or "")}
        expected = one.score(**{key: given[key] for key in one.reads})
        got = outputs[f"score_{one.name}"].astype(np.float64)
        size = np.maximum(1.0, np.abs(expected))
        worst = float((np.abs(got - expected) / size).max(initial=0.0))
        if not worst <= _SCORE:
            raise ScoreParityError(
                one.name,
                f"the score {one.name} of the graph differs by {worst:.3g} of its size from "
                f"its definition, more than {_SCORE:g}, over {len(expected)} images",
            )
        found[one.name] = worst
    return found
