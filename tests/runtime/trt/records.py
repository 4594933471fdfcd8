"""A record of an engine that nobody built, for what needs no TensorRT."""

from typing import Any

from moon.bundle import Bundle
from moon.calibrated import model_hash
from moon.files import sha256_bytes
from moon.runtime.trt.sidecar import EngineRecord, Profile, Sparsity, Tensor, engine_name

ENGINE = bytes(range(256)) * 40


def make_record(bundle: Bundle | None = None, **changes: Any) -> EngineRecord:
    given: dict[str, Any] = {
        "package": "tensorrt_rtx",
        "package_version": "1.7.1.116",
        "targets": (86, 120),
        "precision": "fp16",
        "model_sha256": "0" * 64 if bundle is None else model_hash(bundle.model_bytes()),
        **changes,
    }
    name = engine_name(
        given["package"], given["package_version"], given["targets"], given["precision"]
    )
    given.setdefault("file", name + (".zst" if given.get("compression") else ""))
    return EngineRecord(
        **{
            "sha256": sha256_bytes(ENGINE),
            "size": len(ENGINE),
            "parser_version": "200",
            "moon": "0",
            "built": "2026-01-01T00:00:00+00:00",
            "build_s": 1.5,
            "gpu": None,
            "inputs": {"input": Tensor(dtype="float32", shape=(-1, 1, 8, 8))},
            "outputs": {"label": Tensor(dtype="int64", shape=(-1,))},
            "profile": Profile(min=1, opt=1, max=8),
            "flags": (),
            "layers": None,
            "checked": "header",
            "parity": {"images": 16, "max_abs": 0.001, "gate_agreement": None},
            "sparsity": Sparsity(
                pattern="2:4", asked=True, eligible=("conv",), picked=None, why="no GPU"
            ),
            **given,
        }
    )
