"""Each score against its paper's formula, written naively, with an unknown class in the middle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import entropy
from sklearn.covariance import EmpiricalCovariance

from moon.scores import fit_score
from tests.scores.samples import D, K, N, draw, model, strange

U = 2
KNOWN = [0, 1, 3, 4]
NET = model(U)
FEATURES, LABELS = draw()
TRAINING = NET.training(FEATURES, LABELS)
TRAIN_Z = NET.logits(FEATURES)
X = np.concatenate([draw(25, seed=3)[0], strange(25)])
Z = NET.logits(X)
W, B = NET.weight[KNOWN], NET.bias[KNOWN]
MEAN = FEATURES.mean(axis=0)


def ours(name: str, **options: object) -> np.ndarray:
    return fit_score(name, TRAINING, **options).score(X, Z)


def close(found: np.ndarray, expected: object) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_temperature() -> None:
    rows = np.array(KNOWN)[LABELS]

    def likelihood(t: float) -> float:
        return -log_softmax(TRAIN_Z / t, axis=1)[np.arange(N), rows].mean()

    best = minimize_scalar(
        likelihood, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-9}
    )
    score = fit_score("temperature", TRAINING)
    t = float(score.to_arrays()["temperature"])
    assert t == pytest.approx(best.x, rel=1e-4) and abs(t - 1) > 0.1
    assert likelihood(t) <= likelihood(t * 1.001) and likelihood(t) <= likelihood(t / 1.001)
    close(score.score(logits=Z), softmax(Z / t, axis=1)[:, KNOWN].max(axis=1))


@pytest.mark.parametrize("top", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_gen(gamma: float, top: int | None) -> None:
    expected = []
    for z in Z:
        p = sorted(softmax(z[KNOWN]), reverse=True)[: top or K]
        expected.append(-sum((q * (1 - q)) ** gamma for q in p))
    np.testing.assert_allclose(ours("gen", gamma=gamma, top=top), expected, rtol=1e-7)


def test_klm() -> None:
    p = softmax(TRAIN_Z[:, KNOWN], axis=1)
    means = [p[p.argmax(axis=1) == c].mean(axis=0) for c in range(K)]
    expected = [-min(entropy(softmax(z[KNOWN]), d) for d in means) for z in Z]
    close(ours("klm"), expected)


def test_klm_over_all_logits() -> None:
    p = softmax(TRAIN_Z, axis=1)
    answers = p[:, KNOWN].argmax(axis=1)
    means = [p[answers == c].mean(axis=0) for c in range(K)]
    close(ours("klm", over_all=True), [-min(entropy(softmax(z), d) for d in means) for z in Z])


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("k", [1, 2, 50, N])
def test_knn(k: int) -> None:
    expected = [-sorted(math.dist(unit(x), unit(y)) for y in FEATURES)[k - 1] for x in X]
    close(ours("knn", k=k), expected)
    if k == 50:
        close(ours("knn"), expected)


def test_vim() -> None:
    origin = -np.linalg.pinv(W) @ B
    scatter = EmpiricalCovariance(assume_centered=True).fit(FEATURES - origin).covariance_
    values, vectors = np.linalg.eigh(scatter)
    rest = vectors[:, np.argsort(-values)[D // 2 :]]
    projection = rest @ rest.T
    outside = [np.linalg.norm(projection @ (x - origin)) for x in FEATURES]
    alpha = TRAIN_Z[:, KNOWN].max(axis=1).mean() / np.mean(outside)
    virtual = [alpha * np.linalg.norm(projection @ (x - origin)) for x in X]
    close(ours("vim"), logsumexp(Z[:, KNOWN], axis=1) - virtual)
    # As the paper orders inputs: by the softmax of the virtual logit among the others.
    probability = softmax(np.column_stack([Z[:, KNOWN], virtual]), axis=1)[:, -1]
    assert (np.argsort(ours("vim")) == np.argsort(-probability, kind="stable")).all()


def test_fdbd() -> None:
    expected = []
    for x, z in zip(X, Z[:, KNOWN], strict=True):
        y = z.argmax()
        apart = [
            abs((W[y] - W[c]) @ x + B[y] - B[c]) / np.linalg.norm(W[y] - W[c])
            for c in range(K)
            if c != y
        ]
        expected.append(np.mean(apart) / np.linalg.norm(x - MEAN))
    close(ours("fdbd"), expected)


def test_rmds() -> None:
    centres = np.stack([FEATURES[np.equal(LABELS, c)].mean(axis=0) for c in range(K)])
    within = EmpiricalCovariance(assume_centered=True).fit(FEATURES - centres[LABELS])
    overall = EmpiricalCovariance().fit(FEATURES)
    expected = []
    for x in X:
        squares = [(x - m) @ within.precision_ @ (x - m) for m in centres]
        background = (x - MEAN) @ overall.precision_ @ (x - MEAN)
        expected.append(-min(square - background for square in squares))
    close(ours("rmds"), expected)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3])
def test_nci(alpha: float | None) -> None:
    expected = []
    for x, z in zip(X, Z[:, KNOWN], strict=True):
        cosine = W[z.argmax()] @ unit(x - MEAN)
        expected.append(cosine + (1e-4 if alpha is None else alpha) * sum(abs(x)))
    close(ours("nci", **({} if alpha is None else {"alpha": alpha})), expected)


@pytest.mark.parametrize("percentile", [90.0, 50.0, 100.0])
def test_react(percentile: float) -> None:
    clip = np.percentile(FEATURES, percentile)
    expected = [logsumexp(W @ np.where(x > clip, clip, x) + B) for x in X]
    close(ours("react", percentile=percentile), expected)
    if percentile == 90:
        close(ours("react"), expected)


@pytest.mark.parametrize(("percentile", "top"), [(85.0, 2), (50.0, 6), (0.0, 12), (90.0, 1)])
def test_scale(percentile: float, top: int) -> None:
    expected = []
    for x in X:
        factor = math.exp(sum(x) / sum(sorted(x)[-top:]))
        expected.append(logsumexp(W @ (factor * x) + B))
    close(ours("scale", percentile=percentile), expected)
    if percentile == 85:
        close(ours("scale"), expected)


@pytest.mark.parametrize("k", [1, 7, N])
def test_nnguide(k: int) -> None:
    energy = logsumexp(TRAIN_Z[:, KNOWN], axis=1)
    expected = []
    for x, z in zip(X, Z[:, KNOWN], strict=True):
        guides = sorted(e * (unit(x) @ unit(y)) for e, y in zip(energy, FEATURES, strict=True))
        expected.append(logsumexp(z) * np.mean(guides[-k:]))
    close(ours("nnguide", k=k), expected)
