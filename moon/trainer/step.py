"""One optimizer step, and the sums kept over an epoch of them.

On a CUDA device the whole step (augmentation, forward, backward, masking, optimizer, sums) is
captured in a CUDA graph and replayed; the eager path runs the same kernels one by one, so both
give the same losses. Steps that update the topology, and batches of another size, are eager.

Shape suffixes: B images of a batch, K outputs, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moon.trainer.batches import RawBatch
from moon.trainer.objective.objective import Objective
from moon.trainer.sparsity.sparsifier import Sparsifier

__all__ = ["Step", "Sums", "Tally"]

# Eager steps before a capture: cuDNN, the optimizer and the autograd engine set themselves up.
WARM_UP = 3


@dataclass(frozen=True)
class Sums:
    """Over the images of an epoch so far: sums of loss and p(unknown), and right answers."""

    loss: float
    p_unknown: float
    correct: float


class Tally:
    """Sums over an epoch, on the device: adding to them never waits for the host."""

    def __init__(self, known: int, unknown_index: int | None, device: torch.device) -> None:
        self._known = known
        self._unknown_index = unknown_index
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_loss = torch.zeros((), device=device)

    def reset(self) -> None:
        self._sums.zero_()
        self._steps.zero_()
        self._bad_step.fill_(-1)

    @torch.no_grad()
    def add(self, loss: Tensor, logits_BK: Tensor, target_B: Tensor) -> None:
        """Take in a step: its mean loss (0-d) and its logits, which are known classes first."""
        correct = (logits_BK[:, : self._known].argmax(1) == target_B).sum()
        p_unknown = torch.zeros((), device=loss.device)
        if self._unknown_index is not None:
            p_unknown = logits_BK.softmax(1)[:, self._unknown_index].sum()
        self._sums += torch.stack([loss * len(target_B), p_unknown, correct.to(loss.dtype)])
        first = ~loss.isfinite() & (self._bad_step < 0)
        self._bad_step.copy_(torch.where(first, self._steps, self._bad_step))
        self._bad_loss.copy_(torch.where(first, loss, self._bad_loss))
        self._steps += 1

    @property
    def first_bad(self) -> tuple[int, float] | None:
        """The first step of the epoch, from 0, whose loss was not finite, and that loss."""
        step = int(self._bad_step)
        return None if step < 0 else (step, float(self._bad_loss))

    def sums(self) -> Sums:
        return Sums(*self._sums.tolist())


class Step:
    """Trains a model by one batch at a time.

    Args:
        model: on ``device``, in training mode when called.
        optimizer: with a Tensor as its learning rate where graphs are wanted.
        prepare: from a raw batch to the model's input, by kernels on the device alone.
        graphs: capture CUDA graphs; ignored off CUDA. A capture that fails turns it off.
        say: told, once, why steps run without graphs after all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        sparsifier: Sparsifier,
        objective: Objective,
        tally: Tally,
        prepare: Callable[[RawBatch], Tensor],
        device: torch.device,
        *,
        graphs: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._sparsifier = sparsifier
        self._objective = objective
        self._tally = tally
        self._prepare = prepare
        self._device = device
        self._graphs = graphs and device.type == "cuda"
        self._say = say
        self._recorder = _Recorder(device)
        self._captured: dict[Hashable, _Graph] = {}
        self._seen: dict[Hashable, int] = {}

    def __call__(self, batch: RawBatch, rate: float, *, step: int, number: int) -> None:
        """One step of the optimizer at the learning rate ``rate``.

        The loss is differentiated times ``batch.share``, and summed as it is.

        Args:
            step: from 0, of the run.
            number: from 0, of the epoch.
        """
        self._set_rate(rate)
        self._objective.start_step(step, number, batch.share)
        graph = self._graph(batch)
        if graph is None:
            self._compute(batch)
            return
        graph.batch.copy_(batch)
        graph.replay()
        self._sparsifier.advance()

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _compute(self, batch: RawBatch) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        x_BCHW = self._prepare(batch)
        with self._objective.during_step():
            with self.autocast():
                loss, logits_BK = self._objective(self._model, x_BCHW, batch.labels)
            torch.autograd.backward(loss if batch.share == 1.0 else loss * batch.share)
        self._optimizer.step()
        self._tally.add(loss.detach(), logits_BK.detach(), batch.labels)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 on CUDA, else nothing."""
        if self._device.type == "cuda":
            # Weights change between replays: casts of them must be part of every step.
            return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def _graph(self, batch: RawBatch) -> _Graph | None:
        """The graph that serves this step, captured if it is time; None for an eager step."""
        if not self._graphs or not self._objective.capturable or self._sparsifier.update_due:
            return None
        buffers = self._sparsifier.buffers
        key = (tuple(batch.pixels.shape), batch.share, self._objective.branch)
        graph = self._captured.get(key)
        if graph is not None and graph.serves(buffers):
            return graph
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= WARM_UP:
            return None
        try:
            graph = self._recorder.capture(self._compute, batch, buffers)
        except RuntimeError as error:
            self._graphs = False
            self._captured.clear()
            # Ending a capture that went wrong raises another error, which only says so.
            reason = str(error.__context__ or error).partition("\n")[0]
            self._say(f"training without CUDA graphs: the step could not be captured: {reason}")
            return None
        self._captured[key] = graph
        return graph


@dataclass(kw_only=True)
class _Graph:
    """A captured step, the batch it reads, and the masks it multiplies by."""

    replay: Callable[[], None]
    batch: RawBatch
    buffers: tuple[Tensor, ...]

    def serves(self, buffers: tuple[Tensor, ...]) -> bool:
        # A mask that was made anew elsewhere would leave the graph with the old one.
        return len(buffers) == len(self.buffers) and all(
            now is then for now, then in zip(buffers, self.buffers, strict=True)
        )


class _Recorder:
    """Captures steps on a stream of its own, all of them in the same memory.

    They can share it: one runs at a time, and nothing is read that an earlier one left there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._place: tuple[torch.cuda.Stream, Any] | None = None

    def capture(
        self, compute: Callable[[RawBatch], None], batch: RawBatch, buffers: tuple[Tensor, ...]
    ) -> _Graph:
        with torch.cuda.device(self._device):
            if self._place is None:
                stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._place = stream, torch.cuda.graph_pool_handle()
            stream, pool = self._place
            static = batch.clone()
            graph = torch.cuda.CUDAGraph()
            # The pinning thread of a loader allocates meanwhile: only this one is watched.
            recording = torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            )
            try:
                # Leaves the stream after a failed capture too, as older releases of torch do not.
                with torch.cuda.stream(stream), recording:
                    compute(static)
            except RuntimeError:
                _renew_generator()
                raise
        return _Graph(replay=graph.replay, batch=static, buffers=buffers)


def _renew_generator() -> None:
    """Have the device's default generator go on where it is, in a state of no capture.

    With older releases of torch a failed capture leaves it in one in which it refuses to draw.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    fresh = torch.Generator("cuda")
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh)
