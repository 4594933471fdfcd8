"""Virtual-logit matching: energy against the part of a feature outside the principal space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import UsageError
from moon.scores.fitted import Fitted, real, whole
from moon.scores.logits import Floats, logsumexp
from moon.scores.training import Ints, Training, blocks

__all__ = ["Vim", "fit_vim", "principal_dimension"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Vim(Fitted):
    """logsumexp(z_known) - alpha ||R^T (x - u)||.

    Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022, in the form
    of the authors' code. u = -pinv(W) b is where the known logits vanish (or are least); R spans
    what the d principal directions of the training features around u leave; alpha makes the
    mean virtual logit of training features their mean largest logit. W and b are the known
    classes' rows.

    Input: features [N, D] and logits [N, L]. Cost: O(N D (D - d)); constants D (D - d) numbers.

    Attributes:
        origin: u, [D].
        residual: R, orthonormal columns, [D, D - d].
        alpha: [].
        known: logits of the known classes, int64 [K].
        outputs: L, int64 [].
    """

    name = "vim"
    reads: ClassVar = ("features", "logits")
    shapes: ClassVar = {"origin": "D", "residual": "DR", "alpha": "", "known": "K", "outputs": ""}

    origin: Floats
    residual: Floats
    alpha: Floats
    known: Ints
    outputs: Ints

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        outside = np.linalg.norm((x_BD - self.origin) @ self.residual, axis=1)
        score: Floats = logsumexp(z_BL[:, self.known]) - self.alpha * outside
        return score


def principal_dimension(features: int) -> int:
    """d of the authors and OpenOOD: 1000 from 2048 features, 512 from 768, else half of them."""
    if features >= 2048:
        return 1000
    return 512 if features >= 768 else features // 2


def fit_vim(training: Training, *, dimension: int | None = None) -> Vim:
    """Principal space, origin and alpha from training features, their logits and the last layer.

    Args:
        dimension: d, from 1 to D - 1; None is :func:`principal_dimension`.

    Raises:
        UsageError: an input is missing, there is one feature, d is out of range, or the training
            features lie within the principal space, so that alpha is undefined.
    """
    features = training.need("features", "vim")
    width = features.shape[1]
    if width < 2:
        raise UsageError(
            "the score vim needs at least two features, and the last layer reads one",
            remedy="Choose another score",
        )
    d = principal_dimension(width) if dimension is None else dimension
    if not 1 <= d < width:
        raise UsageError(
            f"the principal space of vim has 1 to {width - 1} dimensions of {width}, not {d}",
            remedy="Choose another dimension",
        )
    weight, bias = training.known_head("vim")
    largest = np.mean(np.concatenate([z.max(axis=1) for _, z in training.known_logits("vim")]))
    # Rows of a trained head may sum to zero but for float32's rounding, which is not inverted.
    rounding = max(weight.shape) * float(np.finfo(np.float32).eps)
    origin = -np.linalg.pinv(weight, rounding) @ bias
    scatter = np.zeros((width, width))
    for part in blocks(features):
        part -= origin
        scatter += part.T @ part
    values, vectors = np.linalg.eigh(scatter / len(features))
    residual = np.ascontiguousarray(vectors[:, : width - d])  # eigenvalues ascend
    outside = np.concatenate(
        [np.linalg.norm((part - origin) @ residual, axis=1) for part in blocks(features)]
    )
    # Rounding leaves about sqrt(eps) of the largest extent where there is nothing.
    if not np.mean(outside) > 1e-7 * np.sqrt(max(values[-1], 0.0)):
        raise UsageError(
            f"the training features lie within {d} dimensions, so that nothing is outside the "
            "principal space of vim",
            remedy="Choose a smaller dimension, or give more images",
        )
    return Vim(
        origin=origin,
        residual=residual,
        alpha=real(float(largest / np.mean(outside))),
        known=training.known,
        outputs=whole(training.outputs),
    )
