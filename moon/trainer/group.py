"""Group: several ranks over torch.distributed, and what happens when one of them fails.

An error that all ranks meet at the same place, or that they settle together, is raised by all.
Any other ends its process, whose closed connections end the others; so that these know why, the
first to fail leaves a note in the store that all of them met at.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from moon.errors import MoonError, TrainingError, UsageError
from moon.trainer.ranks import EndedError, Failure, Launch, Ranks

__all__ = ["Group"]

T = TypeVar("T")

# Seconds that one rank waits for another; a rank that has died is noticed at once.
TIMEOUT = "MOON_RANK_TIMEOUT"
TIMEOUT_S = 600.0
# While rank 0 downloads something, alone.
PATIENCE = timedelta(hours=12)
NOTE = "moon/failure"
# Parts of what Gloo, NCCL and the store say when a connection ends or stays silent.
_LOST = ("gloo", "NCCL", "onnection closed", "onnection reset", "onnection refused", "Broken pipe")
_meetings = count(1)
_SILENT = ("Timed out", "timed out", "imeout")


class Group(Ranks):
    """The ranks of the default process group. Made by ``join``, on all of them.

    Args:
        launch: which of them this is.
        store: a torch.distributed.Store, where a failing rank leaves its note, or None.
        timeout: for the group's own collectives.
    """

    def __init__(self, launch: Launch, store: Any, timeout: timedelta) -> None:
        self.rank, self.world = launch.rank, launch.world
        self.local_rank, self.local_world = launch.local_rank, launch.local_world
        self._store = store
        self._timeout = timeout
        # Gloo, whatever the default group is: plain values never touch a GPU.
        self._control: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    @classmethod
    @contextmanager
    def join(cls, device: str) -> Iterator[Group]:
        """See :func:`moon.trainer.ranks.joined`."""
        timeout = _timeout()
        ours = not dist.is_initialized()
        launch, store = _initialise(device, timeout) if ours else (_launched(), None)
        group = cls(launch, store, timeout)
        try:
            yield group
            # No rank goes on before all have finished, rank 0 with its files above all.
            dist.barrier(group._control)
            group._part(group._control)
        except BaseException as error:
            explained = group._explained(error)
            _leave(group, ours, failed=True)
            if explained is error:
                raise
            raise explained from error
        _leave(group, ours, failed=False)

    def gather(self, value: T) -> list[T]:
        return self._gather(value, self._control)

    def _gather(self, value: T, group: Any) -> list[T]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=group)
        return found

    def decide(self, action: Callable[[], T]) -> T:
        found: list[Any] = [None]
        with self.agreeing():
            if self.leads:
                found[0] = action()
        dist.broadcast_object_list(found, src=0, group=self._control)
        result: T = found[0]
        return result

    def settle(self, error: Exception | None) -> None:
        self._settle(error, self._control)

    def _settle(self, error: Exception | None, group: Any) -> None:
        mine = None if error is None else Failure.of(error, self.rank)
        failures = [each for each in self._gather(mine, group) if each is not None]
        if not failures:
            return
        self._part(group)
        first = failures[0]
        if error is not None and mine is not None:
            same = (mine.kind, mine.cause) == (first.kind, first.cause)
            if first.rank == self.rank:
                raise error
            if same and isinstance(error, MoonError):
                error.told = True
                raise error
        raise first.error() from error

    def _part(self, group: Any) -> None:
        """Let the others read what was sent to them before connections are closed."""
        with suppress(RuntimeError):
            dist.barrier(group)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        if not self.leads:
            self._settle(None, self._patient)
            yield
            return
        found: Exception | None = None
        try:
            yield
        except Exception as error:
            found = error
        self._settle(found, self._patient)

    def check_same(self, facts: Mapping[str, str | Tensor]) -> None:
        mine = {key: v if isinstance(v, str) else _digest(v) for key, v in facts.items()}
        found = self.gather(mine)
        for key, value in found[0].items():
            other = [rank for rank, each in enumerate(found) if each.get(key) != value]
            if other:
                ranks = ("rank " if len(other) == 1 else "ranks ") + ", ".join(map(str, other))
                self.settle(
                    TrainingError(
                        f"{key} is not the same on {ranks} as on rank 0",
                        remedy="All processes need the same recipe, images and versions",
                    )
                )

    def wrap(self, model: nn.Module) -> nn.Module:
        device = next(model.parameters()).device
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            # The ranks build equal models and compare them: see Session.check_ranks.
            init_sync=False,
        )

    def spread_buffers(self, model: nn.Module) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    @torch.no_grad()
    def average_norms(self, model: nn.Module, images: int) -> None:
        total = sum(self.gather(images))
        if not total:
            return
        for module in model.modules():
            if not isinstance(module, _BatchNorm) or not module.track_running_stats:
                continue
            for buffer in module.buffers():
                counts = not buffer.is_floating_point()
                sums = buffer.double() * ((1 if counts else images) if images else 0)
                dist.all_reduce(sums)
                buffer.copy_(sums if counts else sums / total)

    def _explained(self, error: BaseException) -> BaseException:
        """The error to end with, having left a note of it for the others."""
        if isinstance(error, MoonError) and error.told:
            return error
        lost = self._lost(error)
        failure = Failure.of(error if lost is None else lost, self.rank)
        first = self._note(failure)
        if lost is None:
            return error
        return lost if first == failure else first.error()

    def _lost(self, error: BaseException) -> TrainingError | None:
        """What it means where another rank is the cause, else None."""
        text = str(error)
        if isinstance(error, EndedError):
            return error
        if "DataLoader worker" in text and "Terminated" in text:
            return EndedError()  # torchrun ends all that a rank has started.
        if not isinstance(error, RuntimeError) or isinstance(error, MoonError):
            return None
        if not isinstance(error, dist.DistError) and not any(mark in text for mark in _LOST):
            return None
        again = "Start all of them again with --resume"
        if any(mark in text for mark in _SILENT):
            seconds = self._timeout.total_seconds()
            return TrainingError(
                f"another process of the run has not answered for {seconds:g} s",
                remedy=f"{again}; {TIMEOUT} sets how many seconds to wait",
            )
        return TrainingError("another process of the run died", remedy=again)

    def _note(self, failure: Failure) -> Failure:
        """Leave a note unless there is one; returns the note that is there."""
        if self._store is None:
            return failure
        try:
            text = self._store.compare_set(NOTE, "", json.dumps(asdict(failure)))
            return Failure(**json.loads(text))
        except (RuntimeError, ValueError, TypeError):
            return failure  # The store went with the process that kept it.


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{tuple(tensor.shape)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


def _initialise(device: str, timeout: timedelta) -> tuple[Launch, Any]:
    """Form the default process group from torchrun's environment."""
    launch = Launch.of_environment()
    if not dist.is_available():
        raise TrainingError("this torch cannot train by several processes: it has no distributed")
    cuda = device == "auto" or device.startswith("cuda")
    nccl = cuda and torch.cuda.is_available() and launch.local_world <= torch.cuda.device_count()
    if nccl:
        torch.cuda.set_device(launch.local_rank)
    try:
        meeting, rank, world = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps one store for all that its processes do, runs before this one included.
        store = dist.PrefixStore(f"moon/{next(_meetings)}", meeting)  # type: ignore[attr-defined]
        store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the {launch.world} processes of the run did not meet at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {_first_line(error)}",
            remedy="Start them all by torchrun, and check the network between the machines",
        ) from error
    return launch, store


def _launched() -> Launch:
    """Where this rank stands in a process group that was there already."""
    rank, world = dist.get_rank(), dist.get_world_size()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    local_rank = int(os.environ.get("LOCAL_RANK", rank % local_world))
    return Launch(rank=rank, world=world, local_rank=local_rank, local_world=local_world)


def _leave(group: Group, ours: bool, *, failed: bool) -> None:
    if failed and dist.get_backend() == "nccl":
        return  # It would wait for kernels that wait for a rank which is gone.
    # What is left of a broken group may complain again.
    with suppress(*([RuntimeError] if failed else [])):
        if ours:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(group._control)
            dist.destroy_process_group(group._patient)


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e8:
        raise UsageError(f"{TIMEOUT} is {text!r}", remedy="Give a number of seconds, at least 1")
    return timedelta(seconds=seconds)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
