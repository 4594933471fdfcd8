"""From a network to an engine: the one place that drives TensorRT's builder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from moon.errors import BackendError, ExportError, UsageError
from moon.export.trt.build_log import build_error, parse_error
from moon.runtime.trt.api import Api
from moon.runtime.trt.log import Message
from moon.runtime.trt.sidecar import Profile, Tensor

__all__ = ["Engine", "build", "inspect"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A built engine.

    Attributes:
        data: the file.
        seconds: the builder took.
        flags: of the builder, by name.
        inputs, outputs: of the network, by name.
        messages: what the builder said.
    """

    data: bytes
    seconds: float
    flags: tuple[str, ...]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    messages: list[Message]


def build(
    api: Api, model: bytes, *, profile: Profile, targets: tuple[int, ...], sparse: bool
) -> Engine:
    """Build an engine.

    Args:
        api: the package.
        model: the network as ONNX, its types as they are to be.
        profile: numbers of images.
        targets: compute capabilities, for a package that builds for GPUs that are not here.
        sparse: let it use 2:4 kernels.

    Raises:
        ExportError: an operator is not supported, named with its node, or the builder failed.
        UsageError: a target that this version does not build for.
        BackendError: there is no builder here.
    """
    with api.log.collect() as messages:
        builder = api.builder()
        network = api.network(builder)
        parser = api.parser(network)
        if not parser.parse(model):
            raise parse_error(parser, messages)
        config, flags = _config(api, builder, targets, sparse=sparse)
        _add_profile(api, builder, config, network, profile)
        started = time.perf_counter()
        data = builder.build_serialized_network(network, config)
        seconds = time.perf_counter() - started
        if data is None:
            raise build_error(api.title, messages)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return Engine(
            data=bytes(data),
            seconds=seconds,
            flags=flags,
            inputs=_tensors(api, inputs),
            outputs=_tensors(api, outputs),
            messages=messages,
        )


def inspect(api: Api, engine: bytes) -> tuple[list[dict[str, Any]] | None, str]:
    """The layers of an engine as its inspector lists them.

    Returns:
        The layers, or None and why the engine cannot be opened here.
    """
    try:
        runtime = api.runtime()
    except BackendError as error:
        return None, error.cause
    with api.log.collect() as messages:
        opened = runtime.deserialize_cuda_engine(engine)
        if opened is None:
            said = api.log.errors(messages) or ["no reason given"]
            return None, f"the engine cannot be opened here: {said[0]}"
        inspector = opened.create_engine_inspector()
        text = inspector.get_engine_information(api.trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    return [one if isinstance(one, dict) else {"Name": str(one)} for one in layers], ""


def _config(
    api: Api, builder: Any, targets: tuple[int, ...], *, sparse: bool
) -> tuple[Any, tuple[str, ...]]:
    config = builder.create_builder_config()
    # TF32 would round the score head's factors to ten bits, and decisions hang on them.
    tf32 = api.flag("TF32")
    if tf32 is not None:
        config.clear_flag(tf32)
    flags = []
    if sparse and (flag := api.flag("SPARSE_WEIGHTS")) is not None:
        config.set_flag(flag)
        flags.append("SPARSE_WEIGHTS")
    config.profiling_verbosity = api.trt.ProfilingVerbosity.DETAILED
    if api.targets:
        _set_targets(api, config, targets)
    return config, tuple(flags)


def _set_targets(api: Api, config: Any, targets: tuple[int, ...]) -> None:
    unknown = [sm for sm in targets if sm not in api.targets]
    if unknown:
        known = ", ".join(f"sm_{sm}" for sm in api.targets)
        raise UsageError(
            f"{api.title} does not build for sm_{unknown[0]}, only for {known}",
            remedy=f"Upgrade it: {api.package.install}",
        )
    config.num_compute_capabilities = len(targets)
    for index, sm in enumerate(targets):
        member = getattr(api.trt.ComputeCapability, f"SM{sm}")
        if not config.set_compute_capability(member, index):
            raise ExportError(f"{api.title} does not take sm_{sm} for a target")


def _add_profile(api: Api, builder: Any, config: Any, network: Any, profile: Profile) -> None:
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        sizes = [
            tuple(images if side == -1 else side for side in shape)
            for images in (profile.min, profile.opt, profile.max)
        ]
        shapes.set_shape(tensor.name, *sizes)
    if config.add_optimization_profile(shapes) < 0:
        raise ExportError(
            f"{api.title} does not take the batches {profile}", remedy="Write them as 1,8,32"
        )


def _tensors(api: Api, tensors: list[Any]) -> dict[str, Tensor]:
    return {
        tensor.name: Tensor(
            dtype=np.dtype(api.trt.nptype(tensor.dtype)).name, shape=tuple(tensor.shape)
        )
        for tensor in tensors
    }
