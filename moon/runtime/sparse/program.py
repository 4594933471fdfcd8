"""Steps become a program: memory for every tensor, a record for every kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.runtime.sparse import steps as st
from moon.runtime.sparse.conv_weights import ConvWeights
from moon.runtime.sparse.convolution import CALLS, Convolution, Places
from moon.runtime.sparse.costs import Costs, choose
from moon.runtime.sparse.frame import Frame, frame_of
from moon.runtime.sparse.geometry import Geometry
from moon.runtime.sparse.kept import Kept
from moon.runtime.sparse.kernels_conv import ConvKernel, build_conv
from moon.runtime.sparse.layout import Planes
from moon.runtime.sparse.memory import Arena, Life, Reach, Space
from moon.runtime.sparse.plan import Plan, cut, sound, written
from moon.runtime.sparse.site import Operation, Site
from moon.runtime.sparse.writers import WRITERS

__all__ = ["Program"]

# Each thread's own memory begins on a page.
_PAGE = 4096


class Program:
    """Steps for one number of images, ready to be run.

    Args:
        steps: in order.
        tensors: shapes of all they read and make.
        source: name of the input.
        results: names of what must be there in the end.
        costs: what plans are chosen by.
        threads: the most that will run it.
        plans: by what convolutions make, plans to use instead of those chosen; one that does not
            fit is passed over.
        space: gives its memory.
        kept: of other programs of the same steps; what is made is kept there, too.

    Attributes:
        images: in a run.
        convolutions: by what they make, each with its geometry.
        operations: what the driver calls, in order.
        steps: as they are run, each with the number of its operations.
        nbytes: of activations, scratch memory and encoded convolutions.
    """

    def __init__(
        self,
        steps: Sequence[st.Step],
        tensors: Mapping[str, st.Tensor],
        source: str,
        results: Sequence[str],
        costs: Costs,
        threads: int,
        plans: Mapping[str, Plan] | None = None,
        space: Space | None = None,
        kept: Kept | None = None,
    ) -> None:
        self._kept = kept
        self._tensors, self._source = dict(tensors), source
        self._costs, self._threads, self._plans = costs, threads, dict(plans or {})
        self._space = space or Space()
        self.images = self._planes(source).images
        self.convolutions: dict[str, tuple[Convolution, Geometry]] = {}
        # The same by what they make in a frame.
        self._made: dict[str, tuple[Convolution, Geometry]] = {}
        self._reaches: dict[str, Reach] = {}
        prepared = self._arranged(steps)
        self._arena = Arena(self._lives(prepared, results), self._reaches, self._space)
        self._site = Site(self._tensors, self._arena, self._space)
        self._take_scratch()
        self.operations: list[Operation] = []
        self.steps: list[tuple[st.Step, int]] = []
        for step in prepared:
            calls = self._calls(step)
            self.operations += calls
            self.steps.append((step, len(calls)))
        streams = sum(c.nbytes for c, _ in self.convolutions.values())
        self.nbytes = self._arena.nbytes + self._scratch.nbytes + streams

    def tensor(self, name: str) -> st.Tensor:
        """The shape of what a step reads or makes."""
        return self._tensors[name]

    def result(self, name: str) -> NDArray[np.float32]:
        """A tensor as ONNX has it: [images, channels, height, width] or [images, features].

        A view of the program's memory, or a copy; good until the next run.
        """
        tensor, floats = self._tensors[name], self._arena.floats(name)
        if isinstance(tensor, st.Rows):
            rows: NDArray[np.float32] = floats.reshape(tensor.images, -1)[:, : tensor.features]
            return rows
        planes = floats.reshape(tensor.channels, -1)[:, : tensor.pixels]
        shape = (tensor.channels, tensor.images, tensor.height, tensor.width)
        images: NDArray[np.float32] = planes.reshape(shape).transpose(1, 0, 2, 3)
        return images

    def feed(self, images: NDArray[np.float32]) -> None:
        """Put the input in place: float32 [images, channels, height, width].

        Raises:
            ValueError: it has another shape.
        """
        tensor = self._site.planes(self._source)
        shape = (tensor.images, tensor.channels, tensor.height, tensor.width)
        if images.shape != shape:
            raise ValueError(f"the input is {images.shape}, not {shape}")
        planes = self._arena.floats(self._source).reshape(tensor.channels, -1)
        target = planes[:, : tensor.pixels].reshape(tensor.channels, tensor.images, -1)
        target[:] = images.reshape(tensor.images, tensor.channels, -1).transpose(1, 0, 2)

    # Preparation.

    def _arranged(self, steps: Sequence[st.Step]) -> list[st.Step]:
        """With steps into frames, once for all that read the same one, and out of them."""
        found: list[st.Step] = []
        self._framed: dict[tuple[str, Frame, float], str] = {}
        for step in steps:
            if isinstance(step, st.Conv):
                found += self._conv_steps(step)
            elif isinstance(step, st.Pool):
                found += self._pool_steps(step)
            else:
                found.append(step)
        return found

    def _conv_steps(self, step: st.Conv) -> list[st.Step]:
        geometry = Geometry(self._planes(step.source), step.window, self._planes(step.target))
        convolution = self._prepared(step, geometry)
        frame = frame_of(geometry, convolution.plan.reading)
        before: list[st.Step] = []
        source = step.source
        if frame is not None:
            before, source = self._into(frame, step, 0.0)
        made = target = step.target
        after: list[st.Step] = []
        if convolution.written != geometry.target:
            assert frame is not None
            self._tensors[made := self._new_name(f"{step.target} in a frame")] = convolution.written
            out = st.Unframed(source=made, target=step.target, node=step.node, frame=frame)
            after = [replace(out, residual=step.residual, low=step.low, high=step.high)]
            step = replace(step, residual=None, low=st.NO_LOW, high=st.NO_HIGH)
        self.convolutions[target] = self._made[made] = (convolution, geometry)
        reach = self._reaches.get(source, Reach())
        self._reaches[source] = convolution.reach.with_(reach)
        return [*before, replace(step, source=source, target=made), *after]

    def _pool_steps(self, step: st.Pool) -> list[st.Step]:
        geometry = Geometry(self._planes(step.source), step.window, self._planes(step.target))
        fill = float("-inf") if step.kind == "max" else 0.0
        before, source = self._into(Frame.around(geometry), step, fill)
        return [*before, replace(step, source=source, geometry=geometry)]

    def _into(self, frame: Frame, step: st.Step, fill: float) -> tuple[list[st.Step], str]:
        """What puts the source of a step into a frame, where nothing has yet; and its name."""
        key = (step.source, frame, fill)
        if key in self._framed:
            return [], self._framed[key]
        self._framed[key] = name = self._new_name(f"{step.source} framed")
        self._tensors[name] = frame.planes
        new = st.Framed(source=step.source, target=name, node=step.node, frame=frame, fill=fill)
        return [new], name

    def _new_name(self, name: str) -> str:
        while name in self._tensors:
            name += "'"
        return name

    def _planes(self, name: str) -> Planes:
        tensor = self._tensors[name]
        assert isinstance(tensor, Planes)
        return tensor

    def _prepared(self, step: st.Conv, geometry: Geometry) -> Convolution:
        weights = None if self._kept is None else self._kept.weights.get(step.target)
        if weights is None:
            weights = ConvWeights(step.weight, step.groups)
        plan = self._plans.get(step.target)
        if plan is not None and sound(geometry, plan):
            try:
                return self._with(step, weights, geometry, plan)
            except ValueError:  # its columns lie too far apart
                pass
        plan = choose(geometry, weights.summary(geometry), self._costs)
        return self._with(step, weights, geometry, plan)

    def _with(
        self, step: st.Conv, weights: ConvWeights, geometry: Geometry, plan: Plan
    ) -> Convolution:
        if self._kept is not None and (found := self._kept.convolutions.get((step.target, plan))):
            return found
        tiles = sum(count for *_, count in cut(written(geometry, plan.reading), plan))
        shared = self._threads > 1 and (tiles < 4 * self._threads and tiles % self._threads)
        parts = self._threads if shared else 1
        made = Convolution(
            weights,
            step.bias,
            geometry,
            plan,
            parts=parts,
            permute=self._costs.permute,
            space=self._space,
        )
        if self._kept is not None:  # by itself it would hold the weights twice
            self._kept.weights[step.target] = weights
            self._kept.convolutions[step.target, plan] = made
        return made

    def _lives(self, steps: Sequence[st.Step], results: Sequence[str]) -> dict[str, Life]:
        first = {self._source: -1}
        last: dict[str, int] = {}
        for i, step in enumerate(steps):
            first[step.target] = i
            for name in (*step.reads, step.target):
                last[name] = i
        for name in results:
            last[name] = len(steps)
        return {
            name: Life(self._tensors[name].nbytes, begin, last.get(name, begin))
            for name, begin in first.items()
        }

    def _take_scratch(self) -> None:
        most = max((c.scratch_bytes for c, _ in self.convolutions.values()), default=0)
        self._scratch_step = most if self._space.guard else -(-most // _PAGE) * _PAGE + _PAGE
        self._scratch = self._space.take(self._scratch_step * self._threads * CALLS)

    # Operations.

    def _calls(self, step: st.Step) -> list[Operation]:
        if isinstance(step, st.Conv):
            return self._conv(step)
        return WRITERS[type(step)](self._site, step)

    def _conv(self, step: st.Conv) -> list[Operation]:
        convolution, _ = self._made[step.target]
        places = Places(
            source=self._site.at(step.source),
            target=self._site.at(step.target),
            residual=None if step.residual is None else self._site.at(step.residual),
            scratch=self._scratch,
            scratch_step=self._scratch_step,
        )
        calls = convolution.calls(places, step.low, step.high)
        return [
            Operation(
                call.kernel.name, _builder(call.kernel), call.record, call is calls[-1], step.node
            )
            for call in calls
        ]


def _builder(kernel: ConvKernel) -> Callable[[Any], None]:
    return lambda module: build_conv(module, kernel)
