"""The whole step of `moon train`, for benchmarks/training.py: augmentation, forward, loss,
backward, masking, optimizer and sums, eager and in CUDA graphs.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training_loops import CLASSES, pixels, seconds
from moon.trainer.dataset import open_dataset
from moon.trainer.device import reproducible
from moon.trainer.recipes import find_recipe
from moon.trainer.session import Session

# Of the paper's schedule: past the warm-up, before the first vote.
EPOCH = 60
# Batches of the random set; a whole epoch of indices is drawn at once.
BATCHES = 100


class WholeStep:
    """A session of the CIFAR-10 recipe over random images, one step at a time."""

    def __init__(self, options: argparse.Namespace, *, graphs: bool) -> None:
        self.device = torch.device(options.device)
        self.clock = options.clock
        self.notes: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            recipe = find_recipe("cifar10-resnet18-rigl95-moon").override(
                [
                    f"data.train={random_images(Path(folder), options)}#train",
                    f"data.val={10 * CLASSES}",
                    f"data.preprocess.crop=[{pixels(options)}, {pixels(options)}]",
                    f"model={options.model}",
                    f"batch_size={options.batch}",
                    f"sparsity={options.sparsity}",
                    f"rule={options.rule}",
                    f"structure={options.structure}",
                ]
            )
            recipe = recipe.resolved()
            # Decoded and on the device from here on: the folder may go.
            data = open_dataset(recipe, self.device, workers=0)
        self.session = Session(recipe, data, self.device, graphs=graphs, say=self.notes.append)
        self.session.model.train()
        self._rate = recipe.lr / 2
        self._steps = self._endless()

    def _endless(self) -> Iterator[None]:
        """One step of the session for each item asked for, epoch after epoch."""
        session = self.session
        for epoch in itertools.count(EPOCH):
            session.objective.start_epoch(epoch, session.data.train.sizes)
            session.tally.reset()
            for number, batch in enumerate(session.data.train.raw_epoch(epoch)):
                step = (epoch - 1) * session.steps + number
                session.step(batch, self._rate, step=step, number=number)
                yield

    def step(self) -> None:
        next(self._steps)

    def seconds(self, calls: list[Callable[[], None]]) -> list[float]:
        return seconds(self.device, calls, clock=self.clock)


def random_images(folder: Path, options: argparse.Namespace) -> Path:
    """A labelled set as an npz file: random pixels of the benchmark's size."""
    draw = np.random.default_rng(0)
    count, side = BATCHES * options.batch + 10 * CLASSES, pixels(options)
    path = folder / "random.npz"
    images = draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    np.savez(path, train_images=images, train_labels=np.arange(count) % CLASSES)
    return path


def whole_steps(
    options: argparse.Namespace, take_turns: Callable[..., dict[str, list[float]]]
) -> dict[str, Any]:
    """Seconds of a step and of a run, eager and, on CUDA, in graphs.

    ``step_seconds`` is the median of the rounds; ``mean_seconds`` is over 200 steps on end,
    topology updates included, and ``run_seconds`` that for all steps of the given epochs.
    """
    # As `fit` does: it decides which kernels cuDNN takes.
    with reproducible(torch.device(options.device)):
        return _whole_steps(options, take_turns)


def _whole_steps(
    options: argparse.Namespace, take_turns: Callable[..., dict[str, list[float]]]
) -> dict[str, Any]:
    kinds = {"eager": False, "graphs": True} if options.device == "cuda" else {"eager": False}
    loops = {name: WholeStep(options, graphs=graphs) for name, graphs in kinds.items()}
    rounds = take_turns(loops, options.rounds, options.steps)
    found = {}
    for name, loop in loops.items():
        on_end = loop.seconds([loop.step] * (200 if options.device == "cuda" else 10))
        mean = float(np.mean(on_end))
        steps = options.epochs * -(-options.images // options.batch)
        found[name] = {
            "step_seconds": float(np.median(rounds[name])),
            "mean_seconds": mean,
            "run_seconds": steps * mean,
            "notes": loop.notes,
        }
    return found
