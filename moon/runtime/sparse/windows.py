"""Nodes that move a window over an image: convolutions and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moon.runtime.sparse.geometry import Window
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.model import Node
from moon.runtime.sparse.steps import Conv, Pool, Reduce
from moon.runtime.sparse.work import UnsupportedError, Work, flag, names, sizes, truth

__all__ = ["conv", "pool"]

# Taps outside the image are read, if not looked at, so that there is memory for them, in pixels.
_FARTHEST = 1 << 24


def conv(work: Work, node: Node) -> None:
    """Conv."""
    planes = work.planes(node.inputs[0])
    weight = work.finite(node.inputs[1])
    groups = flag(node, "group", 1)
    if weight.ndim != 4 or groups < 1:
        raise UnsupportedError("it is no convolution of images")
    rows, own = weight.shape[:2]
    if own * groups != planes.channels or rows % groups or not weight.size:
        raise UnsupportedError("its weight does not fit its input")
    if sizes(node, "kernel_shape", weight.shape[2:]) != weight.shape[2:]:
        raise UnsupportedError("its kernel_shape is not its weight's")
    window = _window(node, planes, weight.shape[2:])
    if _reach(window, planes) > _FARTHEST:
        raise UnsupportedError("its window reaches too far beyond the image")
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    bias = work.finite(name) if name else np.zeros(rows, np.float32)
    if bias.shape != (rows,):
        raise UnsupportedError("its bias does not fit its weight")
    step = Conv(**names(node), weight=weight, bias=bias, window=window, groups=groups)
    work.add(step, _through(window, planes, rows))


def pool(work: Work, node: Node) -> None:
    """MaxPool and AveragePool."""
    planes = work.planes(node.inputs[0])
    window = _window(node, planes, sizes(node, "kernel_shape", (0, 0)))
    extent = [d * (k - 1) + 1 for d, k in zip(window.dilations, window.kernel, strict=True)]
    if any(pad >= size for pad, size in zip(window.pads, (*extent, *extent), strict=True)):
        raise UnsupportedError("its padding is as large as its window")
    ceil, counts = truth(node, "ceil_mode"), truth(node, "count_include_pad")
    largest = node.op_type == "MaxPool"
    if largest and truth(node, "storage_order"):
        raise UnsupportedError("its storage_order is 1")
    if ceil and counts and not largest:
        raise UnsupportedError("it counts padding and rounds up")
    auto = node.attributes.get("auto_pad", "NOTSET")
    if ceil and auto != "NOTSET":
        raise UnsupportedError("it rounds up and pads by itself")
    if window.dilations != (1, 1) and auto in ("SAME_UPPER", "SAME_LOWER"):
        # ONNX and ONNX Runtime disagree about how much.
        raise UnsupportedError("it is dilated and pads by itself")
    out = _through(window, planes, planes.channels, ceil=ceil)
    if not _full(window, planes, out):
        raise UnsupportedError("a window of it lies in the padding")
    kind = "max" if largest else "average"
    if _whole(window, planes, out):
        work.add(Reduce(**names(node), kind=kind), out)
        return
    work.add(Pool(**names(node), kind=kind, window=window, padding_counts=counts), out)


def _whole(window: Window, planes: Planes, out: Planes) -> bool:
    """Whether there is one window, of the image and nothing else."""
    one = (out.height, out.width) == (1, 1) and window.dilations == (1, 1)
    return one and window.kernel == (planes.height, planes.width) and not any(window.pads)


def _window(node: Node, planes: Planes, kernel: Sequence[int]) -> Window:
    strides, dilations = sizes(node, "strides", (1, 1)), sizes(node, "dilations", (1, 1))
    if min(*kernel, *strides, *dilations) < 1:
        raise UnsupportedError("a kernel, stride or dilation is not positive")
    auto = node.attributes.get("auto_pad", "NOTSET")
    if not isinstance(auto, str):
        raise UnsupportedError("its auto_pad is no text")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same(auto == "SAME_UPPER", planes, kernel, strides, dilations)
    elif auto == "VALID":
        pads = (0, 0, 0, 0)
    elif auto == "NOTSET":
        pads = sizes(node, "pads", (0, 0, 0, 0))
    else:
        raise UnsupportedError("its auto_pad is not known")
    top, left, bottom, right = pads
    return Window(
        (kernel[0], kernel[1]),
        (strides[0], strides[1]),
        (dilations[0], dilations[1]),
        (top, left, bottom, right),
    )


def _same(
    upper: bool,
    planes: Planes,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[int, ...]:
    begin, end = [], []
    for size, k, stride, dilation in zip(
        (planes.height, planes.width), kernel, strides, dilations, strict=True
    ):
        total = (-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size
        if total < -1:
            # ONNX Runtime then begins within the image. One less is at the end and does not matter.
            raise UnsupportedError("it pads by itself, less than nothing")
        total = max(0, total)
        less = total // 2
        begin.append(less if upper else total - less)
        end.append(total - less if upper else less)
    return (*begin, *end)


def _reach(window: Window, planes: Planes) -> int:
    """How many pixels lie between one and the farthest that a tap of its window is."""
    rows, columns = (
        max(window.pads[i], window.dilations[i] * (window.kernel[i] - 1) - window.pads[i])
        for i in (0, 1)
    )
    return rows * planes.width + columns


def _full(window: Window, planes: Planes, out: Planes) -> bool:
    """Whether every window holds a pixel: what of no pixels is the largest, nobody says."""
    for i, (size, count) in enumerate(((planes.height, out.height), (planes.width, out.width))):
        start, dilation = np.arange(count) * window.strides[i] - window.pads[i], window.dilations[i]
        # The first tap that is not before the image.
        tap = -(np.minimum(start, 0) // dilation)
        if (tap >= window.kernel[i]).any() or (start + tap * dilation >= size).any():
            return False
    return True


def _through(window: Window, planes: Planes, channels: int, *, ceil: bool = False) -> Planes:
    height, width = window.output(planes.height, planes.width, ceil=ceil)
    if height < 1 or width < 1:
        raise UnsupportedError("its window does not fit the image")
    if window.taps * height * width > 1 << 26:
        raise UnsupportedError("its window is too large")
    return Planes(channels, planes.images, height, width)
