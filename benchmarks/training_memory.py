"""Peak memory of one variant of benchmarks/training.py, in a process of its own, as JSON.

    python -m benchmarks.training_memory --variant moon [the options of benchmarks.training]

On CUDA the peak is what the allocator gave out at most. On the CPU it is either the process's
largest resident size, less its size once everything is loaded, or with --allocated the most
that torch's tensors took at once, as its profiler saw them come and go: exact, but without what
kernels and the C library keep for themselves.

Taken before the first vote and after two: votes keep a sum for each connection through the
last fifth of the epochs.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.training_loops import VARIANTS, Loop, add_arguments, pixels
from moon.trainer.accounting.accounts import account

STEPS = 3
STATUS = Path("/proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--allocated", action="store_true", help="count tensors, on the CPU")
    add_arguments(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    json.dump(measure(options), sys.stdout)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build the loop, train with an update, vote and train on; and what was held."""
    tiny = {**vars(options), "model": "cnn", "size": 8, "batch": 2}
    # What the first step of a process loads is no variant's.
    Loop("moon", argparse.Namespace(**tiny)).step()
    gc.collect()
    meter = Meter(options)
    with meter.watching():
        loop = Loop(options.variant, options)
        for _ in range(STEPS):
            loop.step()
        loop.ask_update()
        loop.step()
        loop.step()
    peak, live = meter.peak(), live_bytes(loop)
    with meter.watching():
        loop.vote()
        loop.vote()
        loop.step()
    live["votes"] = live_bytes(loop)["other"] - live["other"]
    return {
        "peak_bytes": peak,
        "peak_voting_bytes": meter.peak(),
        "live_bytes": live,
        "accounted_bytes": accounted(loop, options),
    }


class Meter:
    """The highest figure so far, by the means that device and options call for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._cuda = options.device == "cuda"
        self._allocated = options.allocated and not self._cuda
        self._base = 0 if self._cuda else resident("VmRSS")
        self._now = self._most = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        if not self._allocated:
            yield
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            yield
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            self._now += event.nbytes()
            self._most = max(self._most, self._now)

    def peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return self._most if self._allocated else resident("VmHWM") - self._base


def resident(what: str) -> int:
    """`VmRSS`, the resident size, or `VmHWM`, the largest so far, in bytes.

    Not by getrusage where it can be helped: its maximum starts at the size of the process
    that started this one.
    """
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
        return int(line.split()[1]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def live_bytes(loop: Loop) -> dict[str, int]:
    """Bytes of the tensors that outlive a step, each storage once, by what they are for.

    `other` is what no one else claims: whatever the sparsifier, the loss and the votes keep
    beside the masks they show.
    """
    gc.collect()
    claims: dict[str, list[Tensor]] = {
        "weights": [*loop.model.parameters(), *loop.model.buffers()],
        "gradients": [p.grad for p in loop.model.parameters() if p.grad is not None],
        "optimizer": [
            value
            for state in loop.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ],
        "masks": [] if loop.sparsifier is None else [*loop.sparsifier.masks.values()],
        "batch": [loop.images, loop.labels],
    }
    # Exact types: isinstance would wake lazy modules among the collector's objects, and the
    # subclasses that a compiler leaves behind have no memory.
    kinds = (Tensor, torch.nn.Parameter)
    claims["other"] = [thing for thing in gc.get_objects() if type(thing) in kinds]
    seen: set[int] = set()
    found = {}
    for what, tensors in claims.items():
        found[what] = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type == loop.device.type and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[what] += storage.nbytes()
    return found


def accounted(loop: Loop, options: argparse.Namespace) -> int:
    """What `moon.trainer.account` says that the variant holds."""
    masks = None if loop.sparsifier is None else loop.sparsifier.masks
    example = torch.zeros(1, 3, pixels(options), pixels(options), device=loop.device)
    with loop.autocast():
        found = account(loop.model, example, masks=masks, optimizer=loop.optimizer)
    return found.training_bytes(options.batch)


if __name__ == "__main__":
    main()
