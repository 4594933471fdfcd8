"""Ranks: the processes that train one model together; alone, there is one of them.

Started by ``torchrun``, each of N processes is a rank, from 0 to N - 1. All of them run the
same code and hold the same weights; rank 0 also writes the run's folder and tells of progress.
``Ranks`` itself is a single process, for which nothing has to be done.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import moon.errors
from moon.errors import MoonError, TrainingError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["EndedError", "Failure", "Launch", "Ranks", "joined", "stoppable"]

T = TypeVar("T")


class EndedError(TrainingError):
    """SIGTERM came, to this process or to one that decodes its images."""

    def __init__(self) -> None:
        super().__init__(
            "ended by SIGTERM: another process of the run failed, or torchrun was stopped",
            remedy="Start all of them again with --resume",
        )


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error on one rank, in words that can be sent to the others."""

    rank: int
    kind: str
    cause: str
    remedy: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        if isinstance(error, MoonError):
            cause, remedy = error.cause, error.remedy
        else:
            cause, remedy = f"{type(error).__name__}: {error}".removesuffix(": "), ""
        return cls(rank=rank, kind=type(error).__name__, cause=cause, remedy=remedy)

    def error(self) -> MoonError:
        """An error of the same kind for another rank to raise, marked as told there."""
        kind = getattr(moon.errors, self.kind, TrainingError)
        if not issubclass(kind, MoonError) or kind.__init__ is not MoonError.__init__:
            kind = MoonError
        error: MoonError = kind(f"rank {self.rank}: {self.cause}", remedy=self.remedy)
        error.told = True
        return error


class Ranks:
    """The ranks of a run as one of them sees them; this class is a run of a single process.

    Every method but ``wrap`` is a collective: all ranks call it, in the same order.

    Attributes:
        rank: this process, from 0.
        world: how many there are.
        local_rank, local_world: the same among the processes of this machine.
    """

    rank = 0
    world = 1
    local_rank = 0
    local_world = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        return [value]

    def decide(self, action: Callable[[], T]) -> T:
        """What rank 0's ``action`` returned, everywhere; what it raised, everywhere."""
        return action()

    def settle(self, error: Exception | None) -> None:
        """Each rank brings its error, or None; the first rank's that has one is raised by all."""
        if error is not None:
            raise error

    def in_turn(self) -> AbstractContextManager[None]:
        """Rank 0 runs the block first and alone, say to download something; then the others."""
        return self.agreeing()

    def check_same(self, facts: Mapping[str, str | Tensor]) -> None:
        """Compare what should be equal on all ranks: texts, and tensors by their hash.

        Raises:
            TrainingError: it is not; names the first such fact and the ranks unlike rank 0.
        """

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks, for the training step alone."""
        return model

    def spread_buffers(self, model: nn.Module) -> None:
        """Overwrite the model's buffers (batch-norm statistics) with those of rank 0."""

    def average_norms(self, model: nn.Module, images: int) -> None:
        """Average batch-norm statistics, which each rank took over ``images``, by those."""

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A block that ends in an error on one rank ends in it on all of them.

        The block may use no collective but, before all else, ``in_turn``.
        """
        found: Exception | None = None
        try:
            yield
        except Exception as error:
            found = error
        self.settle(found)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over the ranks, added in the order of the ranks."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What torchrun says in the environment of each process it starts."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def of_environment(cls) -> Launch:
        """Raises UsageError where only a part of it is there."""
        world = _number("WORLD_SIZE", 1)
        if world == 1:
            return cls(rank=0, world=1, local_rank=0, local_world=1)
        rank = _number("RANK", None)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise _incomplete(name)
        return cls(
            rank=rank,
            world=world,
            local_rank=_number("LOCAL_RANK", rank),
            local_world=_number("LOCAL_WORLD_SIZE", world),
        )


_present: Ranks | None = None


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this run for the length of the block.

    Where ``torch.distributed`` has a process group, its ranks are used; where torchrun
    started several processes, they form one, which is dissolved at the end; else this
    process is alone. Within another such block this is the outer one's.

    Args:
        device: as of :func:`moon.fit`, to choose between NCCL and Gloo.

    Raises:
        UsageError: the environment is torchrun's in part only.
        TrainingError: the other processes did not come, or one of them was lost within the
            block; in place of whatever error that caused.
    """
    global _present
    if _present is not None:
        yield _present
        return
    if not _many():
        yield Ranks()
        return
    from moon.trainer.group import Group

    with Group.join(device) as group:
        _present = group
        try:
            yield group
        finally:
            _present = None


@contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGTERM end the block by an error, in each of several processes.

    torchrun sends it to the others when one of them has failed. Once the block has ended
    by an error, SIGTERM is ignored, so that there is time to say what the error is.
    """

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise EndedError

    if not _many():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)


def _many() -> bool:
    """Whether there are several processes, without importing torch to find out."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_world_size() > 1)
    return Launch.of_environment().world > 1


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise _incomplete(name)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r} in the environment", remedy="Use torchrun") from None


def _incomplete(name: str) -> UsageError:
    return UsageError(
        f"the environment has WORLD_SIZE={os.environ.get('WORLD_SIZE')}, but no {name}",
        remedy="Start the processes by torchrun, or unset WORLD_SIZE",
    )
