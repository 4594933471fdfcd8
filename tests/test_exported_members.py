"""What is public, pinned: a change here is a change for users."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "moon": "Bundle Predictor Recipe __version__ calibrate fit to_bundle",
    "moon.data": "Item Preprocess Source data_sha256 load_pixels match_labels open_source "
    "split_validation stream",
    "moon.export": "Options from_onnx to_bundle",
    "moon.runtime": "Availability Backend Check Predictor SparseEngine backends choose_score "
    "compare dense_model open_backend",
    "moon.scores": "FittedScore SCORES SCORE_TABLE Score ScoreSpec Training ebo fit_score gen "
    "known_logits known_probabilities mls msp restore_score score_function softmax unknown "
    "unknown_probability",
    "moon.trainer": "Accounts AutoWeight Checkpoint LayerCost Recipe Sparsifier UnknownAwareLoss "
    "Votes account count_flops recompute_batch_norm training_flops",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    room = importlib.import_module(module)
    assert sorted(room.__all__) == sorted(PUBLIC[module].split())
    for name in room.__all__:
        assert getattr(room, name) is not None
