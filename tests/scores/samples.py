"""A small classifier's features, logits and last layer, for tests of scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.scores import Training

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

K, D, N = 4, 12, 400
# Three features each, of different strength, and a little of all others.
DIRECTIONS = np.repeat(np.eye(K), D // K, axis=1) * np.linspace(0.8, 1.2, D) + 0.05


@dataclass(frozen=True)
class Model:
    """A last linear layer of K (+ 1) rows."""

    weight: Floats
    bias: Floats
    unknown_index: int | None

    def logits(self, features: Floats) -> Floats:
        return features @ self.weight.T + self.bias

    def training(self, features: Floats, labels: Ints) -> Training:
        return Training(
            features=features,
            logits=self.logits(features),
            labels=labels,
            weight=self.weight,
            bias=self.bias,
            unknown_index=self.unknown_index,
        )


def model(unknown_index: int | None = None) -> Model:
    weight = DIRECTIONS - DIRECTIONS.mean(axis=0)
    bias = np.array([0.1, -0.2, 0.05, 0.0])
    if unknown_index is not None:
        weight = np.insert(weight, unknown_index, -0.3 * DIRECTIONS.mean(axis=0), axis=0)
        bias = np.insert(bias, unknown_index, -0.4)
    return Model(weight, bias, unknown_index)


def draw(count: int = N, seed: int = 0) -> tuple[Floats, Ints]:
    """In-distribution features, positive as after a ReLU, and their labels, 1 in 25 wrong."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % K
    noise = 0.3 * np.abs(rng.normal(size=(count, D)))
    return 3 * DIRECTIONS[labels] + noise, (labels + (np.arange(count) % 25 == 24)) % K


def strange(count: int = 100, seed: int = 1) -> Floats:
    """Features far from every class: one of each of two classes, and nothing else."""
    rng = np.random.default_rng(seed)
    features = np.zeros((count, D))
    for row in features:
        classes = rng.choice(K, 2, replace=False)
        row[classes * (D // K) + rng.integers(D // K, size=2)] = rng.uniform(1.1, 1.3, size=2)
    return features


def training(unknown_index: int | None = None, count: int = N) -> Training:
    return model(unknown_index).training(*draw(count))
