"""Confidence scores, in plain numpy.

Every score is a confidence: higher means more in-distribution. The gate accepts when
``score >= threshold``.

Scores of logits alone are functions (:data:`SCORES`, :func:`gen`). Every score, those with
constants included, is also to be had as a value: :func:`fit_score` computes the constants from
training data, and the result scores features and logits. :data:`SCORE_TABLE` says of each
what it needs.
"""

from moon.scores.fitted import FittedScore
from moon.scores.logits import (
    SCORES,
    Score,
    ebo,
    gen,
    known_logits,
    known_probabilities,
    mls,
    msp,
    score_function,
    softmax,
    unknown,
    unknown_probability,
)
from moon.scores.table import SCORE_TABLE, ScoreSpec, fit_score, restore_score
from moon.scores.training import Training

__all__ = [
    "SCORES",
    "SCORE_TABLE",
    "FittedScore",
    "Score",
    "ScoreSpec",
    "Training",
    "ebo",
    "fit_score",
    "gen",
    "known_logits",
    "known_probabilities",
    "mls",
    "msp",
    "restore_score",
    "score_function",
    "softmax",
    "unknown",
    "unknown_probability",
]
