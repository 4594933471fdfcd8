"""``moon train``: train a recipe into a run folder."""

from __future__ import annotations

__all__ = ["TrainingView", "train", "training_view"]

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moon.cli.console import error_console, note, output, print_json
from moon.cli.facts import run_facts
from moon.cli.options import AsJson, Debug
from moon.cli.text import count, figure, grid, pairs, percent, share

_SHOWN_EPOCHS = 10


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A name of moon recipes, or a .toml file.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The folder of the run.")],
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe; repeatable."),
    ] = [],  # noqa: B006
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda|auto", help="Where to train.")
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in RUN, or start it.")
    ] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="Without CUDA graphs; the losses are the same.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a recipe; the run can be stopped at any time and goes on with --resume.

    Writes recipe.toml, metrics.jsonl, log.txt, last/ and, at the end, checkpoint.safetensors
    and checkpoint.json into RUN. moon export makes a bundle of it. Started by torchrun, as
    torchrun --nproc-per-node N -m moon train ..., N processes train one model together.
    """
    from moon.trainer.ranks import joined, stoppable
    from moon.trainer.recipes import find_recipe

    with stoppable(), joined(device) as ranks:
        with ranks.agreeing():
            chosen = find_recipe(recipe).override(settings)
        with training_view(chosen.epochs, shown=ranks.leads) as view:
            view.say("loading")
            from moon.trainer.fit import fit

            fit(
                chosen, out, device=device, resume=resume, report=view.report,
                progress=view.progress, graphs=not eager,
            )  # fmt: skip
        if ranks.leads:
            _tell(out, view, resume=resume, as_json=as_json)


def _tell(out: Path, view: TrainingView, *, resume: bool, as_json: bool) -> None:
    facts = run_facts(out)
    if as_json:
        print_json(facts)
        return
    if resume and not view.epochs_seen:
        note(f"{out} was finished already")
    _show(facts)


class TrainingView:
    """Shows epochs as they end: a live table on a terminal, else a line each on stderr."""

    def __init__(
        self, epochs: int, live: Live | None, bar: Progress | None, every: int = 1
    ) -> None:
        self._live, self._bar, self._every = live, bar, every
        self._recent: deque[Any] = deque(maxlen=_SHOWN_EPOCHS)
        self._task = bar.add_task("", total=epochs) if bar else None
        self.epochs_seen = 0

    def say(self, what: str) -> None:
        """Name a step that is no epoch."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)

    def progress(self, done: int, total: int, what: str) -> None:
        """Within an epoch, or while images are read."""
        self.say(what if what.startswith("epoch ") else f"{what} {done}/{total}")

    def report(self, record: Any) -> None:
        """After an epoch."""
        self.epochs_seen += 1
        if self._live is None or self._bar is None or self._task is None:
            if record.epoch % self._every == 0 or record.epoch == record.epochs:
                note(epoch_line(record))
            return
        self._recent.append(record)
        self._bar.update(self._task, completed=record.epoch)
        self._live.update(Group(_epochs(self._recent), self._bar))


@contextmanager
def training_view(epochs: int, every: int = 1, *, shown: bool = True) -> Iterator[TrainingView]:
    """Show training on stderr until the block ends; off a terminal, ``every`` so many epochs.

    Args:
        shown: False shows nothing unless told to.
    """
    console = error_console()
    if not console.is_terminal or not shown:
        yield TrainingView(epochs, None, None, every)
        return
    bar = Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with Live(bar, console=console, transient=True, refresh_per_second=8) as live:
        yield TrainingView(epochs, live, bar)


def epoch_line(record: Any) -> str:
    """An epoch in one plain line."""
    unknown = "" if record.p_unknown is None else f"p(unknown) {record.p_unknown:.2e}, "
    return (
        f"epoch {record.epoch}/{record.epochs}: loss {record.loss:.4f}, "
        f"accuracy {percent(record.accuracy, 2)}, {unknown}w {record.w:.3g}, "
        f"density {percent(record.density, 2)}, {record.seconds:.1f} s"
    )


def _epochs(records: deque[Any]) -> Table:
    figures = ("epoch", "loss", "accuracy", "p(unknown)", "w", "lr", "density", "s")
    table = grid(*figures, right=figures)
    for column in table.columns:
        column.min_width = 7  # so that columns keep their place from epoch to epoch
    for r in records:
        table.add_row(
            f"{r.epoch}/{r.epochs}",
            f"{r.loss:.4f}",
            percent(r.accuracy, 2),
            "-" if r.p_unknown is None else f"{r.p_unknown:.1e}",
            figure(r.w),
            f"{r.lr:.4f}",
            percent(r.density, 2),
            f"{r.seconds:.1f}",
        )
    return table


def _show(facts: dict[str, Any]) -> None:
    metrics = facts["metrics"]
    table = pairs()
    table.add_row("Run", escape(facts["path"]))
    held_out = f"on {metrics['validation_images']:,} held-out images"
    table.add_row("Accuracy", f"{percent(metrics['accuracy'], 2)} {held_out}")
    zeros = f"of {facts['weights']:,} weights are zero"
    table.add_row("Sparsity", f"{percent(facts['sparsity'])} {zeros}")
    if facts["flops"] is not None:
        part = share(facts["flops"], facts["flops_dense"])
        table.add_row("FLOPs an image", f"{count(facts['flops'])}, {part} of dense")
    table.add_row("Next", f"moon export {escape(facts['path'])} --out {escape(facts['path'])}.moon")
    output().print(table)
