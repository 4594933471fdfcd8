"""The exported bundle against the model it came from, on real images, backend by backend.

The chain, each link over the same images:

    the model (PyTorch) -> the traced graph    fp32's tolerance
    the traced graph    -> rounded weights     what rounding alone does; reported, not limited
    rounded weights     -> every backend       the tolerance of what it computes in
    the int8 graph      -> every backend       int8's tolerance

Where weights keep their fp32 values the chain is one link: the model -> every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.data.items import Source
from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.errors import ExportError, ParityError, UsageError
from moon.export.build import Built, Classifier, Options
from moon.export.overflow import largest_in_half, refuse_overflow
from moon.export.samples import outputs
from moon.progress import Progress, silent
from moon.runtime.agreement import IMAGES, Budget, agreement
from moon.runtime.sampled import Compared, Ran, compared, flips_remedy, run_backend, that_run
from moon.scores import SCORES, FittedScore, known_logits
from moon.threshold import as_float32

__all__ = ["Comparing", "Sample", "check_backends", "check_sample", "run_backends"]

_NOISE = 64
_BATCH = 64

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """How the export is compared with the model.

    Args:
        images: how many of the held-out images, spread evenly; fp16 needs at least 1,000.
        flips: see :class:`moon.runtime.agreement.Budget`.
        backends: names of those to compare; none for all that can run here.

    Raises:
        UsageError: a number is out of range.
    """

    images: int = IMAGES
    flips: int | None = None
    backends: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UsageError(f"parity needs 1 image or more, not {self.images}")
        if self.flips is not None and self.flips < 0:
            raise UsageError(f"the flips allowed must be 0 or more, not {self.flips}")

    @property
    def budget(self) -> Budget:
        """What a difference may amount to."""
        return Budget(self.flips)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Images, and what is expected of every backend for them.

    Attributes:
        pixels: uint8 [N, H, W, C].
        real: images, and not noise.
        origin: what the reference is, for people.
        expected: ``logits``, ``label`` and ``score`` of the reference, with weights as stored.
        traced: those of the model itself and of its graph; None where the reference is the model.
        plain: those of the graph with weights not yet rounded; None where none are.
    """

    pixels: NDArray[np.uint8]
    real: bool
    origin: str
    expected: Arrays
    traced: tuple[Arrays, Arrays] | None = None
    plain: Arrays | None = None

    @classmethod
    def of(
        cls,
        classifier: Classifier,
        options: Options,
        built: Built,
        source: Source | None,
        fitted: Sequence[FittedScore],
        comparing: Comparing,
        progress: Progress = silent,
    ) -> Sample:
        """Run the model, and where weights are rounded or a score reads features its graphs.

        Raises:
            ExportError: too few images for an fp16 graph.
        """
        pixels = _pixels(source, classifier.preprocess, options, comparing)
        progress(0, 3, "running the model")
        logits = _original(classifier, pixels)
        constants = next((one for one in fitted if one.name == options.score), None)
        reads = ("logits",) if constants is None else constants.reads
        rounds, needs_graph = options.rounds, "features" in reads
        original: dict[str, NDArray[Any]] = {"logits": logits, "label": _labels(classifier, logits)}
        if not needs_graph:
            original["score"] = _score(options.score, constants, logits, classifier)
        known: dict[str, Any] = {"pixels": pixels, "real": source is not None}
        if not rounds and not needs_graph:
            return cls(origin=classifier.origin, expected=original, **known)
        progress(1, 3, "running the model")
        dense = _graph(built.dense, options, classifier.preprocess, pixels)
        original.setdefault("score", dense["score"])
        if not rounds:
            # The model gives no features, so its score is that of its graph.
            return cls(origin=classifier.origin, expected=original, **known)
        progress(2, 3, "running the model")
        if options.precision == "int8":  # int8_check has what int8 itself changes
            narrow = _graph(built.chosen, options, classifier.preprocess, pixels)
            known["traced"] = original, dense
            return cls(origin="its int8 graph", expected=narrow, **known)
        wide = _graph(built.wide, options, classifier.preprocess, pixels)
        return cls(
            origin="its graph in fp32 with weights rounded the same way",
            expected=wide,
            traced=(original, dense),
            plain=dense,
            **known,
        )


def check_sample(
    sample: Sample, classifier: Classifier, options: Options, built: Built
) -> dict[str, Any]:
    """The links of the chain before the backends.

    Returns:
        Figures for the record.

    Raises:
        ParityError: the traced graph is not the model, or a layer outgrows fp16.
    """
    found: dict[str, Any] = {
        "sample": {
            "images": len(sample.pixels),
            "real": sample.real,
            "reference": sample.origin,
        }
    }
    if sample.traced is not None:
        original, dense = sample.traced
        link = agreement(original, dense, precision="fp32", score=options.score, bars=None)
        excess = Budget().excess(link, "fp32")
        if excess:
            raise ParityError(f"the traced graph {excess}, compared with {classifier.origin}")
        found["traced"] = link.to_json()
    if options.precision == "fp16":
        feeds = _feeds(sample.pixels, options, classifier.preprocess)
        largest = largest_in_half(built.wide, built.chosen, feeds)
        refuse_overflow(largest, len(sample.pixels))
        if largest is not None:
            found["largest_in_fp16"] = {"layer": largest.layer, "value": largest.value}
    return found


def run_backends(
    bundle: Bundle, sample: Sample, comparing: Comparing, progress: Progress = silent
) -> list[Ran]:
    """Every backend over the sample.

    Raises:
        ParityError: one gives logits too far from the reference's.
    """
    found = []
    for name in list(comparing.backends) or that_run():

        def told(done: int, total: int, name: str = name) -> None:
            progress(done, total, f"comparing {name}")

        ran = run_backend(bundle, name, sample.pixels, sample.expected, progress=told)
        if ran.refused and comparing.backends:
            raise ParityError(f"the backend {name} cannot be compared: {ran.refused}")
        found.append(ran)
    check_backends(found, bundle, sample, comparing, "")
    return found


def check_backends(
    ran: Sequence[Ran], bundle: Bundle, sample: Sample, comparing: Comparing, out: str
) -> dict[str, Any]:
    """What the backends gave against the reference and the budget, by the bundle's gates.

    Args:
        out: the bundle's name to users, for remedies.

    Returns:
        Figures for the record: ``backends``, and ``rounding`` where weights are rounded.

    Raises:
        ParityError: names the backend, the figure, and what to do.
    """
    found = [compared(one, sample.expected, bundle, comparing.budget) for one in ran]
    for one in found:
        if one.excess:
            raise _refusal(one, sample, out)
    report: dict[str, Any] = {"backends": {one.name: one.to_json() for one in found}}
    if sample.plain is not None:
        gate = bundle.gate()
        bars = None if gate is None else gate.bars(sample.plain["label"])
        own = None if gate is None else gate.bars(sample.expected["label"])
        report["rounding"] = agreement(
            sample.plain,
            sample.expected,
            precision="fp16",
            score=bundle.gate_score,
            bars=bars,
            own=own,
        ).to_json()
    return report


def _refusal(one: Compared, sample: Sample, out: str) -> ParityError:
    found = one.agreement
    assert found is not None
    remedy = "Export with --precision fp32, or leave the backend out with --parity-backend"
    if found.not_finite:
        remedy = "Check that the training converged; with fp16, export with --precision fp32"
    elif "another class" in one.excess:
        remedy = f"Accept them with --parity-flips {found.labels_differ}. {remedy}"
    elif "decides" in one.excess:
        remedy = (
            f"Accept them with --parity-flips {found.flips}. {flips_remedy(one, out or 'BUNDLE')}"
        )
    if not sample.real:
        # A network far from what it knows may amplify the last places of its own arithmetic.
        remedy = f"Compare over real images with --data SOURCE, not noise. {remedy}"
    return ParityError(
        f"the backend {one.name} {one.excess}, compared with {sample.origin}", remedy=remedy
    )


def _pixels(
    source: Source | None, preprocess: Preprocess, options: Options, comparing: Comparing
) -> NDArray[np.uint8]:
    half = options.precision == "fp16"
    if source is None:
        count = max(IMAGES, comparing.images) if half else min(_NOISE, comparing.images)
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (count, *preprocess.shape), dtype=np.uint8)
    wanted = max(comparing.images, IMAGES) if half else comparing.images
    if half and len(source) < wanted:
        raise ExportError(
            f"an fp16 graph is checked over at least {wanted:,} images, and {source.spec} "
            f"has {len(source):,}",
            remedy="Give more with --data, or export with --precision fp32",
        )
    count = min(wanted, len(source))
    return load_pixels(source, preprocess, np.arange(count) * len(source) // count)


def _original(classifier: Classifier, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    # Normalised a batch at a time: the floats of a thousand large images are gigabytes.
    parts = [
        classifier.reference(classifier.preprocess.normalise(pixels[i : i + _BATCH]))
        for i in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(parts)


def _feeds(
    pixels: NDArray[np.uint8], options: Options, preprocess: Preprocess
) -> Iterator[NDArray[Any]]:
    for i in range(0, len(pixels), _BATCH):
        batch = pixels[i : i + _BATCH]
        yield batch if options.input_dtype == "uint8" else preprocess.normalise(batch)


def _labels(classifier: Classifier, logits_NL: NDArray[Any]) -> NDArray[np.int64]:
    labels: NDArray[np.int64] = known_logits(logits_NL, classifier.unknown_index).argmax(axis=1)
    return labels


def _score(
    name: str, constants: FittedScore | None, logits_NL: NDArray[Any], classifier: Classifier
) -> NDArray[np.float32]:
    if constants is not None:
        return as_float32(constants.score(logits=logits_NL))
    return as_float32(SCORES[name](logits_NL, classifier.unknown_index))


def _graph(
    model: Any, options: Options, preprocess: Preprocess, pixels: NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    found = outputs(model, options, preprocess, pixels, threads=0)
    return {"logits": found["logits"], "label": found["label"], "score": found["score"]}
