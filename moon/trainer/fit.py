"""fit: from a Recipe to a Checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack

from moon.errors import DivergedError, MissingExtraError, UsageError
from moon.progress import Progress, silent
from moon.trainer.checkpoint import Checkpoint, versions
from moon.trainer.dataset import open_dataset
from moon.trainer.device import describe, find_device, reproducible
from moon.trainer.finish import finish
from moon.trainer.pixels import MEMORY_BUDGET
from moon.trainer.ranks import Ranks, joined
from moon.trainer.recipe import Recipe
from moon.trainer.runlog import RunFolder, parse_state
from moon.trainer.session import EpochRecord, Session

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
    graphs: bool = True,
) -> Checkpoint:
    """Train a recipe, in this process or, under torchrun, together with others.

    At the end the votes' average takes the place of the weights, its batch-norm statistics
    are recomputed on the training images, and the sparsity is checked.

    Several processes share every batch of the recipe's size out, and end with the same
    weights. They are those of torch.distributed where it is initialised, else those that
    torchrun started; rank 0 alone writes ``out``, reports and tells of progress, and an
    error on one of them ends all.

    Args:
        recipe: what to train.
        out: the run's folder; None keeps nothing on disk.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` (CUDA where there is one). CUDA
            trains in bfloat16 mixed precision. Each of several processes takes the device
            of its local rank.
        resume: go on with the run in ``out``, whose weights then become bit for bit what
            they would have been, by as many processes; with none there, start it.
        report: called after each epoch.
        progress: called while images are decoded and within epochs.
        budget: bytes of decoded images kept in memory; larger sets are streamed.
        workers: processes that decode streamed images; the result does not depend on it.
        graphs: replay steps as CUDA graphs where that can be done; the losses are the same.

    Returns:
        The checkpoint, which is also in ``out``; the same in every process.

    Raises:
        UsageError: ``out`` holds something else, or the recipe cannot be run.
        BackendError: there is no such device.
        DataError: the images cannot be read.
        DivergedError: the loss became NaN or infinite; ``out`` keeps the last good epoch.
        TrainingError: a state cannot be resumed, or another process was lost.
        MoonError: ``out`` could not be written.
    """
    with joined(device) as ranks:
        recipe = recipe.resolved()
        with ranks.agreeing():
            place = find_device(device, ranks)
            if out is None and resume:
                raise UsageError("there is no run to resume", remedy="Give out, the run's folder")
        finished = ranks.decide(lambda: _finished(out, recipe, resume=resume))
        if finished is not None:
            return finished
        if not ranks.leads:
            report, progress = _no_report, silent
        folder: RunFolder | None = None

        def say(text: str) -> None:
            if folder is not None:
                folder.log(text)

        with ExitStack() as stack:
            stack.enter_context(reproducible(place))
            with ranks.agreeing():
                data = open_dataset(
                    recipe, place, budget=budget, workers=workers, progress=progress, ranks=ranks
                )
            with ranks.agreeing():
                session = Session(recipe, data, place, graphs=graphs, say=say, ranks=ranks)
            # Not before the recipe has been found to work: a mistake leaves no folder behind.
            folder = _open(stack, out, recipe, ranks, resume=resume)
            _begin(session, folder, out)
            checkpoint = _train(session, folder, report, progress, say)
        # Nobody goes on before the files are there.
        ranks.settle(None)
        return checkpoint


def _finished(
    out: str | os.PathLike[str] | None, recipe: Recipe, *, resume: bool
) -> Checkpoint | None:
    """What the folder holds, if the run in it has come to its end."""
    if out is None:
        return None
    if RunFolder.check(out, recipe, resume=resume):
        return Checkpoint.load(out)
    _need_checkpoints()
    return None


def _open(
    stack: ExitStack,
    out: str | os.PathLike[str] | None,
    recipe: Recipe,
    ranks: Ranks,
    *,
    resume: bool,
) -> RunFolder | None:
    """The run's folder, until the stack is left; None where another rank has it, or nobody."""
    folder = None
    with ranks.agreeing():
        if out is not None and ranks.leads:
            folder = stack.enter_context(RunFolder(out, recipe, resume=resume))
    return folder


def _train(
    session: Session,
    folder: RunFolder | None,
    report: Report,
    progress: Progress,
    say: Callable[[str], None],
) -> Checkpoint:
    while session.epoch < session.recipe.epochs:
        record = _epoch(session, folder, progress)
        if folder is not None:
            folder.save(session.state(), session.history)
            folder.log(_line(record))
        report(record)
    checkpoint = finish(session, progress, say)
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


def _begin(session: Session, folder: RunFolder | None, out: str | os.PathLike[str] | None) -> None:
    """Take up the state that rank 0 finds in its folder, or start a log there."""
    ranks = session.ranks
    saved = ranks.decide(lambda: None if folder is None else folder.read())
    with ranks.agreeing():
        if saved is not None and out is not None:
            session.restore(parse_state(saved, session.device, out))
        if folder is not None and saved is not None:
            folder.write_metrics(session.history)
            folder.log(f"resuming after epoch {session.epoch}")
        elif folder is not None:
            _log_start(session, folder)
    data = session.data
    ranks.check_same(
        {
            "the recipe": session.recipe.hash,
            "the release": json.dumps(versions()),
            "the number of training images": str(data.train.images),
            "the hash of the held-out images": data.held_out.sha256,
        }
    )
    session.check_ranks()


def _log_start(session: Session, folder: RunFolder) -> None:
    recipe, data = session.recipe, session.data
    facts = ", ".join(f"{name} {version}" for name, version in versions().items())
    folder.log(f"recipe {recipe.name}, sha256 {recipe.hash}")
    folder.log(f"{facts}, device {describe(session.device)}")
    if session.ranks.world > 1:
        folder.log(f"{session.ranks.world} processes")
    folder.log(
        f"{data.train.images} training images, {data.validation.images} held out, "
        f"{len(data.classes)} classes, {session.steps} steps an epoch"
    )
    for note in session.notes:
        folder.log(note)
    if recipe.votes and not recipe.vote_epochs:
        folder.log(f"nothing votes: moon.vote_epochs is 0 of {recipe.epochs} epochs")
    for name, density in session.sparsifier.densities.items():
        folder.log(f"density of {name}: {density:.4f}")


def _line(record: EpochRecord) -> str:
    unknown = "" if record.p_unknown is None else f", p_unknown {record.p_unknown:.2e}"
    return (
        f"epoch {record.epoch}/{record.epochs}: loss {record.loss:.4f}, "
        f"accuracy {record.accuracy:.4f}, w {record.w:.4g}{unknown}, "
        f"lr {record.lr:.4g}, {record.seconds:.1f} s"
    )
