from __future__ import annotations

import subprocess
import sys

import pytest

import moon.trainer


def test_public_names() -> None:
    assert moon.trainer.__all__ == [
        "Accounts",
        "AutoWeight",
        "Checkpoint",
        "LayerCost",
        "Recipe",
        "Sparsifier",
        "UnknownAwareLoss",
        "Votes",
        "account",
        "count_flops",
        "recompute_batch_norm",
        "training_flops",
    ]
    for name in moon.trainer.__all__:
        assert getattr(moon.trainer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moon.trainer.nothing


def test_without_torch_the_extra_is_named_and_recipes_still_load() -> None:
    code = """
import sys
sys.modules["torch"] = None
import moon.trainer
from moon.errors import MissingExtraError
moon.trainer.Recipe
try:
    moon.trainer.Sparsifier
except MissingExtraError as error:
    assert "moon-toolkit[train]" in str(error), error
    print("named")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "named", done.stderr
