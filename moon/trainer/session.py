"""Session: all that changes while a recipe is trained, one epoch at a time.

Shape suffixes: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import nn

from moon.errors import DivergedError, TrainingError, UsageError
from moon.progress import Progress, silent
from moon.trainer.augment import DROPOUT, generator
from moon.trainer.batches import Batches
from moon.trainer.dataset import Dataset
from moon.trainer.models import build
from moon.trainer.objective.objective import Objective
from moon.trainer.pretrained import load_pretrained
from moon.trainer.ranks import Ranks
from moon.trainer.rate import learning_rate
from moon.trainer.recipe import Recipe
from moon.trainer.sparsity.sparsifier import Sparsifier
from moon.trainer.step import Step, Sums, Tally
from moon.trainer.temperature import check_head
from moon.trainer.voting import Votes

__all__ = ["EpochRecord", "Session", "accuracy"]

STATE_VERSION = 1
# Steps between looks at the loss, each of which waits for the device.
CHECK_EVERY = 50
# The authors' code votes at each step of the first tenth of an epoch.
SNAPSHOT_SHARE = 10


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One line of metrics.jsonl.

    Attributes:
        epoch: from 1, of ``epochs``.
        loss: mean over the training images.
        w: weight of the unknown in the loss; of ``dac``, the price of abstaining.
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
        graphs, say: see :class:`moon.trainer.step.Step`; several ranks go without graphs.
        ranks: the processes that train together, of which this session is one's.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        device: torch.device,
        *,
        graphs: bool = True,
        say: Callable[[str], None] = lambda text: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.recipe = recipe
        self.data = data
        self.device = device
        self.known = len(data.classes)
        self.unknown_index = self.known if recipe.unknown else None
        with self.ranks.in_turn():
            self.model, self.notes = _model(recipe, self.known + recipe.unknown)
        self.model.to(device).to(memory_format=torch.channels_last)
        self.objective = Objective(
            recipe,
            self.model,
            known=self.known,
            unknown_index=self.unknown_index,
            device=device,
        )
        # Groups of their own: the fused kernels want momentum for all of a group or for none,
        # and what else is learned may get its first gradient epochs later.
        learned = [[*self.model.parameters()], [*self.objective.parameters()]]
        self.optimizer = torch.optim.SGD(
            [{"params": parameters} for parameters in learned if parameters],
            # A tensor, so that a captured step reads the rate of the moment.
            lr=torch.tensor(recipe.lr, device=device) if device.type == "cuda" else recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            fused=True if device.type == "cuda" else None,
        )
        if recipe.vos is not None and self.ranks.world > 1:
            raise UsageError(
                "vos remembers features of its own on each process",
                remedy="Train it in one process",
            )
        self.steps = len(data.train)
        self.sparsifier = _sparsifier(recipe, self.model, self.optimizer, self.steps)
        self.objective.follow(self.model, self.sparsifier.masks)
        self.tally = Tally(self.known, self.unknown_index, device)
        self.step = Step(
            self.ranks.wrap(self.model),
            self.optimizer,
            self.sparsifier,
            self.objective,
            self.tally,
            data.train.prepare,
            device,
            graphs=graphs and self.ranks.world == 1,
            say=say,
        )
        self.votes = Votes()
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

    def run_epoch(self, progress: Progress = silent) -> EpochRecord:
        """Train the next epoch, measure it, and let it vote where it should.

        Raises:
            DivergedError: the loss became NaN or infinite.
            TrainingError: the ranks no longer have the same masks or weights.
        """
        start = time.perf_counter()
        recipe, epoch = self.recipe, self.epoch + 1
        voted = epoch > recipe.epochs - recipe.vote_epochs
        if voted:
            self.sparsifier.freeze()
        count, sums = self._train(epoch, voted, progress)
        self.check_ranks()
        if voted and not recipe.follows("votes"):
            self._vote()
        record = EpochRecord(
            epoch=epoch,
            epochs=recipe.epochs,
            loss=sums.loss / count,
            w=self.objective.w,
            p_unknown=None if self.unknown_index is None else sums.p_unknown / count,
            accuracy=self.accuracy(),
            train_accuracy=sums.correct / count,
            density=self.sparsifier.density,
            lr=learning_rate(recipe, epoch * self.steps - 1, self.steps),
            turnover=self.sparsifier.turnover,
            voted=voted,
            seconds=round(time.perf_counter() - start, 3),
        )
        self.epoch = epoch
        self.history.append(asdict(record))
        return record

    def _train(self, epoch: int, voted: bool, progress: Progress) -> tuple[int, Sums]:
        """How many images were seen, and the sums over them."""
        draws = generator(self.recipe.seed, epoch, DROPOUT, self.ranks.rank)
        torch.manual_seed(int(draws.integers(1 << 62)))
        self.model.train()
        self.objective.start_epoch(epoch, self.data.train.sizes)
        self.tally.reset()
        count = 0
        official = voted and self.recipe.follows("votes")
        snapshots = max(1, self.steps // SNAPSHOT_SHARE) if official else 0
        what = f"epoch {epoch} of {self.recipe.epochs}"
        for number, batch in enumerate(self.data.train.raw_epoch(epoch)):
            step = (epoch - 1) * self.steps + number
            self.step(batch, learning_rate(self.recipe, step, self.steps), step=step, number=number)
            count += len(batch.labels)
            if number < snapshots:
                self._vote()
            if (number + 1) % CHECK_EVERY == 0:
                self._check_finite(epoch)
                progress(number + 1, self.steps, what)
        self._check_finite(epoch)
        progress(self.steps, self.steps, what)
        self.objective.end_epoch()
        self.ranks.spread_buffers(self.model)
        total, *sums = self.ranks.total([count, *astuple(self.tally.sums())])
        return int(total), Sums(*sums)

    def _vote(self) -> None:
        with self.objective.during_vote():
            self.votes.add(self.model, self.sparsifier.masks)

    def _check_finite(self, epoch: int) -> None:
        found = [bad for bad in self.ranks.gather(self.tally.first_bad) if bad is not None]
        if not found:
            return
        step, loss = min(found, key=lambda bad: bad[0])
        at = (epoch - 1) * self.steps + step + 1
        self.ranks.settle(
            DivergedError(
                f"the loss became {loss} at step {at} (epoch {epoch})",
                remedy=f"Set a lower lr than {self.recipe.lr:g}, or check the images",
            )
        )

    def check_ranks(self) -> None:
        """Whether all ranks have the same masks, weights and batch-norm statistics.

        Raises:
            TrainingError: they have not; names the first tensor and the ranks.
        """
        masks, state = self.sparsifier.masks, self.model.state_dict()
        self.ranks.check_same(
            {f"the mask of {name}": mask for name, mask in masks.items()}
            | {f"the tensor {name}": value for name, value in state.items()}
        )

    def accuracy(self) -> float:
        """Of the model's present weights on the held-out images."""
        return accuracy(self.model, self.data.validation, self.known, self.ranks)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which ``restore`` goes on bit for bit."""
        return {
            "version": STATE_VERSION,
            "recipe_sha256": self.recipe.hash,
            "held_out_sha256": self.data.held_out.sha256,
            "images": self.data.train.images,
            "processes": self.ranks.world,
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
        world = state.get("processes", 1)
        if world != self.ranks.world:
            raise TrainingError(
                f"the run was trained by {_processes(world)}, this is {self.ranks.world}",
                remedy=f"Resume it with {_processes(world)}, or start again with another --out",
            )
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.param_groups
        # These two go by the device, which need not be the one that the state was saved on.
        own = [{"lr": group["lr"], "fused": group["fused"]} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, kept in zip(self.optimizer.param_groups, own, strict=True):
            group.update(kept)
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.objective.load_state_dict(state["criterion"])
        self.votes.load_state_dict(state["votes"])
        self.epoch = state["epoch"]
        self.history = list(state["history"])


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, known: int, ranks: Ranks | None = None) -> float:
    """Share of right answers among the first ``known`` logits; the model is put in eval mode.

    Each of several ranks looks at its own batches, and all of them get the same share.
    """
    model.eval()
    correct = count = 0
    for x_BCHW, target_B in batches.epoch():
        correct += int((model(x_BCHW)[:, :known].argmax(1) == target_B).sum())
        count += len(target_B)
    total_correct, total = (ranks or Ranks()).total([correct, count])
    return total_correct / total


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _model(recipe: Recipe, outputs: int) -> tuple[nn.Module, list[str]]:
    preprocess = recipe.data.preprocess
    model = build(
        recipe.model,
        outputs=outputs,
        channels=preprocess.channels,
        size=preprocess.crop,
        seed=recipe.seed,
    )
    if recipe.temperature:
        check_head(model)
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
        init=_init(recipe),
        cosine_steps=recipe.epochs if recipe.follows("drop-schedule") else None,
    )


def _init(recipe: Recipe) -> str:
    if recipe.pretrained:
        # Trained weights say which connections matter; fresh ones do not.
        return "magnitude"
    return "bernoulli" if recipe.follows("bernoulli") and recipe.rule != "dense" else "random"
