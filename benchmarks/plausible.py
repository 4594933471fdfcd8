"""A sparse classifier with random weights that answers as a trained one might."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from bytes import OUTPUTS, sparse_net
from numpy.typing import NDArray
from onnx import ModelProto

from moon.data.preprocess import Preprocess
from moon.export.head import add_head
from moon.export.session import Session
from moon.export.trace import trace
from moon.scores import FittedScore


@dataclass(frozen=True, kw_only=True)
class Model:
    """A classifier and what is needed to put heads on it.

    Attributes:
        body: ``input`` -> ``logits``.
        features: name of what its last linear layer reads.
        images: smooth random ones, uint8 [N, H, W, C].
        labels: the model's answers to them, but for some, [N].
    """

    body: ModelProto
    features: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    preprocess: Preprocess
    outputs: int

    @property
    def unknown_index(self) -> int:
        return self.outputs - 1

    def with_head(
        self, fitted: Sequence[FittedScore] = (), *, features: bool = False
    ) -> ModelProto:
        return add_head(
            self.body,
            outputs=self.outputs,
            unknown_index=self.unknown_index,
            fitted=fitted,
            features=features,
        )


def plausible(name: str, size: int, sparsity: float, count: int, seed: int) -> Model:
    """The sparse random network, told by its statistics and bias to use all of its classes."""
    preprocess = Preprocess(crop=(size, size), mean=(0.5,) * 3, std=(0.25,) * 3)
    images = smooth(count, size, seed)
    net = sparse_net(sparsity, seed, model=name, size=(size, size))
    inputs = torch.from_numpy(preprocess.normalise(images))
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the average over all batches
        norm.train()
    with torch.no_grad():
        net(inputs[:256])
        net.eval()
        logits = net(inputs[:256])
        last = [module for module in net.modules() if isinstance(module, torch.nn.Linear)][-1]
        scale = 4 / logits.std(dim=0).clamp_min(1e-6)
        last.weight.mul_(scale[:, None])
        last.bias.copy_((last.bias - logits.mean(dim=0)) * scale)
        last.bias[-1] -= 8  # hardly an image is unknown
    body = trace(net, channels=3, size=(size, size))
    features = add_head(body, outputs=OUTPUTS, unknown_index=OUTPUTS - 1, features=True)
    name_of = next(n.input[0] for n in features.graph.node if list(n.output) == ["features"])
    labels = Session(features).run_batches("input", inputs.numpy())["label"]
    labels[::20] = (labels[::20] + 1) % (OUTPUTS - 1)  # no temperature is best without errors
    return Model(
        body=body, features=name_of, images=images, labels=labels, preprocess=preprocess,
        outputs=OUTPUTS,
    )  # fmt: skip


def smooth(count: int, size: int, seed: int) -> NDArray[np.uint8]:
    """Random images whose neighbouring pixels are alike: [N, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 5, 5), generator=generator)
    fine = torch.rand((count, 3, size, size), generator=generator)
    wide = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    pixels = (255 * (0.85 * wide + 0.15 * fine)).clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
