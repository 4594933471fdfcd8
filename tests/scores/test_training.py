from __future__ import annotations

import numpy as np
import pytest

from moon.errors import UsageError
from moon.scores import Training
from moon.scores.training import blocks, known_columns, rows

X = np.arange(12.0).reshape(4, 3)


def test_it_keeps_the_arrays_and_knows_the_classes() -> None:
    small = X.astype(np.float32)
    training = Training(features=small, weight=np.ones((5, 3)), unknown_index=-1)
    assert training.features is small
    assert training.outputs == 5 and training.known.tolist() == [0, 1, 2, 3]
    assert Training(logits=X, unknown_index=1).known.tolist() == [0, 2]
    assert Training(logits=[[1, 2]], labels=[1]).outputs == 2  # whole numbers and lists will do


def test_the_head_is_the_known_rows_and_a_missing_bias_is_zero() -> None:
    weight, bias = np.arange(6.0).reshape(3, 2), np.array([1.0, 2.0, 3.0])
    known, shift = Training(weight=weight, bias=bias, unknown_index=1).known_head("vim")
    assert known.tolist() == [[0, 1], [4, 5]] and shift.tolist() == [1, 3]
    assert Training(weight=weight).known_head("vim")[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["features", "logits", "weight", "bias", "labels"])
def test_shapes_and_values_are_checked(name: str) -> None:
    shape = r"\[N\]|\[L\]|\[N, D\]|\[N, L\]|\[L, D\]"
    with pytest.raises(UsageError, match=rf"{name} must have shape ({shape}), not \[1, 1, 1\]"):
        Training(**{name: np.ones((1, 1, 1))})
    with pytest.raises(UsageError, match=f"{name} must have shape"):
        Training(**{name: np.ones((0, 2) if name not in ("bias", "labels") else 0)})
    with pytest.raises(UsageError, match=f"{name} must be .*numbers, not complex128"):
        Training(**{name: np.ones((2, 2) if name not in ("bias", "labels") else 2, complex)})
    if name != "labels":
        for bad in (np.nan, np.inf, -np.inf):
            value = np.ones((2000, 2) if name != "bias" else 2000)
            value[-1] = bad
            with pytest.raises(UsageError, match=f"{name} holds NaN or infinite values"):
                Training(**{name: value})


def test_arrays_must_fit_together() -> None:
    with pytest.raises(UsageError, match=r"features and logits .*N is 4 in the one and 2 in the"):
        Training(features=X, logits=X[:2])
    with pytest.raises(UsageError, match=r"features and weight .*D is 3 in the one and 2 in the"):
        Training(features=X, weight=np.ones((3, 2)))
    with pytest.raises(UsageError, match=r"logits and weight .*L is 3 in the one and 2 in the"):
        Training(logits=X, weight=np.ones((2, 2)))
    with pytest.raises(UsageError, match=r"weight and bias .*L"):
        Training(weight=np.ones((2, 2)), bias=np.ones(3))
    with pytest.raises(UsageError, match=r"logits and labels .*N"):
        Training(logits=X, labels=[0, 1])


def test_labels_are_known_classes() -> None:
    with pytest.raises(UsageError, match=r"labels must be whole numbers, not float64"):
        Training(labels=[0.0, 1.0])
    with pytest.raises(UsageError, match=r"label -1 is not one of the known classes"):
        Training(labels=[0, -1])
    with pytest.raises(UsageError, match=r"label 2 is not .* which are 0 to 1. Leave out"):
        Training(logits=X, labels=[0, 1, 2, 0], unknown_index=2)
    Training(logits=X, labels=[0, 1, 2, 0])


def test_the_unknown_index_is_a_logit() -> None:
    for index in (3, -4):
        with pytest.raises(UsageError, match=f"unknown_index {index} is outside the 3 logits"):
            Training(logits=X, unknown_index=index)
    with pytest.raises(UsageError, match=r"no known class remains"):
        Training(logits=X[:, :1], unknown_index=0)
    assert known_columns(3, -3).tolist() == [1, 2]


def test_what_is_missing_is_named() -> None:
    empty = Training()
    with pytest.raises(UsageError, match=r"score vim is fitted to features.*shape \[N, D\]"):
        empty.need("features", "vim")
    with pytest.raises(UsageError, match=r"score vim needs the weight of the last linear layer"):
        empty.known_head("vim")
    with pytest.raises(UsageError, match=r"neither logits nor weight is given"):
        empty.known  # noqa: B018


def test_blocks_cover_everything_once() -> None:
    assert [(r.start, r.stop) for r in rows(5, 2)] == [(0, 2), (2, 4), (4, 5)]
    assert list(rows(0)) == []
    parts = list(blocks(X.astype(np.float32), 3))
    assert [len(part) for part in parts] == [3, 1]
    assert parts[0].dtype == np.float64 and np.array_equal(np.concatenate(parts), X)
