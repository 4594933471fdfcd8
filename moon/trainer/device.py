"""Where a run trains, and what it needs to give the same bits there each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from moon.errors import BackendError, UsageError
from moon.trainer.ranks import Ranks

__all__ = ["describe", "find_device", "reproducible"]


def find_device(name: str, ranks: Ranks) -> torch.device:
    """The device called ``name``: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.

    Each of several ranks has the CUDA device of its local rank.

    Raises:
        UsageError: no such name, or one device for several ranks.
        BackendError: it is not here, or there are fewer than ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
    return device if ranks.world == 1 else _own_device(device, ranks)


def _own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The device of one of several processes."""
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UsageError(
            f"{ranks.world} processes cannot share {device}",
            remedy="Give cuda, of which each process takes its own, or cpu",
        )
    if ranks.local_world > torch.cuda.device_count():
        raise BackendError(
            f"{ranks.local_world} processes need as many CUDA devices, of which there are "
            f"{torch.cuda.device_count()} here",
            remedy="Start as many processes as there are devices, or use --device cpu",
        )
    return torch.device("cuda", ranks.local_rank)


def describe(device: torch.device) -> str:
    """The device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Leave the caller's generators alone, and have cuDNN add in a fixed order.

    A CUDA device is the current one meanwhile.
    """
    cuda = device.type == "cuda"
    cudnn = torch.backends.cudnn
    current = torch.cuda.device(device) if cuda else nullcontext()
    with current, torch.random.fork_rng(devices=[device] if cuda else []):
        before = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
