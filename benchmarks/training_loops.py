"""The loops that benchmarks/training.py compares: one ordinary training loop, three ways.

`dense` is torch alone, `sparse` adds a Sparsifier, `moon` a Sparsifier, the output for the
unknown and its loss. Everything else is the same code, data and seed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moon.trainer.models import build
from moon.trainer.objective.loss import UnknownAwareLoss
from moon.trainer.sparsity.sparsifier import Sparsifier
from moon.trainer.voting import Votes, recompute_batch_norm

VARIANTS = ("dense", "sparse", "moon")
CLASSES = 10
# So far apart that no timed step holds an update by chance; updates are asked for.
NEVER = 1_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What describes a loop, for the benchmark and for the processes it starts."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: its own choice")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of the CPU")
    parser.add_argument("--model", default="resnet18", help="as in recipes")
    parser.add_argument("--size", type=int, help="pixels; default 32, of resnet50 224")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--rule", choices=("rigl", "set"), default="rigl")
    parser.add_argument("--structure", default="unstructured")
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")


def pixels(options: argparse.Namespace) -> int:
    return int(options.size or (224 if options.model == "resnet50" else 32))


class Loop:
    """One variant, a step at a time: SGD with Nesterov momentum; bfloat16 autocast on CUDA."""

    def __init__(self, variant: str, options: argparse.Namespace) -> None:
        self.variant = variant
        self.device = torch.device(options.device)
        self.clock = options.clock
        side = pixels(options)
        layout = torch.contiguous_format if options.contiguous else torch.channels_last
        outputs = CLASSES + (variant == "moon")
        self.model = build(options.model, outputs=outputs, size=(side, side))
        self.model = self.model.to(self.device).to(memory_format=layout)
        cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=0.01,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            fused=True if cuda else None,
        )
        self.sparsifier: Sparsifier | None = None
        if variant != "dense":
            self.sparsifier = Sparsifier(
                self.model,
                self.optimizer,
                density=1 - options.sparsity,
                rule=options.rule,
                structure=options.structure,
                interval=NEVER,
            )
        self.criterion = criterion(variant).to(self.device)
        self.votes = Votes()
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(options.batch, 3, side, side, generator=draw)
        self.images = images.to(self.device).to(memory_format=layout)
        labels = torch.randint(0, CLASSES, (options.batch,), generator=draw)
        self.labels = labels.to(self.device)

    def seconds(self, calls: list[Callable[[], None]]) -> list[float]:
        return seconds(self.device, calls, clock=self.clock)

    def forward_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.criterion(self.model(self.images), self.labels)
        loss.backward()

    def step(self) -> None:
        """What is compared."""
        self.forward_backward()
        self.optimizer.step()

    def ask_update(self) -> None:
        """Have the next step update the topology."""
        if self.sparsifier is not None:
            self.sparsifier.advance(NEVER - self.sparsifier.step_count % NEVER)
            if not self.sparsifier.update_due:
                raise RuntimeError("the sparsifier did not take the step for an update's")

    def vote(self) -> None:
        if self.sparsifier is not None:
            self.votes.add(self.model, self.sparsifier.masks)

    def batch_norm(self) -> None:
        """One batch of the pass that recomputes batch-norm statistics for the average."""
        with self.autocast():
            recompute_batch_norm(self.model, [self.images])

    def autocast(self) -> AbstractContextManager[Any]:
        return (
            torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        )


def criterion(variant: str) -> nn.Module:
    """Cross-entropy, or for `moon` its loss after the warm-up, when it does most."""
    if variant != "moon":
        return nn.CrossEntropyLoss()
    loss = UnknownAwareLoss(total_epochs=100, warmup_epochs=5, w_final=1.0)
    loss.start_epoch(60)
    return loss


def seconds(
    device: torch.device, calls: list[Callable[[], None]], *, clock: str = "wall"
) -> list[float]:
    """Duration of each call, in order; on CUDA by events, with one wait after the last call.

    The clock ``cpu`` counts the processor time of this process: with one thread it leaves out
    the time in which other processes had the core.
    """
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    now = time.process_time if clock == "cpu" else time.perf_counter
    found = []
    for call in calls:
        start = now()
        call()
        found.append(now() - start)
    return found


def gradients(loop: Loop) -> list[Tensor]:
    return [p.grad for p in loop.model.parameters() if p.grad is not None]
