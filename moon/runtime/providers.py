"""ONNX Runtime's execution providers: their names, what each needs, and which run here.

Facts are ONNX Runtime's documentation of its execution providers
(https://onnxruntime.ai/docs/execution-providers/).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from moon.backend_name import BackendName
from moon.errors import BackendError
from moon.runtime.backend import Availability

__all__ = ["PROVIDERS", "Provider", "offered", "provider_of", "providers"]

_CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: moon's short name, as in ``onnxruntime:cuda``.
        ep: ONNX Runtime's name.
        device: what computes, for people.
        install: what to do where it is missing.
        needs: what it needs beside that, for where it is installed and yet cannot be used.
        plugin: a Python package that brings it as a library of its own, "" where none does.
        behind: providers, before the CPU's, that take what this one leaves.
        system: the only one it is for, as :func:`platform.system` calls it; "" for several.
        packaged: whether pip brings it.
        memory: where its tensors lie, as ONNX Runtime calls the device; "cpu" where inputs and
            outputs are the host's.
    """

    name: str
    ep: str
    device: str
    install: str
    needs: str = "Check its options, and that its device and driver are here"
    plugin: str = ""
    behind: tuple[str, ...] = ()
    system: str = ""
    packaged: bool = True
    memory: str = "cpu"

    @property
    def backend(self) -> str:
        """As users write it."""
        return f"onnxruntime:{self.name}"


_GPU = "pip install 'onnxruntime-gpu[cuda,cudnn]' in place of onnxruntime, and NVIDIA's driver"
_CUDA_NEEDS = (
    "It needs NVIDIA's driver, and CUDA and cuDNN as it was built with: "
    "pip install 'onnxruntime-gpu[cuda,cudnn]' brings both"
)
_OWN = "Build ONNX Runtime with it; no package of it is published"
_ALL = (
    Provider("cuda", _CUDA, "NVIDIA GPU, CUDA", _GPU, _CUDA_NEEDS, memory="cuda"),
    Provider(
        "tensorrt",
        "TensorrtExecutionProvider",
        "NVIDIA GPU, TensorRT",
        f"{_GPU}, and the TensorRT libraries that this release of it was built with",
        f"{_CUDA_NEEDS}, and the libraries of TensorRT on the library path",
        behind=(_CUDA,),
        memory="cuda",
    ),
    Provider(
        "nvtensorrtrtx",
        "NvTensorRTRTXExecutionProvider",
        "NVIDIA RTX GPU, TensorRT for RTX",
        "pip install onnxruntime-ep-nv-tensorrt-rtx, and NVIDIA's driver",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
    ),
    Provider(
        "openvino",
        "OpenVINOExecutionProvider",
        "Intel CPU, GPU or NPU, OpenVINO",
        "pip install onnxruntime-openvino in place of onnxruntime, or onnxruntime-ep-openvino "
        "beside it",
        plugin="onnxruntime_ep_openvino",
    ),
    Provider(
        "directml",
        "DmlExecutionProvider",
        "GPU on Windows, DirectML",
        "pip install onnxruntime-directml in place of onnxruntime, on Windows",
        system="Windows",
    ),
    Provider(
        "coreml",
        "CoreMLExecutionProvider",
        "Apple GPU or Neural Engine, Core ML",
        "pip install onnxruntime on macOS",
        system="Darwin",
    ),
    Provider("xnnpack", "XnnpackExecutionProvider", "CPU, XNNPACK", _OWN, packaged=False),
    Provider("dnnl", "DnnlExecutionProvider", "CPU, oneDNN", _OWN, packaged=False),
    Provider(
        "webgpu",
        "WebGpuExecutionProvider",
        "GPU, WebGPU",
        "pip install onnxruntime-ep-webgpu, and a driver for Vulkan, Direct3D 12 or Metal",
        plugin="onnxruntime_ep_webgpu",
    ),
)
PROVIDERS: Mapping[str, Provider] = MappingProxyType({one.name: one for one in _ALL})


def provider_of(name: BackendName) -> Provider | None:
    """The provider a name asks for; None for ONNX Runtime's own CPU one.

    Raises:
        BackendError: no provider is called so.
    """
    if not name.provider:
        return None
    if name.provider not in PROVIDERS:
        raise BackendError(
            f"ONNX Runtime has no provider {name.provider} that moon knows",
            remedy=f"Choose one of cpu, {', '.join(PROVIDERS)}",
        )
    return PROVIDERS[name.provider]


def offered(ort: Any, provider: Provider) -> bool:
    """Whether the ONNX Runtime installed holds the provider, or a package beside it does.

    Args:
        ort: the module ``onnxruntime``.
    """
    built_in = provider.ep in ort.get_available_providers()
    return built_in or bool(provider.plugin and find_spec(provider.plugin))


def providers() -> Mapping[str, Availability]:
    """Providers by their backend's name, and whether they can run here.

    Those that are installed are tried, in a process of their own each: that one is installed
    does not say that its libraries and its device are there. Of the others those are named
    that pip can install on this system.
    """
    from moon.runtime.provider_probe import probe

    fitting = [one for one in _ALL if one.system in ("", platform.system())]
    if find_spec("onnxruntime") is None:
        return {one.backend: _missing(one) for one in fitting if one.packaged}
    import onnxruntime as ort

    found = {}
    for one in fitting:
        if not offered(ort, one):
            if one.packaged:
                found[one.backend] = _missing(one)
            continue
        refused = probe(BackendName("onnxruntime", one.name))
        if refused:
            found[one.backend] = Availability(False, refused.cause, refused.remedy)
        else:
            found[one.backend] = Availability(True, f"ONNX Runtime {ort.__version__}, {one.device}")
    return found


def _missing(provider: Provider) -> Availability:
    return Availability(False, f"{provider.device}: not installed", provider.install)
