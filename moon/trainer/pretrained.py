"""Starting from weights that somebody trained: a local file, or torchvision's by name."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moon.errors import TrainingError
from moon.trainer.models import first_conv, head_name

__all__ = ["load_pretrained"]

# What training scripts commonly wrap a state dict in, and prepend to its names.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
# What a run's checkpoint holds besides: the topology of the new run is its own.
_MASK = "mask:"
_FILE_KINDS = (".pt", ".pth", ".safetensors")


def load_pretrained(model: nn.Module, name: str, pretrained: str) -> list[str]:
    """Load weights into ``model`` in place; what does not fit its head or stem is kept as built.

    Args:
        model: as :func:`moon.trainer.models.build` made it.
        name: of the model, for torchvision's weights.
        pretrained: a .pt, .pth or .safetensors file, or a name of torchvision's such as
            ``IMAGENET1K_V2`` or ``DEFAULT``. Pickled code is never run.

    Returns:
        A sentence on each layer that starts afresh.

    Raises:
        TrainingError: the file is missing, damaged or of another model.
    """
    if Path(pretrained).suffix in _FILE_KINDS:
        state = _from_file(Path(pretrained))
    else:
        state = _from_torchvision(name, pretrained)
    own = model.state_dict()
    conv = first_conv(model)
    free = {"head": head_name(model), "stem": conv[0] if conv else ""}
    notes = []
    for part, layer in free.items():
        tensors = [key for key in own if layer and key.rpartition(".")[0] == layer]
        if any(key not in state or state[key].shape != own[key].shape for key in tensors):
            notes.append(_note(part, layer, f"{layer}.weight", state, own))
            for key in tensors:
                state[key] = own[key]
    kept = {key for key in own if key.rpartition(".")[0] in free.values()}
    state = {k: v for k, v in state.items() if k in own or _layer(k) not in free.values()}
    _check_fit(state, own, pretrained, kept)
    model.load_state_dict(state)
    return notes


def _note(
    part: str, layer: str, key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> str:
    came = f"is {list(state[key].shape)}" if key in state else "is missing"
    return f"the {part} ({layer}) starts afresh: it {came} there and {list(own[key].shape)} here"


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _check_fit(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str, kept: set[str]
) -> None:
    remedy = "Give weights of the same model"
    missing = [key for key in own if key not in state]
    if missing:
        raise TrainingError(f"{source} has no tensor {missing[0]}", remedy=remedy)
    extra = [key for key in state if key not in own]
    if extra:
        raise TrainingError(f"{source} has a tensor {extra[0]} unknown to the model", remedy=remedy)
    for key in own:
        if key not in kept and state[key].shape != own[key].shape:
            shapes = f"{list(state[key].shape)}, the model's is {list(own[key].shape)}"
            raise TrainingError(f"in {source} {key} is {shapes}", remedy=remedy)


def _from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise TrainingError(f"there is no weights file {path}", remedy="Check pretrained")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            table: Any = load_file(path)
        else:
            table = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"{path} holds more than tensors, or is damaged",
            remedy="Save only the model's state_dict()",
        ) from error
    except Exception as error:
        raise TrainingError(f"cannot read weights from {path}: {error}") from error
    return _plain_state(table, str(path))


def _plain_state(table: Any, source: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(table, Mapping) and isinstance(table.get(wrapper), Mapping):
            table = table[wrapper]
    if not isinstance(table, Mapping) or not table:
        raise TrainingError(f"{source} holds no state dict", remedy="Save model.state_dict()")
    state = {}
    for key, value in table.items():
        if not isinstance(value, Tensor):
            raise TrainingError(f"in {source} {key} is no tensor", remedy="Save model.state_dict()")
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        if not key.startswith(_MASK):
            state[key] = value
    return state


def _from_torchvision(name: str, pretrained: str) -> dict[str, Tensor]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise TrainingError(
            f"torchvision has no weights for {name}",
            remedy=f"Give pretrained as a file ({', '.join(_FILE_KINDS)})",
        )
    known = models.get_model_weights(name)
    tail = pretrained.rpartition(".")[2]
    if tail not in known.__members__:
        raise TrainingError(
            f"torchvision has no weights {pretrained} for {name}",
            remedy=f"Give one of {', '.join(known.__members__)}, or a file",
        )
    try:
        state = known[tail].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"cannot download the weights {pretrained} of {name}: {error}",
            remedy="Download them elsewhere and give the file as pretrained",
        ) from error
    return _plain_state(state, pretrained)
