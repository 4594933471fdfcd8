"""The same scores by another library, whose sign is the opposite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moon.scores import fit_score
from tests.scores.samples import D, K, draw, model, strange

detector = pytest.importorskip("pytorch_ood.detector")

NET = model(None)
FEATURES, LABELS = draw()
TRAINING = NET.training(FEATURES, LABELS)
QUERY = np.concatenate([draw(40, seed=3)[0], strange(40)])
Z = NET.logits(QUERY)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64 if np.asarray(values).dtype == float else None)


def head(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    """Most detectors compute in float32."""
    layer = torch.nn.Linear(D, K).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(tensor(NET.weight))
        layer.bias.copy_(tensor(NET.bias))
    return layer


def identity() -> torch.nn.Module:
    return torch.nn.Identity()


def of_features(made: Any) -> torch.Tensor:
    made.fit_features(tensor(FEATURES), tensor(LABELS))
    return made.predict_features(tensor(QUERY))


def maps(values: Any) -> torch.Tensor:
    return tensor(values)[:, :, None, None]


def on_maps() -> Callable[[torch.Tensor], torch.Tensor]:
    layer = head(torch.float64)
    return lambda x: layer(x.flatten(1))


def klm() -> torch.Tensor:
    made = detector.KLMatching(None)
    made.fit_logits(tensor(TRAINING.logits))
    return made.predict_logits(tensor(Z))


def temperature() -> torch.Tensor:
    # Its optimiser takes small steps only, and so stops before the minimum: T is given.
    made = detector.TemperatureScaling(None)
    with torch.no_grad():
        made.t.fill_(float(fit_score("temperature", TRAINING).to_arrays()["temperature"]))
    made._is_fitted = True
    return made.predict_logits(tensor(Z))


def gen() -> torch.Tensor:
    # The mean of the terms, not the sum; probabilities clamped to 1e-7 from 0 and 1.
    return K * detector.GEN(None).predict_logits(tensor(Z))


def rmds() -> torch.Tensor:
    """It leaves the covariances undivided by N: distances are N times smaller."""
    torch.set_default_dtype(torch.float64)
    try:
        return len(FEATURES) * of_features(detector.RMD(identity()))
    finally:
        torch.set_default_dtype(torch.float32)


def vim() -> torch.Tensor:
    # d = 4, after which the spectrum falls: float32 eigenvectors of close eigenvalues are loose.
    return of_features(detector.ViM(None, 4, head().weight, head().bias))


def nnguide() -> torch.Tensor:
    made = detector.NNGuide(identity(), head(), k=10)
    made.fit_features(tensor(FEATURES).float(), tensor(LABELS))
    return made.predict_features(tensor(QUERY).float())


def react() -> torch.Tensor:
    made = detector.ReAct(None, on_maps())
    made.fit_feature_maps(maps(FEATURES), tensor(LABELS))
    return made.predict_feature_maps(maps(QUERY))


def scale() -> torch.Tensor:
    return detector.SCALE(None, on_maps(), percentile=0.85).predict_feature_maps(maps(QUERY))


CASES: dict[str, tuple[dict[str, Any], Callable[[], torch.Tensor]]] = {
    "msp": ({}, lambda: detector.MaxSoftmax.score(tensor(Z))),
    "ebo": ({}, lambda: detector.EnergyBased.score(tensor(Z))),
    "mls": ({}, lambda: detector.MaxLogit.score(tensor(Z))),
    "temperature": ({}, temperature),
    "gen": ({}, gen),
    "klm": ({}, klm),
    "knn": ({}, lambda: of_features(detector.KNN(None, k=50))),
    "vim": ({"dimension": 4}, vim),
    "fdbd": ({}, lambda: of_features(detector.fDBD(identity(), head()))),
    "rmds": ({}, rmds),
    "nci": ({"alpha": 0.01}, lambda: of_features(detector.NCI(identity(), head(), alpha=0.01))),
    "react": ({}, react),
    "scale": ({}, scale),
    "nnguide": ({"alpha": 1.0, "k": 10}, nnguide),
}


@pytest.mark.parametrize("name", CASES)
def test_the_other_library_agrees(name: str) -> None:
    options, other = CASES[name]
    ours = fit_score(name, TRAINING, **options).score(QUERY, Z)
    theirs = -other().detach().numpy().astype(np.float64)
    assert np.ptp(ours) > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
