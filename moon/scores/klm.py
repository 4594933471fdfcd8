"""KL matching: how far an input's posterior is from each class's typical one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moon.errors import UsageError
from moon.scores.fitted import Fitted, whole
from moon.scores.logits import Floats, log_softmax, logsumexp
from moon.scores.training import Ints, Training

__all__ = ["Klm", "fit_klm"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Klm(Fitted):
    """-min over the known c of KL(p || d_c), with d_c the mean posterior of class c.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022.
    d_c is the mean over the inputs that the model answers with c, so that no labels are needed. p
    and d_c are distributions over the known classes alone, so that the unknown logit has no say,
    unless it was fitted ``over_all``. All in logarithms, so that the divergence is finite at any
    finite logits.

    Input: logits [N, L]. Cost: one softmax and a product with K x K, O(N K^2).

    Attributes:
        log_means: log d_c, [K, P].
        known: logits that p and d_c are over, int64 [P]; of the known classes, or all.
        outputs: L, int64 [].
    """

    name = "klm"
    reads: ClassVar = ("logits",)
    shapes: ClassVar = {"log_means": "KP", "known": "P", "outputs": ""}

    log_means: Floats
    known: Ints
    outputs: Ints

    def _score(self, x_BD: Floats, z_BL: Floats) -> Floats:
        log_p = log_softmax(z_BL[:, self.known])
        p = np.exp(log_p)
        # An underflown p meets a log p of -1e300 at most, and the product is 0.
        own = (p * log_p).sum(axis=1, keepdims=True)
        nearest: Floats = -(own - p @ self.log_means.T).min(axis=1)
        return nearest


def fit_klm(training: Training, *, over_all: bool = False) -> Klm:
    """The classes' mean posteriors from logits of held-out (or training) images.

    Args:
        over_all: p and d_c over all L logits, so that inputs the model calls unknown are far
            from every known class.

    Raises:
        UsageError: no logits, or a class with which the model answers none of the images.
    """
    logits, classes = training.need("logits", "klm"), len(training.known)
    columns = np.arange(training.outputs) if over_all else training.known
    answers = np.concatenate([z.argmax(axis=1) for _, z in training.known_logits("klm")])
    missing = np.setdiff1d(np.arange(classes), answers)
    if len(missing):
        raise UsageError(
            f"the score klm needs images that the model answers with each class, and none is "
            f"answered with class {', '.join(map(str, missing[:5].tolist()))}"
            f"{' and others' if len(missing) > 5 else ''}",
            remedy="Give more images, or choose another score",
        )
    means = np.empty((classes, len(columns)))
    for c in range(classes):
        log_p = log_softmax(logits[answers == c][:, columns].astype(np.float64))
        means[c] = logsumexp(log_p.T) - np.log(len(log_p))
    return Klm(log_means=means, known=columns, outputs=whole(training.outputs))
