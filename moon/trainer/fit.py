"""fit: from a Recipe to a Checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from moon.errors import (
    BackendError,
    DivergedError,
    MissingExtraError,
    TrainingError,
    UsageError,
)
from moon.progress import Progress, silent
from moon.trainer.batches import MEMORY_BUDGET
from moon.trainer.checkpoint import Checkpoint, versions
from moon.trainer.dataset import open_dataset
from moon.trainer.flops import LayerCost, count_flops, training_flops
from moon.trainer.recipe import MOVING_RULES, Recipe
from moon.trainer.runlog import RunFolder
from moon.trainer.session import EpochRecord, Session, accuracy
from moon.trainer.voting import recompute_batch_norm

__all__ = ["EpochRecord", "Report", "fit"]

Report = Callable[[EpochRecord], None]


def _no_report(record: EpochRecord) -> None:
    """The default: tell nobody."""


def fit(
    recipe: Recipe,
    out: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    resume: bool = False,
    report: Report = _no_report,
    progress: Progress = silent,
    budget: int = MEMORY_BUDGET,
    workers: int | None = None,
) -> Checkpoint:
    """Train a recipe.

    At the end the votes' average takes the place of the weights, its batch-norm statistics
    are recomputed on the training images, and the sparsity is checked.

    Args:
        recipe: what to train.
        out: the run's folder; None keeps nothing on disk.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` (CUDA where there is one). CUDA
            trains in bfloat16 mixed precision.
        resume: go on with the run in ``out``, whose weights then become bit for bit what
            they would have been; with none there, start it.
        report: called after each epoch.
        progress: called while images are decoded and within epochs.
        budget: bytes of decoded images kept in memory; larger sets are streamed.
        workers: processes that decode streamed images; the result does not depend on it.

    Returns:
        The checkpoint, which is also in ``out``.

    Raises:
        UsageError: ``out`` holds something else, or the recipe cannot be run.
        BackendError: there is no such device.
        DataError: the images cannot be read.
        DivergedError: the loss became NaN or infinite; ``out`` keeps the last good epoch.
        MoonError: ``out`` could not be written.
    """
    recipe = recipe.resolved()
    place = _device(device)
    if out is None and resume:
        raise UsageError("there is no run to resume", remedy="Give out, the run's folder")
    if out is not None and RunFolder.check(out, recipe, resume=resume):
        return Checkpoint.load(out)
    if out is not None:
        _need_checkpoints()
    with ExitStack() as stack:
        stack.enter_context(_reproducible(place))
        data = open_dataset(recipe, place, budget=budget, workers=workers, progress=progress)
        session = Session(recipe, data, place)
        folder = None
        if out is not None:
            # Not before the recipe has been found to work: a mistake leaves no folder behind.
            folder = stack.enter_context(RunFolder(out, recipe, resume=resume))
            _begin(session, folder)
        while session.epoch < recipe.epochs:
            record = _epoch(session, folder, progress)
            if folder is not None:
                folder.save(session.state(), session.history)
                folder.log(_line(record))
            report(record)
        checkpoint = _finish(session, progress)
        if folder is not None:
            checkpoint.save(folder.path)
            folder.log(f"finished: accuracy {checkpoint.metrics['accuracy']:.4f}")
        return checkpoint


def _epoch(session: Session, folder: RunFolder | None, progress: Progress) -> EpochRecord:
    """The next epoch; a loss that is not finite also says what is left and how to go on."""
    try:
        return session.run_epoch(progress)
    except DivergedError as error:
        if folder is None:
            raise
        folder.log(str(error))
        if not session.epoch:
            raise
        raise DivergedError(
            error.cause,
            remedy=f"{error.remedy}, and train into another --out: {folder.path} keeps epoch "
            f"{session.epoch}, from which --resume repeats the same steps",
        ) from error


def _need_checkpoints() -> None:
    """Find out before the first epoch, not after the last, that nothing could be kept."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("safetensors", "train", "a run that is kept") from error


def _begin(session: Session, folder: RunFolder) -> None:
    recipe, data = session.recipe, session.data
    state = folder.load(session.device)
    if state is not None:
        session.restore(state)
        folder.write_metrics(session.history)
        folder.log(f"resuming after epoch {session.epoch}")
        return
    facts = ", ".join(f"{name} {version}" for name, version in versions().items())
    folder.log(f"recipe {recipe.name}, sha256 {recipe.hash}")
    folder.log(f"{facts}, device {_describe(session.device)}")
    folder.log(
        f"{data.train.images} training images, {data.validation.images} held out, "
        f"{len(data.classes)} classes, {session.steps} steps an epoch"
    )
    for note in session.notes:
        folder.log(note)
    if recipe.moon.enabled and recipe.moon.vote and not recipe.vote_epochs:
        folder.log(f"nothing votes: moon.vote_epochs is 0 of {recipe.epochs} epochs")
    for name, density in session.sparsifier.densities.items():
        folder.log(f"density of {name}: {density:.4f}")


def _finish(session: Session, progress: Progress) -> Checkpoint:
    """The final weights and everything about them."""
    recipe, data, model = session.recipe, session.data, session.model
    if session.votes.count:
        session.votes.apply_(model)
        recompute_batch_norm(model, _counted(session, progress))
    masks = session.sparsifier.masks
    example = torch.zeros(
        1, recipe.data.preprocess.channels, *recipe.data.preprocess.crop, device=session.device
    )
    layers = count_flops(model, example, masks)
    _check_sparsity(session, layers)
    return Checkpoint(
        recipe=recipe,
        classes=data.classes,
        unknown_index=session.unknown_index,
        preprocess=recipe.data.preprocess,
        state={k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()},
        masks={name: mask.cpu().clone().contiguous() for name, mask in masks.items()},
        validation=data.held_out,
        layers=layers,
        metrics=_metrics(session, layers),
        versions={**versions(), "device": _describe(session.device)},
    )


def _counted(session: Session, progress: Progress) -> Iterator[Any]:
    batches = session.data.train
    for done, batch in enumerate(batches.epoch(session.recipe.epochs + 1)):
        progress(done, len(batches), "batch norm")
        yield batch
    progress(len(batches), len(batches), "batch norm")


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


def _metrics(session: Session, layers: tuple[LayerCost, ...]) -> dict[str, Any]:
    recipe, data = session.recipe, session.data
    nonzeros = sum(session.sparsifier.nonzeros.values())
    weights = sum(session.model.get_parameter(layer.name).numel() for layer in layers)
    moves = recipe.rule in MOVING_RULES
    return {
        "accuracy": accuracy(session.model, data.validation, session.known),
        "validation_images": data.validation.images,
        "training_images": data.train.images,
        "epochs": recipe.epochs,
        "votes": session.votes.count,
        "weights": weights,
        "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / weights,
        "flops": sum(layer.flops for layer in layers),
        "dense_flops": sum(layer.dense_flops for layer in layers),
        "training_flops": training_flops(
            layers,
            rule=recipe.rule,
            examples=recipe.epochs * data.train.images,
            interval=recipe.update.interval,
            updating=recipe.update.stop if moves else 0.0,
        ),
        "turnover": session.sparsifier.turnover,
        "seconds": round(sum(record["seconds"] for record in session.history), 3),
    }


def _line(record: EpochRecord) -> str:
    unknown = "" if record.p_unknown is None else f", p_unknown {record.p_unknown:.2e}"
    return (
        f"epoch {record.epoch}/{record.epochs}: loss {record.loss:.4f}, "
        f"accuracy {record.accuracy:.4f}, w {record.w:.4g}{unknown}, "
        f"lr {record.lr:.4g}, {record.seconds:.1f} s"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise UsageError(f"there is no device {name!r}", remedy="Give cpu, cuda or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"there is no CUDA device {name} here", remedy="Use --device cpu, or check the driver"
        )
    return device


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Leave the caller's generators alone, and have cuDNN add in a fixed order."""
    devices = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn
    with torch.random.fork_rng(devices=devices):
        before = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
