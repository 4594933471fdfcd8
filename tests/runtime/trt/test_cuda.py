"""The calls of the CUDA driver, with a library that stands in for it: nothing runs on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moon.errors import BackendError
from moon.runtime.trt import cuda
from moon.runtime.trt.cuda import CudaError, Driver
from moon.runtime.trt.device import Device

_SOURCE = Path(__file__).with_name("driver.c")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("driver") / "driver.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", target, _SOURCE], check=True)
    return ctypes.CDLL(str(target))


def test_what_a_gpu_is(library: Any) -> None:
    driver = Driver(library)
    assert driver.cuda_version == (13, 1) and driver.devices == 1
    facts = driver.facts()
    assert (facts.name, facts.compute_capability, facts.memory) == ("Stand-in", (8, 6), 12 << 30)
    assert not facts.integrated


def test_memory_streams_events_and_graphs_through_ctypes(library: Any) -> None:
    device = Device(Driver(library))
    with device:
        stream, address = device.stream(), device.allocate(64)
        here, there = device.pinned(64), device.pinned(64)
        here[:] = np.arange(64)
        there[:] = 0
        device.copy_in(address, here, 64, stream)
        device.copy_out(there, address, 48, stream)
        device.wait(stream)
        assert there[:48].tolist() == list(range(48)) and not there[48:].any()
        start, end = device.event(), device.event(sleeping=True)
        device.record(start, stream)
        device.record(end, stream)
        device.wait_event(end)
        assert device.elapsed_ms(start, end) == 1.5
        device.begin_capture(stream)
        graph = device.end_capture(stream)
        device.launch(graph, stream)
        for free, what in (
            (device.destroy_graph, graph), (device.destroy_event, start),
            (device.destroy_event, end), (device.unpin, here), (device.unpin, there),
            (device.free, address), (device.destroy_stream, stream),
        ):  # fmt: skip
            free(what)  # type: ignore[operator]
    device.close()
    device.close()
    assert library.left() == 0
    with pytest.raises(BackendError, match="let go of"), device:
        pass


def test_too_little_memory_says_how_much_there_is(library: Any) -> None:
    device = Device(Driver(library))
    with device, pytest.raises(CudaError, match=r"512 MiB more.*64 MiB are free"):
        device.allocate(512 << 20)
    device.close()


def test_errors_name_cause_and_remedy(library: Any) -> None:
    with pytest.raises(CudaError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(2\), out of memory\. Use"):
        Driver(library).call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 1 << 30)
    with pytest.raises(CudaError, match=r"101.*unknown to the driver. Check CUDA_VISIBLE_DEVICES"):
        Device(Driver(library), 3)


def test_a_driver_that_is_too_old() -> None:
    with pytest.raises(BackendError, match=r"lacks cuInit. Install one for CUDA 12"):
        Driver(SimpleNamespace())


def test_no_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARIES", ("libnosuchcuda.so.1",))
    cuda._loaded.cache_clear()
    with pytest.raises(BackendError, match=r"no NVIDIA driver here \(libnosuchcuda") as raised:
        Driver.load()
    assert "\n" not in str(raised.value) and "--backend onnxruntime" in str(raised.value)


def test_release_of_the_driver(
    library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "version"
    monkeypatch.setattr(cuda, "_RELEASE_FILE", told)
    assert Driver(library).release == ""
    told.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n")
    assert Driver(library).release == "580.65.06"
