"""Engines on a device that stands in for a GPU. Nothing here runs on one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from moon.bundle import Bundle
from moon.calibrated import calibrated_values
from moon.runtime.trt.api import Validity
from moon.runtime.trt.backend import Settings, TensorRT
from moon.runtime.trt.log import Log
from moon.runtime.trt.opening import opened
from moon.runtime.trt.package import PACKAGES

trt = pytest.importorskip("tensorrt_rtx", reason="its enumerations are used")

from tests.runtime.trt.standin import StandInDevice, StandInEngine  # noqa: E402


class StandInApi:
    """An ``Api`` whose runtime gives an engine that stands in for one."""

    def __init__(self, engine: StandInEngine | None, why: str = "") -> None:
        # TensorRT's own enumerations, without those that only TensorRT-RTX has.
        names = ("TensorIOMode", "TensorLocation", "DataType", "nptype")
        self.trt = SimpleNamespace(**{name: getattr(trt, name) for name in names})
        self.name, self.version, self.package = "tensorrt", "11.4.0", PACKAGES["tensorrt"]
        self.title, self.log, self._engine, self._why = "TensorRT 11.4.0", Log(), engine, why

    def runtime(self) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine)

    def check(self, data: bytes, runtime: Any) -> Validity:
        return Validity(ok=not self._why, why=self._why, complete=True)


RECORD = SimpleNamespace(
    file="engines/stand-in.engine",
    precision="fp32",
    sparsity=SimpleNamespace(eligible=("a", "b"), picked=None, why="nobody looked"),
)
Open = Callable[..., TensorRT]


@pytest.fixture
def device() -> StandInDevice:
    return StandInDevice()


@pytest.fixture
def open_standin(device: StandInDevice) -> Open:
    """Opens a bundle's own graph as an engine on the device that stands in for a GPU."""

    def opener(
        bundle: Bundle,
        *,
        profile: tuple[int, int, int] = (1, 4, 8),
        settings: Settings | None = None,
        with_inputs: bool = False,
        model: bytes | None = None,
    ) -> TensorRT:
        model = bundle.model_bytes() if model is None else model
        values = calibrated_values(model) if with_inputs else None
        engine = StandInEngine(device, model, profile, values)
        device.engine = engine
        return opened(
            bundle, StandInApi(engine), device, b"", RECORD, settings or Settings(),
            key=bytes(32), facts={"provider": "stand-in", "gpu": None},
        )  # fmt: skip

    return opener
