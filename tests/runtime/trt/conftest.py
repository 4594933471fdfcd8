"""Engines on a device that stands in for a GPU. Nothing here runs on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from moon.bundle import Bundle
from moon.calibrated import calibrated_values
from moon.runtime.trt.backend import Settings, TensorRT
from moon.runtime.trt.opening import opened

if TYPE_CHECKING:
    from tests.runtime.trt.standin import StandInDevice

Open = Callable[..., TensorRT]


@pytest.fixture
def device() -> StandInDevice:
    from tests.runtime.trt.standin import StandInDevice

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
        from tests.runtime.trt.standin import RECORD, StandInApi, StandInEngine

        model = bundle.model_bytes() if model is None else model
        values = calibrated_values(model) if with_inputs else None
        engine = StandInEngine(device, model, profile, values)
        device.engine = engine
        return opened(
            bundle, StandInApi(engine), device, b"", RECORD, settings or Settings(),
            key=bytes(32), facts={"provider": "stand-in", "gpu": None},
        )  # fmt: skip

    return opener
