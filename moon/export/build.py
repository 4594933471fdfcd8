"""From a plain graph ``input`` -> ``logits`` to the finished, packed and checked model.onnx."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from moon.data.preprocess import Preprocess
from moon.errors import ExportError, UsageError
from moon.export.checks import (
    check_batches,
    check_onnx,
    check_packed,
    check_scores,
    check_zeros,
    compare,
    require,
)
from moon.export.fit_settings import asked_scores
from moon.export.graph import HEAD, array, initializers, weight_names
from moon.export.half import to_half
from moon.export.head import add_head, add_normalisation
from moon.export.overflow import largest_in_half, refuse_overflow
from moon.export.pack import (
    PRECISIONS,
    VALUES,
    WEIGHTS,
    Precision,
    Values,
    Weights,
    pack,
    round_values,
)
from moon.export.session import Session, check_survives
from moon.scores import FittedScore

__all__ = ["Built", "Classifier", "InputType", "Options", "build"]

InputType = Literal["float32", "uint8"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a graph is written.

    Args:
        weights: "compact", "dense" or "coo".
        values: "fp32", or "fp16" to store weights at half the size; arithmetic is not affected.
        precision: "fp32", or "fp16" or "int8" for a graph that computes in it; the score head
            stays fp32, and with int8 the last linear layer.
        max_change: with int8, the largest share of held-out images whose label, or whose decision
            at the same promise, may be another than fp32's.
        score: the gate's score.
        carry: further scores in the graph, by name; "all" for every one that can be had.
        settings: by score, keywords of its fit, such as {"knn": {"size": 500}}.
        p_values: also give a p-value of every carried score.
        input_dtype: "float32" for normalised images [N, C, H, W], "uint8" for pixels [N, H, W, C].
        features: also give the features before the last layer.

    Raises:
        UsageError: a value is not one of these.
    """

    weights: Weights = "compact"
    values: Values = "fp32"
    precision: Precision = "fp32"
    max_change: float = 0.02
    score: str = "ebo"
    carry: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    p_values: bool = False
    input_dtype: InputType = "float32"
    features: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "carry", tuple(self.carry))
        asked_scores(self.score, self.carry)
        for name, known in (
            ("weights", WEIGHTS),
            ("values", VALUES),
            ("precision", PRECISIONS),
            ("input_dtype", ("float32", "uint8")),
        ):
            given = getattr(self, name)
            if given not in known:
                raise UsageError(f"{name} must be {' or '.join(known)}, not {given!r}")
        if not 0 <= self.max_change <= 1:
            raise UsageError(f"max_change must be a share in [0, 1], not {self.max_change}")

    @property
    def rounds(self) -> bool:
        """Whether the graph's weights are others than the model's."""
        return self.stored == "fp16" or self.precision == "int8"

    @property
    def stored(self) -> Values:
        """How weights are stored: arithmetic in fp16 has no use for wider ones."""
        return "fp16" if self.precision == "fp16" else self.values


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A model about to be exported.

    Args:
        body: ``input`` float32 [N, C, H, W] -> ``logits`` [N, L], plain fp32 weights.
        reference: the original: float32 [N, C, H, W] -> logits [N, L]; what parity is with.
        preprocess: from an image to the input.
        outputs: L.
        unknown_index: column of the unknown class, or None.
        masks: by weight name, True where a weight is kept; must stay zero elsewhere.
        origin: what ``reference`` runs in, for people.
    """

    body: ModelProto
    reference: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    preprocess: Preprocess
    outputs: int
    unknown_index: int | None
    masks: Mapping[str, NDArray[np.bool_]]
    origin: str = "PyTorch"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished graph.

    Attributes:
        model: the packed graph, uncalibrated.
        wide: the same graph in fp32 precision with the same stored values, not packed.
        chosen: the same graph in the precision asked for, not packed.
        dense: the same graph in fp32 precision with the weights' own values.
        dense_bytes: size of the graph with dense fp32 weights.
        score_bytes: of it, constants of fitted scores and p-values; they are not packed.
        scores: names of the scores the graph carries, in order.
        layers: weight by name: shape, nonzeros and density, as stored; with int8, as in ``wide``.
        report: figures of the checks, for the record.
    """

    model: ModelProto
    wide: ModelProto
    chosen: ModelProto
    dense: ModelProto
    dense_bytes: int
    score_bytes: int
    scores: tuple[str, ...]
    layers: dict[str, dict[str, Any]]
    report: dict[str, Any]


def build(
    classifier: Classifier,
    options: Options,
    golden: Pixels,
    fitted: Sequence[FittedScore] = (),
    *,
    int8: ModelProto | None = None,
) -> Built:
    """Write ``classifier`` as ``options`` say, checking after every step.

    Args:
        golden: uint8 [n, H, W, C], images the steps are compared on.
        fitted: scores with constants, that the graph is to carry.
        int8: the body in int8, where that is the precision.

    Raises:
        UsageError: the score cannot be had from this model.
        ExportError: a step is impossible; ParityError: it changed the answers.
    """
    check_zeros(classifier.masks, classifier.body)
    images = classifier.preprocess.normalise(golden)
    wanted = classifier.reference(images)
    if wanted.shape != (len(images), classifier.outputs):
        raise ExportError(
            f"the model gives logits {list(wanted.shape)} for {len(images)} images, "
            f"expected {[len(images), classifier.outputs]}"
        )
    plain = Session(classifier.body)
    check_batches(plain, images, wanted)
    logits = plain.run_batches("input", images)["logits"]
    traced = require(wanted, logits, "fp32", "the traced graph")
    report: dict[str, Any] = {"traced": traced.to_json()}

    dense = _with_head(classifier.body, classifier, options, fitted)
    check_onnx(dense)
    wide = round_values(dense, options.stored)
    chosen = wide
    if options.precision == "fp16":
        half = to_half(round_values(classifier.body, "fp16"))
        chosen = _with_head(half, classifier, options, fitted)
        check_onnx(chosen)
    elif int8 is not None:
        check_zeros(classifier.masks, int8)
        report["rounded_to_zero"] = _nonzeros(wide) - _nonzeros(int8)
        chosen = _with_head(int8, classifier, options, fitted)
        check_onnx(chosen)
    packed = pack(chosen, weights=options.weights, values=options.stored)
    # The checker's shape inference knows no sparse initializers.
    check_onnx(packed, full=options.weights != "coo")
    if options.precision != "fp32":
        check_survives(chosen)
        check_survives(packed)
    check_packed(packed, chosen)
    feed = golden if options.input_dtype == "uint8" else images
    if options.precision == "fp16":
        refuse_overflow(largest_in_half(wide, chosen, [feed]), len(feed))
    report["scores"] = check_scores(chosen, fitted, feed)
    report |= _compare_steps(classifier, options, golden, (dense, wide, chosen, packed))
    return Built(
        model=packed,
        wide=wide,
        chosen=chosen,
        dense=dense,
        dense_bytes=dense.ByteSize(),
        score_bytes=_score_bytes(packed, fitted),
        scores=tuple(
            value.name.removeprefix("score_")
            for value in packed.graph.output
            if value.name.startswith("score_")
        ),
        # What int8 rounds to zero is no sparsity of the model's.
        layers=_layers(chosen if int8 is None else wide),
        report=report,
    )


def _with_head(
    body: ModelProto, classifier: Classifier, options: Options, fitted: Sequence[FittedScore]
) -> ModelProto:
    model = add_head(
        body,
        outputs=classifier.outputs,
        unknown_index=classifier.unknown_index,
        gate_score=options.score,
        fitted=fitted,
        features=options.features,
        p_values=options.p_values,
    )
    if options.input_dtype == "uint8":
        model = add_normalisation(model, classifier.preprocess)
    return model


def _compare_steps(
    classifier: Classifier,
    options: Options,
    golden: Pixels,
    steps: tuple[ModelProto, ModelProto, ModelProto, ModelProto],
) -> dict[str, Any]:
    feed = golden
    if options.input_dtype == "float32":
        feed = classifier.preprocess.normalise(golden)  # type: ignore[assignment]
    names = ("dense", "rounded", "chosen", "packed")
    sessions = {name: Session(step) for name, step in zip(names, steps, strict=True)}
    logits = {name: s.run_batches("input", feed)["logits"] for name, s in sessions.items()}
    reference = classifier.reference(classifier.preprocess.normalise(golden))
    require(reference, logits["dense"], "fp32", "the graph with its score head")
    packed = require(logits["chosen"], logits["packed"], "fp32", "the packed graph")
    check_batches(sessions["packed"], feed, logits["chosen"], options.precision)
    figures = {"packed": packed.to_json()}
    if options.stored == "fp16":
        figures["rounding"] = compare(logits["dense"], logits["rounded"]).to_json()
    return figures


def _score_bytes(model: ModelProto, fitted: Sequence[FittedScore]) -> int:
    heads = ("p_scores", "p_levels", *(f"{HEAD}{one.name}/" for one in fitted))
    return sum(t.ByteSize() for t in model.graph.initializer if t.name.startswith(heads))


def _nonzeros(model: ModelProto) -> int:
    return sum(layer["nonzeros"] for layer in _layers(model).values())


def _layers(model: ModelProto) -> dict[str, dict[str, Any]]:
    held = initializers(model)
    layers = {}
    for name in weight_names(model):
        weight = array(held[name])
        nonzeros = int(np.count_nonzero(weight))
        layers[name] = {
            "shape": list(weight.shape),
            "nonzeros": nonzeros,
            "density": nonzeros / weight.size,
        }
    return layers
