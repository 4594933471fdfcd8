"""From a recipe to decisions, in Python: what `moon train`, `export` and `predict` do."""

from pathlib import Path
from tempfile import TemporaryDirectory

import moon
from moon.data import open_source
from moon.trainer.recipes import find_recipe

recipe = find_recipe("digits-cnn-rigl90-moon").override(["epochs=10", "seed=1"])
near = open_source("sklearn:digits#test{label in 8..9}")

with TemporaryDirectory() as folder:
    checkpoint = moon.fit(recipe, Path(folder) / "run")
    bundle = moon.to_bundle(checkpoint, Path(folder) / "digits.moon", reject=0.05)
    predictor = moon.Predictor.open(bundle)
    decisions = predictor.predict(near.item(i) for i in range(len(near)))
    abstained = sum(not decision.accepted for decision in decisions)
    sparsity = checkpoint.metrics["sparsity"]
    print(f"accuracy {checkpoint.metrics['accuracy']:.1%} at {sparsity:.0%} sparsity")
    print(f"abstains on {abstained} of {len(decisions)} digits it was never shown (8 and 9)")
