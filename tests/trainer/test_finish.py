"""What a run ends with: temperature, accounts, and what was refused before it began."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moon.errors import UsageError
from moon.trainer.fit import EpochRecord, fit
from tests.trainer.recipes_small import tiny_recipe


def test_temperature_scaling_ends_a_run(tmp_path: Path) -> None:
    settings = ("moon.enabled=false", "epochs=3", "data.val=60", "lr=0.2")
    plain = fit(tiny_recipe(*settings))
    scaled = fit(tiny_recipe(*settings, "temperature=true"), tmp_path / "run")
    temperature = scaled.metrics["temperature"]
    assert 0 < temperature != 1
    head = plain.state["head.weight"]
    assert torch.allclose(scaled.state["head.weight"], head / temperature, rtol=1e-6)
    assert torch.equal(scaled.state["head.weight"] != 0, head != 0)
    # Half of the images fitted it; calibration gets the others alone.
    assert plain.validation.indices is not None
    assert scaled.validation.indices == plain.validation.indices[1::2]
    assert scaled.metrics["validation_images"] == 30
    assert "temperature" in (tmp_path / "run" / "log.txt").read_text()
    assert "temperature" not in plain.metrics


def test_a_checkpoint_accounts_for_training(tmp_path: Path) -> None:
    checkpoint = fit(tiny_recipe("epochs=3", "moon.vote_epochs=1"))
    memory = checkpoint.metrics["memory"]
    weights = checkpoint.metrics["weights"]
    assert memory["batch_size"] == 32
    assert memory["slot_bytes"] >= 4 * weights and memory["gradient_bytes"] >= 4 * weights
    assert all(layer.mask_bytes is not None for layer in checkpoint.layers)


def test_a_head_without_a_place_for_a_temperature_is_found_out_before_training() -> None:
    settings = ("model=squeezenet1_1", "data.preprocess.crop=[64,64]", "temperature=true")
    began: list[EpochRecord] = []
    with pytest.raises(UsageError, match="a temperature is folded into a Linear layer"):
        fit(tiny_recipe(*settings), report=began.append)
    assert not began


def test_cigl_without_votes_is_said(tmp_path: Path) -> None:
    settings = ("moon.enabled=false", "cigl.rate=0.1", "moon.vote_epochs=0", "epochs=2")
    fit(tiny_recipe(*settings), tmp_path / "run")
    assert "nothing votes" in (tmp_path / "run" / "log.txt").read_text()
