"""From a bundle to an engine that runs here, or one line that says why there is none.

What TensorRT is handed was checked first: that the package fits the GPU, that the engine is of
this model, version and GPU by its record, and that its bytes are those recorded. Then its own
header is looked at, and only then is it loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moon.calibrated import calibrated_values
from moon.errors import BackendError
from moon.runtime.backend import NoEngineError
from moon.runtime.trt.api import Api, load
from moon.runtime.trt.backend import Settings, TensorRT
from moon.runtime.trt.cuda import Driver, GpuFacts
from moon.runtime.trt.device import Device
from moon.runtime.trt.engine import Engine
from moon.runtime.trt.kept import kept_key, open_store
from moon.runtime.trt.outcome import Outcome
from moon.runtime.trt.package import PACKAGES, Name, fitting, which_fits
from moon.runtime.trt.sidecar import EngineRecord
from moon.runtime.trt.stored import Wanted, engine_bytes, find

if TYPE_CHECKING:
    from moon.bundle import Bundle

__all__ = ["open_tensorrt", "opened"]


def open_tensorrt(
    bundle: Bundle,
    name: Name,
    settings: Settings | None = None,
    *,
    warn: Callable[[str], None] = lambda message: None,
) -> TensorRT:
    """The engine of a bundle for a package and the GPU of this machine.

    Args:
        bundle: opened; its gate, as it is now, decides.
        name: of the package.
        settings: how to run it.
        warn: told what may make it slower than expected.

    Raises:
        MissingExtraError: the package is not installed.
        NoEngineError: no engine of the bundle fits; says why those there are do not.
        BackendError: there is no GPU or driver, or the package does not fit the GPU.
        BundleError: the engine is damaged.
    """
    title = PACKAGES[name].title
    try:
        driver = Driver.load()
        gpu = driver.facts()
    except BackendError as error:
        raise BackendError(
            f"{title} cannot run here: {error.cause}", remedy=error.remedy
        ) from error
    if name not in fitting(gpu.sm):
        raise BackendError(f"{title} does not run on {gpu.name}", remedy=which_fits([gpu.sm]))
    api = load(name)
    record = _record(bundle, api, gpu, warn)
    data = engine_bytes(bundle, record)
    key = kept_key(
        engine=record.sha256,
        version=api.version,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=f"{driver.release} {driver.cuda_version}",
    )
    settings = settings or Settings()
    return opened(
        bundle, api, Device(driver), data, record, settings,
        key=key, facts={"provider": f"{api.package.title} on {gpu.name}", "gpu": _gpu(driver, gpu)},
    )  # fmt: skip


def opened(
    bundle: Bundle,
    api: Api,
    device: Device,
    data: bytes,
    record: EngineRecord,
    settings: Settings,
    *,
    key: bytes,
    facts: dict[str, Any],
) -> TensorRT:
    """The backend on a device; lets go of it when that fails.

    Args:
        bundle: whose gate decides.
        api: the package.
        device: the GPU.
        data: the engine, checked.
        record: of the engine.
        settings: how to run it.
        key: of what TensorRT-RTX compiles for it.
        facts: of the GPU, for ``info``.
    """
    engine = None
    try:
        engine = Engine(
            api, device, data, record.file, graphs=settings.graphs, store=(open_store(), key)
        )
        outputs = [one.name for one in engine.ports.outputs]
        return TensorRT(
            name=api.name,
            device=device,
            engine=engine,
            outcome=Outcome(bundle, api.name, outputs, record.file),
            values=calibrated_values(bundle.model_bytes()),
            dtype=bundle.manifest.input.dtype,
            settings=settings,
            facts={
                "version": api.version,
                "precision": record.precision,
                "engine": record.file,
                "sparse_layers": _sparse_layers(record),
                **facts,
            },
        )
    except BaseException:
        if engine is not None:
            engine.close()
        device.close()
        raise


def _record(bundle: Bundle, api: Api, gpu: GpuFacts, warn: Callable[[str], None]) -> EngineRecord:
    found = find(bundle, Wanted(package=api.name, version=api.version, sm=gpu.sm, gpu=gpu.name))
    if found.record is None:
        why = f": {found.why}" if found.why else ""
        raise NoEngineError(
            f"{bundle.path} holds no engine for {api.title} on {gpu.name} (sm_{gpu.sm}){why}",
            remedy=f"Build one: moon export {bundle.path} --trt",
        )
    if found.warning:
        warn(found.warning)
    return found.record


def _gpu(driver: Driver, gpu: GpuFacts) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "cc": "{}.{}".format(*gpu.compute_capability),
        "driver": driver.release or None,
        "cuda": "{}.{}".format(*driver.cuda_version),
        "memory": gpu.memory,
        "integrated": gpu.integrated,
    }


def _sparse_layers(record: EngineRecord) -> dict[str, Any]:
    """How many layers could use 2:4 kernels and do, and why where nobody could say."""
    sides = {"eligible": record.sparsity.eligible, "picked": record.sparsity.picked}
    counts = {name: None if layers is None else len(layers) for name, layers in sides.items()}
    return {**counts, "why": record.sparsity.why or None}
