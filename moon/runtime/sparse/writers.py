"""Steps beside the convolution as calls of kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse import steps as st
from moon.runtime.sparse.frame import Frame
from moon.runtime.sparse.geometry import Geometry, Window
from moon.runtime.sparse.ir import LANES, VECTOR_BYTES
from moon.runtime.sparse.kernels_linear import LINEAR, SPARSE_LINEAR
from moon.runtime.sparse.kernels_planes import COPY, FRAME, POOL, REDUCE, SPREAD, UNFRAME
from moon.runtime.sparse.kernels_points import POINTWISE
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.site import Operation, Site, operation

__all__ = ["WRITERS"]

Floats = NDArray[np.float32]

# Below this share of nonzeros a linear layer goes through its nonzeros alone.
_SPARSE_LINEAR = 0.25


def _pitch(planes: Planes) -> int:
    return planes.pitch * VECTOR_BYTES


def _ends(site: Site, step: st.Step) -> dict[str, Any]:
    return {"source": site.at(step.source), "target": site.at(step.target)}


def _framed(site: Site, step: st.Framed) -> list[Operation]:
    frame, planes = step.frame, step.frame.source
    stride = frame.strides[1]
    record = FRAME.record(
        **_ends(site, step),
        channels=planes.channels,
        phases=len(frame.phases),
        images=planes.images,
        rows=frame.rows,
        pitch=frame.pitch,
        lead=frame.lead,
        whole=frame.planes.pixels,
        source_pitch=_pitch(planes),
        source_row=4 * frame.strides[0] * planes.width,
        source_image=4 * planes.height * planes.width,
        target_pitch=_pitch(site.planes(step.target)),
        step=stride,
        parts=site.table(frame.parts()),
        fill=float(step.fill),
    )
    kernel = f"frame_{stride}" if stride <= 2 else "frame_n"
    return [operation(kernel, record, step.node)]


def _over(site: Site, frame: Frame, source: str, target: str) -> dict[str, Any]:
    """Fields of what goes over the rows of a frame."""
    planes = site.planes(target)
    return {
        "source": site.at(source),
        "target": site.at(target),
        "channels": planes.channels,
        "images": planes.images,
        "height": planes.height,
        "width": planes.width,
        "row": 4 * frame.pitch,
        "image": 4 * frame.pitch * frame.rows,
        "target_pitch": _pitch(planes),
    }


def _unframed(site: Site, step: st.Unframed) -> list[Operation]:
    record = UNFRAME.record(
        **_over(site, step.frame, step.source, step.target),
        residual=None if step.residual is None else site.at(step.residual),
        source_pitch=_pitch(site.planes(step.source)),
        low=float(step.low),
        high=float(step.high),
    )
    return [operation("unframe" if step.residual is None else "unframe_add", record, step.node)]


def _pool(site: Site, step: st.Pool) -> list[Operation]:
    geometry = step.geometry
    assert geometry is not None
    frame, taps = Frame.around(geometry), geometry.taps
    average = step.kind == "average"
    plane = _pitch(frame.planes)
    shifts = 4 * frame.shifts(geometry) + plane * taps.phase
    record = POOL.record(
        **_over(site, frame, step.source, step.target),
        source_pitch=plane * len(taps.phases),
        taps=len(shifts),
        shifts=site.table(shifts),
        factor=site.table(_shares(geometry, step)) if average else None,
    )
    return [operation(f"pool_{step.kind}", record, step.node)]


def _shares(geometry: Geometry, step: st.Pool) -> Floats:
    """One over the pixels of each window, [pixels], and more for reads beyond."""
    window, source = geometry.window, geometry.source
    if step.padding_counts:
        source = Planes(
            1,
            source.images,
            source.height + window.pads[0] + window.pads[2],
            source.width + window.pads[1] + window.pads[3],
        )
        window = Window(window.kernel, window.strides, window.dilations)
    inside = Geometry(source, window, geometry.target).indices >= 0
    count = np.concatenate([inside.sum(axis=0), np.ones(LANES, np.int64)])
    return np.ascontiguousarray(1 / np.maximum(count, 1), np.float32)


def _reduce(site: Site, step: st.Reduce) -> list[Operation]:
    source, target = site.planes(step.source), site.tensors[step.target]
    pixels = source.height * source.width
    rows = isinstance(target, st.Rows)
    record = REDUCE.record(
        **_ends(site, step),
        channels=source.channels,
        images=source.images,
        pixels=pixels,
        pitch=_pitch(source),
        factor=site.table(np.array([1 / pixels], np.float32)),
        image_step=target.step if isinstance(target, st.Rows) else 4,
        channel_step=4 if rows else _pitch(site.planes(step.target)),
    )
    return [operation(f"reduce_{step.kind}", record, step.node)]


def _flatten(site: Site, step: st.Flatten) -> list[Operation]:
    source, target = site.tensors[step.source], site.rows(step.target)
    if isinstance(source, st.Rows):
        inner, count, outer_step, inner_step = 1, source.features, source.step, 0
    else:
        count = source.height * source.width
        inner, outer_step, inner_step = source.channels, 4 * count, _pitch(source)
    record = COPY.record(
        **_ends(site, step),
        outer=target.images,
        inner=inner,
        count=count,
        source_outer=outer_step,
        source_inner=inner_step,
        target_outer=target.step,
        target_inner=4 * count,
    )
    return [operation("copy", record, step.node)]


def _concat(site: Site, step: st.Concat) -> list[Operation]:
    target, at, found = site.planes(step.target), 0, []
    memory = site.at(step.target)
    for i, name in enumerate(step.sources):
        source = site.planes(name)
        record = COPY.record(
            source=site.at(name),
            target=memory[at:],
            outer=1,
            inner=source.channels,
            count=source.pixels,
            source_outer=0,
            source_inner=_pitch(source),
            target_outer=0,
            target_inner=_pitch(target),
        )
        found.append(operation("copy", record, step.node, meet=i == len(step.sources) - 1))
        at += source.nbytes // 4
    return found


def _point(site: Site, step: st.Point) -> list[Operation]:
    tensor = site.tensors[step.source]
    if isinstance(tensor, Planes):
        channels, vectors, pitch = tensor.channels, tensor.vectors, _pitch(tensor)
    else:
        channels, vectors, pitch = tensor.images, tensor.step // VECTOR_BYTES, tensor.step
    other = None if step.numbers is None else site.table(step.numbers)
    record = POINTWISE.record(
        **_ends(site, step),
        other=other if step.other is None else site.at(step.other),
        channels=channels,
        vectors=vectors,
        pitch=pitch,
        low=float(step.low),
        high=float(step.high),
    )
    return [operation(f"point_{step.kind}", record, step.node)]


def _spread(site: Site, step: st.Spread) -> list[Operation]:
    source, other = site.planes(step.source), site.planes(step.other)
    record = SPREAD.record(
        **_ends(site, step),
        other=site.at(step.other),
        channels=source.channels,
        images=source.images,
        pixels=source.height * source.width,
        pitch=_pitch(source),
        other_pitch=_pitch(other),
    )
    return [operation("spread", record, step.node)]


def _linear(site: Site, step: st.Linear) -> list[Operation]:
    source, target = site.rows(step.source), site.rows(step.target)
    common: dict[str, Any] = {
        **_ends(site, step),
        "images": source.images,
        "source_step": source.step,
        "target_step": target.step,
        "low": float(step.low),
        "high": float(step.high),
    }
    if np.count_nonzero(step.weight) < _SPARSE_LINEAR * step.weight.size:
        starts, index, weights = (site.table(one) for one in _by_nonzeros(step.weight))
        record = SPARSE_LINEAR.record(
            **common,
            outputs=target.features,
            starts=starts,
            index=index,
            weights=weights,
            bias=site.table(step.bias),
        )
        return [operation("sparse_linear", record, step.node)]
    weights, bias = (site.table(one) for one in _by_groups(step.weight, step.bias))
    record = LINEAR.record(
        **common, inputs=source.features, groups=len(weights), weights=weights, bias=bias
    )
    return [operation("linear", record, step.node)]


def _by_groups(weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
    """Weight [inputs, outputs] as [groups, inputs, 16], bias as [groups * 16]."""
    inputs, outputs = weight.shape
    groups = -(-outputs // LANES)
    wide = np.zeros((inputs, groups * LANES), np.float32)
    wide[:, :outputs] = weight
    padded = np.zeros(groups * LANES, np.float32)
    padded[:outputs] = bias
    grouped = wide.reshape(inputs, groups, LANES).transpose(1, 0, 2)
    return np.ascontiguousarray(grouped), padded


def _by_nonzeros(weight: Floats) -> tuple[NDArray[np.int64], NDArray[np.int32], Floats]:
    """Nonzeros of each output, padded to sixteen: starts in groups, indices, weights."""
    output, source = np.nonzero(weight.T)
    counts = np.bincount(output, minlength=weight.shape[1])
    groups = -(-counts // LANES)
    starts = np.concatenate([[0], np.cumsum(groups)])
    place = starts[output] * LANES + np.arange(len(output))
    place -= (np.cumsum(counts) - counts)[output]
    index = np.full(int(starts[-1]) * LANES, -1, np.int32)
    values = np.zeros(len(index), np.float32)
    index[place] = source
    values[place] = weight.T[output, source]
    return starts.astype(np.int64), index, values


# Kind of step -> its calls, in order; all threads meet after the last one.
WRITERS: Mapping[type, Callable[[Site, Any], list[Operation]]] = {
    st.Framed: _framed,
    st.Unframed: _unframed,
    st.Pool: _pool,
    st.Reduce: _reduce,
    st.Flatten: _flatten,
    st.Concat: _concat,
    st.Point: _point,
    st.Spread: _spread,
    st.Linear: _linear,
}
