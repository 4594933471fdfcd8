"""Classifiers by name: ``build`` makes one for any number of outputs, channels and pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moon.errors import MissingExtraError, UsageError

__all__ = ["MODELS", "SmallCNN", "WideResNet", "build", "first_conv", "head_name"]

SMALL_IMAGE = 64
TINY_IMAGE = 8


class SmallCNN(nn.Module):
    """3x3 convolutions of 32, 64, 192, 192 ... channels and a linear layer, for small images.

    Each convolution is max-pooled, by two or, the last one, over the whole image, *before* its
    batch norm and ReLU. So the statistics are those of peaks, not of an empty background, which
    keeps the energy of textures and flat images below that of the classes; a global average or
    strides in place of the pooling rank such inputs above them. There are three convolutions
    below 64 pixels (9.3 million multiply-adds on a 28x28 image) and one more for each doubling.
    """

    def __init__(self, outputs: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        if min(size) < TINY_IMAGE:
            raise UsageError(
                f"the model cnn takes images of at least {TINY_IMAGE}x{TINY_IMAGE}, not "
                f"{size[0]}x{size[1]}",
                remedy="Set data.preprocess.crop higher",
            )
        height, width = size
        halvings = max(2, min(int(math.log2(max(size) / 8)), int(math.log2(min(size)))))
        widths = (32, 64, *[192] * (halvings - 1))
        self.stem = _conv_pool(channels, widths[0], pool=(2, 2))
        stages = [
            _conv_pool(before, after, pool=(2, 2))
            for before, after in itertools.pairwise(widths[:-1])
        ]
        self.stages = nn.Sequential(
            *stages,
            _conv_pool(widths[-2], widths[-1], pool=(height >> halvings, width >> halvings)),
        )
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = self.stages(self.stem(x_NCHW))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class WideResNet(nn.Module):
    """Wide residual network for images of 32x32 (Zagoruyko and Komodakis, 2016), no dropout."""

    def __init__(self, outputs: int, channels: int, *, depth: int = 28, widen: int = 10) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        stages = []
        for stage in range(3):
            ins = [widths[stage]] + [widths[stage + 1]] * (blocks - 1)
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            stages += [
                _WideBlock(width, widths[stage + 1], stride)
                for width, stride in zip(ins, strides, strict=True)
            ]
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], outputs)
        _initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stages(self.stem(x_NCHW))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class _WideBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        same = width_in == width_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(active)))) + skip
        return out


def _cnn(outputs: int, channels: int, size: tuple[int, int]) -> nn.Module:
    model = SmallCNN(outputs, channels, size)
    _initialise(model)
    return model


def _resnet(name: str) -> Callable[[int, int, tuple[int, int]], nn.Module]:
    def make(outputs: int, channels: int, size: tuple[int, int]) -> nn.Module:
        model = _torchvision(name, outputs)
        if max(size) <= SMALL_IMAGE:
            # The stem of the CIFAR experiments: nothing is thrown away before the first block.
            model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        return model

    return make


def _wide(outputs: int, channels: int, size: tuple[int, int]) -> nn.Module:
    return WideResNet(outputs, channels)


MODELS: dict[str, Callable[[int, int, tuple[int, int]], nn.Module]] = {
    "cnn": _cnn,
    "resnet18": _resnet("resnet18"),
    "resnet50": _resnet("resnet50"),
    "wrn28-10": _wide,
}


def build(
    name: str, *, outputs: int, channels: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0
) -> nn.Module:
    """A freshly initialised classifier, in training mode, on the CPU.

    Args:
        name: one of ``MODELS``, or any classification model of torchvision. ``resnet18``
            and ``resnet50`` have a 3x3 stem and no max-pool at 64 pixels and below.
        outputs: number of logits, the unknown included where there is one.
        channels: of the input, 1 or 3.
        size: height and width of the input, in pixels.
        seed: of the initial weights; the global generator is left as it was.

    Returns:
        A module from float32 [N, channels, *size] to logits [N, outputs].

    Raises:
        UsageError: an unknown model, or one that cannot take such images.
    """
    make = MODELS.get(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(outputs, channels, size) if make else _torchvision(name, outputs)
        conv = first_conv(model)
        if conv is not None and conv[1].in_channels != channels:
            _replace(model, conv[0], _with_channels(conv[1], channels))
        _try_out(model, name, outputs, channels, size)
    return model.train()


def first_conv(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Name and module of the first convolution, the stem."""
    convs = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    return next(convs, None)


def head_name(model: nn.Module) -> str:
    """Name of the last linear layer (or, lacking one, convolution), which makes the logits."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return str(names[-1])
    raise UsageError("the model has neither a linear layer nor a convolution")


def _torchvision(name: str, outputs: int) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError("torchvision", "train", f"the model {name}") from error
    known = set(models.list_models(module=models))
    if name not in known:
        own = ", ".join(MODELS)
        raise UsageError(
            f"there is no model {name}",
            remedy=f"Give one of {own}, or a classification model of torchvision",
        )
    # The auxiliary classifiers of the Inception family make a second output in training.
    aux = (
        {"aux_logits": False, "init_weights": True} if name in {"googlenet", "inception_v3"} else {}
    )
    model: nn.Module = models.get_model(name, weights=None, num_classes=outputs, **aux)
    return model


def _try_out(
    model: nn.Module, name: str, outputs: int, channels: int, size: tuple[int, int]
) -> None:
    model.eval()
    try:
        with torch.no_grad():
            shape = tuple(model(torch.zeros(1, channels, *size)).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"the model {name} cannot take images of {channels}x{size[0]}x{size[1]}: {error}",
            remedy="Choose another model, or another data.preprocess.crop",
        ) from error
    if shape != (1, outputs):
        raise UsageError(f"the model {name} gives {list(shape)} instead of logits [1, {outputs}]")


def _conv_pool(width_in: int, width_out: int, *, pool: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, padding=1, bias=False),
        nn.MaxPool2d(pool),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
    )


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _with_channels(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    if conv.groups != 1 or not isinstance(conv.padding, tuple):
        raise UsageError(f"the model's first convolution cannot take {channels} channels")
    bias = conv.bias is not None
    size, stride = _pair(conv.kernel_size), _pair(conv.stride)
    return nn.Conv2d(
        channels, conv.out_channels, size, stride, padding=_pair(conv.padding), bias=bias
    )


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
