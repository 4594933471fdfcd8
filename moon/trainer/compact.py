"""Compact checkpoints: a trained classifier as one small file, restored bit for bit.

A run's ``checkpoint.safetensors`` holds the zeros of a sparse layer too. The file here is a
safetensors file without them, by default called ``NAME.moonckpt``: of a sparse weight NAME it
has the mask, bit-packed, as ``mask:NAME`` and the weights under the mask, in order, as
``values:NAME``; everything else is under its own name, as it is. The metadata hold
``checkpoint``, the JSON of ``Checkpoint.facts`` with the shapes of the sparse weights, and
``sha256``, over that JSON and all tensors. A ResNet-18 at 95% takes 3.7 MB instead of 46.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moon.errors import TrainingError
from moon.files import canonical_json, write_bytes
from moon.trainer.checkpoint import MASK, Checkpoint

__all__ = ["SUFFIX", "load_compact", "save_compact"]

SUFFIX = ".moonckpt"
VALUES = "values:"
_AGAIN = "Copy the file again, or pack the run again"


def save_compact(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> int:
    """Write the checkpoint as one file, atomically.

    A sparse layer with anything but positive zeros outside its mask is kept whole, so that
    every bit comes back.

    Returns:
        Bytes of the file.

    Raises:
        MoonError: could not be written.
    """
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.state.items()}
    shapes: dict[str, list[int]] = {}
    for name, mask in checkpoint.masks.items():
        weight, kept = tensors[name], mask.detach().cpu().contiguous()
        tensors[MASK + name] = torch.from_numpy(np.packbits(kept.numpy()))
        if _only_zeros(weight[~kept]):
            del tensors[name]
            tensors[VALUES + name] = weight[kept]
            shapes[name] = list(weight.shape)
    text = canonical_json({**checkpoint.facts(), "shapes": shapes}).decode("ascii")
    data = save(tensors, {"checkpoint": text, "sha256": _digest(text, tensors)})
    write_bytes(path, data)
    return len(data)


def load_compact(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file of ``save_compact``.

    Raises:
        TrainingError: there is none, it is no such file, or it is damaged.
    """
    text, tensors = _read(Path(path))
    try:
        facts = json.loads(text)
        shapes = facts.pop("shapes")
        state, masks = _restored(tensors, shapes)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{path} is damaged: its tensors do not fit each other ({error})", remedy=_AGAIN
        ) from error
    return Checkpoint.from_facts(facts, state, masks, path)


def _restored(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = {name: t for name, t in tensors.items() if not name.startswith((MASK, VALUES))}
    masks: dict[str, Tensor] = {}
    for name in (key.removeprefix(MASK) for key in tensors if key.startswith(MASK)):
        shape = torch.Size(shapes[name]) if name in shapes else state[name].shape
        bits = np.unpackbits(tensors[MASK + name].numpy(), count=shape.numel())
        masks[name] = torch.from_numpy(bits.astype(bool)).reshape(shape)
        if name in shapes:
            values = tensors[VALUES + name]
            state[name] = torch.zeros(shape, dtype=values.dtype)
            state[name][masks[name]] = values
    return state, masks


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The JSON and the tensors, found to be those that were written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise TrainingError(f"there is no file {path}", remedy="Check the path") from None
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path} is no compact checkpoint, or damaged: {error}", remedy=_AGAIN
        ) from error
    text = facts.get("checkpoint")
    if text is None or "sha256" not in facts:
        raise TrainingError(f"{path} is no compact checkpoint: it does not describe a run")
    if facts["sha256"] != _digest(text, tensors):
        raise TrainingError(f"{path} is damaged: its SHA-256 differs", remedy=_AGAIN)
    return text, tensors


def _only_zeros(values: Tensor) -> bool:
    # A negative zero is one too to the comparison, but not to the bits.
    return not bool((values != 0).any() or torch.signbit(values).any())


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
