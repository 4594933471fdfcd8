"""What engine is asked for, and who builds it: by the GPU, and by what is installed."""

from typing import Any

import pytest

from moon.errors import BackendError, MissingExtraError, UsageError
from moon.export.trt import request as module
from moon.export.trt.request import EngineRequest, choose, read_profile, read_targets, wanted
from moon.runtime.trt.gpu import Gpu
from moon.runtime.trt.sidecar import Profile

ORIN, RTX, H100 = Gpu("Orin", 87), Gpu("RTX 3060", 86), Gpu("H100", 90)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU or without, and with some packages."""

    def make(gpu: Gpu | None, *packages: str) -> None:
        monkeypatch.setattr(module, "first_gpu", lambda: gpu)
        monkeypatch.setattr(module, "installed", lambda name: "1" if name in packages else None)

    return make


@pytest.mark.parametrize(
    ("gpu", "packages", "targets", "package"),
    [
        (None, ("tensorrt_rtx",), (86, 120), "tensorrt_rtx"),
        (RTX, ("tensorrt_rtx", "tensorrt"), (), "tensorrt_rtx"),
        (RTX, ("tensorrt",), (), "tensorrt"),
        (ORIN, ("tensorrt",), (), "tensorrt"),
        (H100, ("tensorrt", "tensorrt_rtx"), (), "tensorrt"),
        (H100, ("tensorrt", "tensorrt_rtx"), (86,), "tensorrt_rtx"),
    ],
)
def test_who_builds(
    machine: Any, gpu: Gpu | None, packages: tuple[str, ...], targets: Any, package: str
) -> None:
    machine(gpu, *packages)
    choice = choose(EngineRequest(targets=targets))
    assert choice.package == package and choice.gpu == gpu
    assert choice.targets == (targets or (gpu.sm if gpu else 0,))


@pytest.mark.parametrize(
    ("gpu", "packages", "options", "error", "text"),
    [
        (None, ("tensorrt_rtx",), {}, UsageError, r"no GPU here.*--trt-target sm_86"),
        (None, (), {"targets": (86,)}, BackendError, r"sm_86 needs TensorRT-RTX.*or TensorRT"),
        (None, ("tensorrt_rtx",), {"targets": (87,)}, BackendError, r"Jetson Orin\) needs TensorR"),
        (None, ("tensorrt_rtx",), {"targets": (90,)}, BackendError, r"H100 or H200\) needs Tens"),
        (None, ("tensorrt",), {"targets": (87,)}, BackendError, r"GPU at hand alone.*none here"),
        (RTX, ("tensorrt",), {"targets": (89,)}, BackendError, r"which is RTX 3060.*trt-rtx"),
        (ORIN, ("tensorrt",), {"targets": (90, 100)}, UsageError, r"one GPU at a time"),
        (None, (), {"targets": (61,)}, UsageError, r"no version of TensorRT builds for sm_61"),
        (
            None,
            ("tensorrt_rtx",),
            {"targets": (110,), "package": "tensorrt_rtx"},
            UsageError,
            r"sm_110 is no GPU of TensorRT-RTX.*Thor\) needs TensorRT: ",
        ),
        (
            None,
            (),
            {"targets": (86,), "package": "tensorrt_rtx"},
            MissingExtraError,
            r"tensorrt_rtx, which is not installed.*\[trt-rtx\]",
        ),
    ],
)
def test_why_nobody_builds(
    machine: Any, gpu: Gpu | None, packages: Any, options: Any, error: Any, text: str
) -> None:
    machine(gpu, *packages)
    with pytest.raises(error, match=text):
        choose(EngineRequest(**options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"profile": Profile(min=4, opt=8, max=16)}, "leave out a single image.*1,8,16"),
        ({"profile": Profile(min=1, opt=8, max=4)}, "do not rise"),
        ({"profile": Profile(min=0, opt=1, max=4)}, "do not rise"),
        ({"precision": "bf16"}, "precision must be fp16 or fp32 or int8, not 'bf16'"),
        ({"package": "openvino"}, "package must be"),
    ],
)
def test_requests_check_themselves(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        EngineRequest(**options)


def test_words() -> None:
    assert read_targets(["sm_86", "8.9,sm_120"]) == (86, 89, 120)
    assert EngineRequest(targets=(120, 86, 86)).targets == (86, 120)
    assert read_profile("1,8,32") == Profile(min=1, opt=8, max=32)
    assert read_profile("16") == Profile(min=1, opt=16, max=16)
    for text in ("", "1,2", "a,b,c", "1,2,3,4"):
        with pytest.raises(UsageError, match="MIN,OPT,MAX"):
            read_profile(text)
    with pytest.raises(UsageError, match="'ampere' is no compute capability"):
        read_targets(["ampere"])
    assert wanted(False) is None and wanted(True) == EngineRequest()
