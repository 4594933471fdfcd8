"""finish: from a session whose epochs are over to its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moon.errors import CalibrationError, TrainingError
from moon.progress import Progress
from moon.trainer.accounting.accounts import Accounts, account
from moon.trainer.accounting.costs import LayerCost, training_flops
from moon.trainer.checkpoint import Checkpoint, versions
from moon.trainer.device import describe
from moon.trainer.recipe import MOVING_RULES
from moon.trainer.session import Session
from moon.trainer.temperature import fit_temperature, fold_temperature_
from moon.trainer.voting import recompute_batch_norm

__all__ = ["finish"]


def finish(session: Session, progress: Progress, say: Callable[[str], None]) -> Checkpoint:
    """The final weights and everything about them.

    Raises:
        TrainingError: the weights are not as sparse as they should be.
    """
    recipe, data, model = session.recipe, session.data, session.model
    if session.votes.count:
        session.votes.apply_(model)
        _recompute_batch_norm(session, progress)
    temperature = _scale(session, say)
    session.check_ranks()
    accounts = _account(session)
    _check_sparsity(session, accounts.layers)
    return Checkpoint(
        recipe=recipe,
        classes=data.classes,
        unknown_index=session.unknown_index,
        preprocess=recipe.data.preprocess,
        state={k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()},
        masks={n: m.cpu().clone().contiguous() for n, m in session.sparsifier.masks.items()},
        validation=data.held_out,
        layers=accounts.layers,
        metrics=_metrics(session, accounts) | temperature,
        versions={**versions(), "device": describe(session.device)},
        training=data.trained_on,
    )


def _recompute_batch_norm(session: Session, progress: Progress) -> None:
    """Over whole batches, of which each rank takes its part; then averaged by their images."""
    ranks, model = session.ranks, session.model
    batches = session.data.train.epoch(session.recipe.epochs + 1)
    first = next(batches, None)
    seen = 0
    if first is not None:
        mine = -(-(session.steps - ranks.rank) // ranks.world)
        seen = recompute_batch_norm(model, _counted(chain([first], batches), mine, progress))
    ranks.average_norms(model, seen)


def _counted(batches: Iterator[Any], count: int, progress: Progress) -> Iterator[Any]:
    for done, batch in enumerate(batches):
        progress(done, count, "batch norm")
        yield batch
    progress(count, count, "batch norm")


@torch.no_grad()
def _scale(session: Session, say: Callable[[str], None]) -> dict[str, float]:
    """Divide the head by the temperature that fits the images kept for that, if any."""
    batches = session.data.scaling
    if batches is None:
        return {}
    session.model.eval()
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for x_BCHW, target_B in batches.epoch():
        logits.append(session.model(x_BCHW).float().cpu())
        labels.append(target_B.cpu())
    try:
        # Over the unknown too: that is the softmax which answers give their probabilities by.
        fitted = fit_temperature(
            torch.cat(logits),
            torch.cat(labels),
            unknown_index=session.unknown_index,
            over_unknown=True,
        )
    except CalibrationError as error:
        say(f"the temperature stays 1: {error.cause}")
        return {"temperature": 1.0}
    fold_temperature_(session.model, fitted.temperature)
    say(
        f"temperature {fitted.temperature:.4f} on {fitted.samples} held-out images: "
        f"NLL {fitted.nll_before:.4f} to {fitted.nll_after:.4f}, "
        f"ECE {fitted.ece_before:.4f} to {fitted.ece_after:.4f}"
    )
    return {"temperature": fitted.temperature}


def _account(session: Session) -> Accounts:
    preprocess, device = session.recipe.data.preprocess, session.device
    example = torch.zeros(1, preprocess.channels, *preprocess.crop, device=device)
    with session.step.autocast():
        return account(
            session.model, example, masks=session.sparsifier.masks, optimizer=session.optimizer
        )


def _check_sparsity(session: Session, layers: tuple[LayerCost, ...]) -> None:
    weights = dict(session.model.named_parameters())
    masks = session.sparsifier.masks
    for layer in layers:
        target = session.sparsifier.nonzeros[layer.name]
        mask = masks.get(layer.name)
        if mask is None:
            continue
        stray = int(((weights[layer.name] != 0) & ~mask).sum())
        if stray or layer.nonzeros != target:
            raise TrainingError(
                f"{layer.name} should have {target} connections, has {layer.nonzeros}, "
                f"and {stray} weights outside them"
            )


def _metrics(session: Session, accounts: Accounts) -> dict[str, Any]:
    recipe, data, layers = session.recipe, session.data, accounts.layers
    nonzeros = sum(session.sparsifier.nonzeros.values())
    weights = sum(session.model.get_parameter(layer.name).numel() for layer in layers)
    moves = recipe.rule in MOVING_RULES
    return {
        "accuracy": session.accuracy(),
        "validation_images": data.validation.images,
        "training_images": data.train.images,
        "epochs": recipe.epochs,
        "processes": session.ranks.world,
        "votes": session.votes.count,
        "weights": weights,
        "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / weights,
        "flops": accounts.flops,
        "dense_flops": accounts.dense_flops,
        "training_flops": training_flops(
            layers,
            rule=recipe.rule,
            examples=recipe.epochs * data.train.images,
            interval=recipe.update.interval,
            updating=recipe.update.stop if moves else 0.0,
        ),
        "memory": accounts.totals(recipe.batch_size),
        "turnover": session.sparsifier.turnover,
        "seconds": round(sum(record["seconds"] for record in session.history), 3),
    }
