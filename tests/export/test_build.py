from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from moon.data.preprocess import Preprocess
from moon.errors import ExportError, ParityError
from moon.export.build import Classifier, Options, build
from moon.export.session import Session, run
from moon.export.to_bundle import _reference as reference_of
from moon.export.trace import trace
from moon.trainer.checkpoint import Checkpoint

from .conftest import OUTPUTS, PREPROCESS

GOLDEN = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)


def classifier(body: ModelProto, reference: Any, **change: Any) -> Classifier:
    given = {
        "body": body,
        "reference": reference,
        "preprocess": PREPROCESS,
        "outputs": OUTPUTS,
        "unknown_index": 10,
        "masks": {},
    }
    return Classifier(**{**given, **change})


@pytest.mark.parametrize("input_dtype", ["float32", "uint8"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_precision_and_input_gives_the_models_answers(
    checkpoint: Checkpoint, body: ModelProto, precision: Any, input_dtype: Any
) -> None:
    reference = reference_of(checkpoint.model())
    options = Options(precision=precision, input_dtype=input_dtype)
    built = build(classifier(body, reference), options, GOLDEN)
    images = PREPROCESS.normalise(GOLDEN)
    feed: Any = GOLDEN if input_dtype == "uint8" else images
    out = run(built.model, {"input": feed})
    np.testing.assert_allclose(
        out["logits"], reference(images), atol=1e-4 if precision == "fp32" else 2e-2
    )
    assert built.report["packed"]["max_abs"] <= 1e-6
    assert ("rounding" in built.report) == (precision == "fp16")
    assert sum(layer["nonzeros"] for layer in built.layers.values()) == sum(
        int(mask.sum()) for mask in checkpoint.masks.values()
    )


def test_a_graph_that_answers_otherwise_is_refused(
    checkpoint: Checkpoint, body: ModelProto
) -> None:
    reference = reference_of(checkpoint.model())

    def other(images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = reference(images)
        logits[:, 3] += 1e-3
        return logits

    with pytest.raises(ParityError, match=r"differs by 0\.001 from the model, more than 0\.000"):
        build(classifier(body, other), Options(), GOLDEN)


def test_a_wrong_number_of_outputs_is_refused(checkpoint: Checkpoint, body: ModelProto) -> None:
    reference = reference_of(checkpoint.model())
    with pytest.raises(ExportError, match=r"gives logits \[5, 11\] for 5 images, expected \[5, 12"):
        build(classifier(body, reference, outputs=12), Options(), GOLDEN)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 16)[:, :3]


def test_a_model_with_a_batch_size_of_its_own_is_refused() -> None:
    body = trace(Fixed(), channels=1, size=(4, 4))
    preprocess = Preprocess(crop=(4, 4), mean=(0.5,), std=(0.5,))
    golden = GOLDEN[:, :4, :4]
    change = {"preprocess": preprocess, "outputs": 3, "unknown_index": None}
    with pytest.raises(ExportError, match=r"does not run with 5 images.*any batch size"):
        build(classifier(body, reference_of(Fixed()), **change), Options(), golden)

    def patient(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return images.reshape(len(images), 16)[:, :3]

    with pytest.raises(ExportError, match="does not run with a batch of 1"):
        build(classifier(body, patient, **change), Options(), golden)


def test_weights_that_are_not_finite_are_refused(checkpoint: Checkpoint) -> None:
    model = checkpoint.model()
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    body = trace(model, channels=1, size=(8, 8))
    with pytest.raises(ParityError, match="the model gives NaN or infinite logits for 1 of 1"):
        build(classifier(body, reference_of(model)), Options(), GOLDEN)


def test_sessions_name_what_went_wrong(body: ModelProto) -> None:
    with pytest.raises(ExportError, match="cannot be loaded"):
        Session(b"no graph")
    with pytest.raises(Exception, match="could not run the graph"):
        Session(body).run({"wrong": np.zeros(1, np.float32)})
