"""A small sparse network trained for real on digits, as the checkpoint the tests export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from moon.bundle import Bundle
from moon.data.load import data_sha256, load_pixels
from moon.data.preprocess import Preprocess
from moon.data.source import open_source
from moon.export import from_onnx, to_bundle
from moon.export.trace import trace
from moon.trainer.accounting.flops import count_flops
from moon.trainer.checkpoint import Checkpoint, Validation, versions
from moon.trainer.models import build
from moon.trainer.recipe import Recipe
from moon.trainer.sparsity.budget import counts, densities
from moon.trainer.sparsity.topology import find_layers, generator, random_mask

PREPROCESS = Preprocess(crop=(8, 8), mean=(0.3,), std=(0.4,))
TRAIN, TEST = "sklearn:digits#train", "sklearn:digits#test"
CLASSES = tuple(str(digit) for digit in range(10))
OUTPUTS = 11


def trained() -> Checkpoint:
    """Digits at 90% sparsity, static masks, an eleventh output that stays unused."""
    recipe = Recipe.from_dict(
        {
            "name": "digits-test",
            "model": "cnn",
            "rule": "static",
            "sparsity": 0.9,
            "data": {"train": TRAIN, "val": TEST, "preprocess": PREPROCESS.to_json()},
        }
    )
    model = build("cnn", outputs=OUTPUTS, channels=1, size=(8, 8), seed=0)
    layers = find_layers(model)
    kept = counts(layers, densities(layers, 0.1))
    masks = {
        layer.name: random_mask(layer.weight, kept[layer.name], generator(0, 0, layer.name))
        for layer in layers
    }
    source = open_source(TRAIN)
    pixels = load_pixels(source, PREPROCESS)
    images = torch.from_numpy(PREPROCESS.normalise(pixels))
    labels = torch.from_numpy(np.asarray(source.labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(6):
        for chosen in torch.randperm(len(images), generator=draw).split(64):
            with torch.no_grad():
                for layer in layers:
                    layer.weight.mul_(masks[layer.name])
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(masks[layer.name])
    return Checkpoint(
        recipe=recipe,
        classes=CLASSES,
        unknown_index=10,
        preprocess=PREPROCESS,
        state={name: value.detach().clone() for name, value in model.state_dict().items()},
        masks=masks,
        validation=Validation(source=TEST, indices=None, sha256=data_sha256(open_source(TEST))),
        layers=count_flops(model, images[:1], masks),
        metrics={"accuracy": 0.9},
        versions=versions(),
    )


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return trained()


@pytest.fixture(scope="session")
def body(checkpoint: Checkpoint) -> ModelProto:
    """The checkpoint's traced graph; tests that change it take a copy."""
    return trace(checkpoint.model(), channels=1, size=(8, 8))


@pytest.fixture(scope="session")
def run_folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder)
    return folder


@pytest.fixture(scope="session")
def digits_onnx(body: ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network as somebody's own ONNX file: quicker than tracing it again."""
    path = tmp_path_factory.mktemp("own") / "digits.onnx"
    onnx.save(body, path)
    return path


def from_digits(path: Path, out: Path, **options: Any) -> Bundle:
    given = {"classes": CLASSES, "unknown_index": 10, "data": TEST, **options}
    return from_onnx(path, out, mean=PREPROCESS.mean, std=PREPROCESS.std, **given)


@pytest.fixture(scope="session")
def full(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose graph carries every score, and gates by one that reads features."""
    out = tmp_path_factory.mktemp("full") / "digits"
    return to_bundle(run_folder, out, score="vim", carry=["all"], features=True, p_values=True)


MakeForeign = Callable[..., Path]


@pytest.fixture
def foreign(tmp_path: Path) -> MakeForeign:
    """Writes a classifier as other tools do: Conv, BatchNormalization, ReLU, Reshape, Gemm."""

    def make(
        *,
        batch: int | str = 1,
        opset: int = 13,
        ir_version: int = 8,
        last: str = "",
        channels: int = 3,
        size: tuple[int | str, int | str] = (8, 8),
        name: str = "own.onnx",
    ) -> Path:
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((4, channels, 3, 3)).astype(np.float32)
        weight[rng.random(weight.shape) < 0.8] = 0
        tensors = {
            "w": weight,
            "gamma": np.array([1.5, -1, 0.5, 2], np.float32),
            "beta": np.array([0.1, 0.2, -0.3, 0], np.float32),
            "mean": np.array([0.2, -0.1, 0, 0.3], np.float32),
            "var": np.array([1, 0.5, 2, 0.8], np.float32),
            "fc": rng.standard_normal((4 * 64, 5)).astype(np.float32),
            "shape": np.array([batch if isinstance(batch, int) else -1, 256], np.int64),
        }
        norm = ("gamma", "beta", "mean", "var")
        nodes = [
            helper.make_node("Conv", ["score", "w"], ["conv"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["conv", *norm], ["bn"]),
            helper.make_node("Relu", ["bn"], ["label"]),
            helper.make_node("Reshape", ["label", "shape"], ["flat"]),
            helper.make_node("MatMul", ["flat", "fc"], ["z"]),
        ]
        if last:
            nodes.append(helper.make_node(last, ["z"], ["p"], axis=1))
        graph = helper.make_graph(
            nodes,
            "theirs",
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, [batch, channels, *size])],
            [helper.make_tensor_value_info("p" if last else "z", TensorProto.FLOAT, [batch, 5])],
            [numpy_helper.from_array(value, key) for key, value in tensors.items()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
        )
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return make
