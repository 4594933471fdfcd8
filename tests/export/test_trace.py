from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from moon.errors import ExportError
from moon.export.graph import array, initializers, weight_names
from moon.export.session import Session
from moon.export.trace import trace
from moon.trainer.checkpoint import Checkpoint


class Tiny(nn.Module):
    """Conv, batch norm, a linear layer without bias, one with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        logits: Tensor = self.head(torch.relu(self.hidden(features)))
        return logits


def tiny() -> Tiny:
    torch.manual_seed(0)
    model = Tiny()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.uniform_(-1, 1)
        model.conv.weight[1] = 0
    return model


def test_the_graph_answers_like_the_model_in_any_batch() -> None:
    model = tiny()
    session = Session(trace(model, channels=1, size=(8, 8)))
    images = torch.randn(7, 1, 8, 8)
    expected = model.eval()(images).detach().numpy()
    for size in (1, 2, 7):
        got = session.run({"input": images[:size].numpy()})["logits"]
        np.testing.assert_allclose(got, expected[:size], atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, channels=1, size=(8, 8))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_keep_their_names(checkpoint: Checkpoint, body: ModelProto) -> None:
    assert weight_names(body) == [layer.name for layer in checkpoint.layers]
    assert (body.ir_version, body.opset_import[0].version) == (10, 18)
    onnx.checker.check_model(body, full_check=True)


def test_batch_norm_behind_a_convolution_is_gone() -> None:
    graph = trace(tiny(), channels=1, size=(8, 8)).graph
    assert "BatchNormalization" not in [node.op_type for node in graph.node]


def test_no_zero_is_negative() -> None:
    weight = array(initializers(trace(tiny(), channels=1, size=(8, 8)))["conv.weight"])
    assert not np.signbit(weight[weight == 0]).any()


def test_the_file_says_nothing_of_the_machine_and_repeats_itself() -> None:
    one = trace(tiny(), channels=1, size=(8, 8)).SerializeToString()
    other = trace(tiny(), channels=1, size=(8, 8)).SerializeToString()
    assert one == other
    here = str(Path(torch.__file__).parents[1]).encode()
    for trace_of_it in (b".py", b"site-packages", b"torch", b"stack_trace", here):
        assert trace_of_it not in one


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] if float(x.sum()) > 0 else x.flatten(1)[:, 3:6]


def test_what_cannot_be_traced_is_an_export_error() -> None:
    with pytest.raises(ExportError, match="the model Branching cannot be exported"):
        trace(Branching(), channels=1, size=(4, 4))
