"""Session: all that changes while a recipe is trained, one epoch at a time.

Shape suffixes: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from moon.errors import DivergedError, TrainingError
from moon.progress import Progress, silent
from moon.trainer.augment import DROPOUT, generator
from moon.trainer.batches import Batches
from moon.trainer.dataset import Dataset
from moon.trainer.models import build
from moon.trainer.objective import Criterion, make_criterion
from moon.trainer.pretrained import load_pretrained
from moon.trainer.rate import learning_rate
from moon.trainer.recipe import Recipe
from moon.trainer.sparsifier import Sparsifier
from moon.trainer.step import Step, Sums, Tally
from moon.trainer.voting import Votes

__all__ = ["EpochRecord", "Session", "accuracy"]

STATE_VERSION = 1
# Steps between looks at the loss, each of which waits for the device.
CHECK_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One line of metrics.jsonl.

    Attributes:
        epoch: from 1, of ``epochs``.
        loss: mean over the training images.
        w: weight of the unknown in the loss.
        p_unknown: mean probability of the unknown over the training images; None without one.
        accuracy: of the present weights on the held-out images, among the known classes.
        train_accuracy: on the training images as they were learned from.
        density: nonzeros over weights, of the Conv and Linear layers.
        lr: learning rate of the last step.
        turnover: connections grown so far over connections.
        voted: whether the epoch's weights count in the final average.
        seconds: spent on the epoch.
    """

    epoch: int
    epochs: int
    loss: float
    w: float
    p_unknown: float | None
    accuracy: float
    train_accuracy: float
    density: float
    lr: float
    turnover: float
    voted: bool
    seconds: float


class Session:
    """Model, optimizer, sparsifier, loss and votes of a run.

    Everything random in an epoch follows from (seed, epoch), so that a session restored
    from ``state()`` goes on exactly as the one that made it would have.

    Args:
        recipe: resolved.
        data: its images, on ``device``.
        graphs, say: see :class:`moon.trainer.step.Step`.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        device: torch.device,
        *,
        graphs: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.device = device
        self.known = len(data.classes)
        self.unknown_index = self.known if recipe.moon.enabled else None
        self.model, self.notes = _model(recipe, self.known + recipe.moon.enabled)
        self.model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            # A tensor, so that a captured step reads the rate of the moment.
            lr=torch.tensor(recipe.lr, device=device) if device.type == "cuda" else recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            fused=True if device.type == "cuda" else None,
        )
        self.steps = len(data.train)
        self.sparsifier = _sparsifier(recipe, self.model, self.optimizer, self.steps)
        self.objective = Criterion(make_criterion(recipe, self.unknown_index).to(device))
        self.tally = Tally(self.known, self.unknown_index, device)
        self.step = Step(
            self.model,
            self.optimizer,
            self.sparsifier,
            self.objective,
            self.tally,
            data.train.prepare,
            device,
            graphs=graphs,
            say=say,
        )
        self.votes = Votes()
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

    def run_epoch(self, progress: Progress = silent) -> EpochRecord:
        """Train the next epoch, measure it, and let it vote where it should.

        Raises:
            DivergedError: the loss became NaN or infinite.
        """
        start = time.perf_counter()
        recipe, epoch = self.recipe, self.epoch + 1
        voted = epoch > recipe.epochs - recipe.vote_epochs
        if voted:
            self.sparsifier.freeze()
        count, sums = self._train(epoch, progress)
        if voted:
            self.votes.add(self.model, self.sparsifier.masks)
        record = EpochRecord(
            epoch=epoch,
            epochs=recipe.epochs,
            loss=sums.loss / count,
            w=self.objective.w,
            p_unknown=None if self.unknown_index is None else sums.p_unknown / count,
            accuracy=self.accuracy(),
            train_accuracy=sums.correct / count,
            density=self.sparsifier.density,
            lr=self._rate(epoch, self.steps - 1),
            turnover=self.sparsifier.turnover,
            voted=voted,
            seconds=round(time.perf_counter() - start, 3),
        )
        self.epoch = epoch
        self.history.append(asdict(record))
        return record

    def _train(self, epoch: int, progress: Progress) -> tuple[int, Sums]:
        """How many images were seen, and the sums over them."""
        torch.manual_seed(int(generator(self.recipe.seed, epoch, DROPOUT).integers(1 << 62)))
        self.model.train()
        self.objective.start_epoch(epoch)
        self.tally.reset()
        count = 0
        what = f"epoch {epoch} of {self.recipe.epochs}"
        for step, batch in enumerate(self.data.train.raw_epoch(epoch)):
            self.step(batch, self._rate(epoch, step))
            count += len(batch.labels)
            if (step + 1) % CHECK_EVERY == 0:
                self._check_finite(epoch)
                progress(step + 1, self.steps, what)
        self._check_finite(epoch)
        progress(self.steps, self.steps, what)
        return count, self.tally.sums()

    def _rate(self, epoch: int, step: int) -> float:
        return learning_rate(self.recipe, (epoch - 1) * self.steps + step, self.steps)

    def _check_finite(self, epoch: int) -> None:
        bad = self.tally.first_bad
        if bad is None:
            return
        step, loss = bad
        raise DivergedError(
            f"the loss became {loss} at step {(epoch - 1) * self.steps + step + 1} (epoch {epoch})",
            remedy=f"Set a lower lr than {self.recipe.lr:g}, or check the images",
        )

    def accuracy(self) -> float:
        """Of the model's present weights on the held-out images."""
        return accuracy(self.model, self.data.validation, self.known)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which ``restore`` goes on bit for bit."""
        return {
            "version": STATE_VERSION,
            "recipe_sha256": self.recipe.hash,
            "held_out_sha256": self.data.held_out.sha256,
            "images": self.data.train.images,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "criterion": self.objective.state_dict(),
            "votes": self.votes.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            TrainingError: it is of other data, another recipe or another release.
        """
        if state.get("version") != STATE_VERSION or state["recipe_sha256"] != self.recipe.hash:
            raise TrainingError(
                "the saved state is of another recipe or release",
                remedy="Start again with another --out",
            )
        data = (self.data.held_out.sha256, self.data.train.images)
        if (state["held_out_sha256"], state["images"]) != data:
            raise TrainingError(
                f"{self.recipe.data.train} has changed since the run began",
                remedy="Restore the images, or start again with another --out",
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.objective.load_state_dict(state["criterion"])
        self.votes.load_state_dict(state["votes"])
        self.epoch = state["epoch"]
        self.history = list(state["history"])


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, known: int) -> float:
    """Share of right answers among the first ``known`` logits; the model is put in eval mode."""
    model.eval()
    correct = count = 0
    for x_BCHW, target_B in batches.epoch():
        correct += int((model(x_BCHW)[:, :known].argmax(1) == target_B).sum())
        count += len(target_B)
    return correct / count


def _model(recipe: Recipe, outputs: int) -> tuple[nn.Module, list[str]]:
    preprocess = recipe.data.preprocess
    model = build(
        recipe.model,
        outputs=outputs,
        channels=preprocess.channels,
        size=preprocess.crop,
        seed=recipe.seed,
    )
    notes = load_pretrained(model, recipe.model, recipe.pretrained) if recipe.pretrained else []
    return model, notes


def _sparsifier(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> Sparsifier:
    return Sparsifier(
        model,
        optimizer,
        density=1 - recipe.sparsity,
        rule=recipe.rule,
        distribution=recipe.distribution,
        structure=recipe.structure,
        total_steps=steps * recipe.epochs,
        interval=recipe.update.interval,
        drop_fraction=recipe.update.drop_fraction,
        stop=recipe.update.stop,
        dense=recipe.dense,
        seed=recipe.seed,
        # Trained weights say which connections matter; fresh ones do not.
        init="magnitude" if recipe.pretrained else "random",
    )
