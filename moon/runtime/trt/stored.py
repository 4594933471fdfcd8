"""Engines in a bundle: found for a package and a GPU, read whole, and put there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moon.calibrated import model_hash
from moon.errors import BundleError
from moon.files import sha256_bytes
from moon.runtime.trt.api import numbers
from moon.runtime.trt.package import Name
from moon.runtime.trt.sidecar import EngineRecord, is_record, record_name
from moon.zstd import compress, decompress

if TYPE_CHECKING:
    from moon.bundle import Bundle

__all__ = ["Found", "Wanted", "engine_bytes", "facts", "find", "records", "store"]

_AGAIN = "Build the engine again: moon export BUNDLE --trt"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to run an engine.

    Attributes:
        package: ``tensorrt`` or ``tensorrt_rtx``.
        version: of the package installed.
        sm: compute capability of the GPU, None where there is none.
        gpu: its name, or None.
    """

    package: Name
    version: str
    sm: int | None
    gpu: str | None = None


@dataclass(frozen=True)
class Found:
    """An engine that serves, or why none does.

    Attributes:
        record: of the engine, None where none serves.
        why: in one line, what stands against those that there are; "" where there are none.
        warning: what may make the engine slower than one built here, or "".
    """

    record: EngineRecord | None
    why: str = ""
    warning: str = ""


def records(bundle: Bundle) -> dict[str, EngineRecord | BundleError]:
    """Every record of a bundle by its file's name, or what is wrong with it."""
    found: dict[str, EngineRecord | BundleError] = {}
    for name in sorted(filter(is_record, bundle.manifest.files)):
        try:
            record = EngineRecord.from_bytes(bundle.file(name))
            if record.file not in bundle.manifest.files or record_name(record.file) != name:
                raise BundleError(f"it is of {record.file}, which is not beside it", remedy=_AGAIN)
        except BundleError as error:
            found[name] = error
        else:
            found[name] = record
    return found


def find(bundle: Bundle, wanted: Wanted, *, precision: str | None = None) -> Found:
    """The engine of a bundle that fits a package and GPU: of this model, version and GPU.

    Args:
        bundle: opened.
        wanted: what is to run it.
        precision: fp16 or fp32 alone; default either, fp16 before fp32.
    """
    model = model_hash(bundle.model_bytes())
    against: list[str] = []
    fits: list[EngineRecord] = []
    for name, record in records(bundle).items():
        if isinstance(record, BundleError):
            against.append(f"{name} is passed over: {record.cause}")
        elif record.package != wanted.package:
            continue
        elif why := unfit(record, wanted, model):
            against.append(f"{record.file} is passed over: {why}")
        elif precision in (None, record.precision):
            fits.append(record)
        else:
            against.append(f"{record.file} is passed over: it computes in {record.precision}")
    if not fits:
        return Found(None, "; ".join(against))
    best = min(fits, key=lambda one: (one.gpu != wanted.gpu, one.precision != "fp16"))
    other = best.gpu is not None and wanted.gpu is not None and best.gpu != wanted.gpu
    warning = f"{best.file} was built on {best.gpu}, and here is {wanted.gpu}" if other else ""
    return Found(best, warning=warning)


def unfit(record: EngineRecord, wanted: Wanted, model: str) -> str:
    """What stands against an engine, in words; "" where nothing does.

    Args:
        record: of the engine.
        wanted: what is to run it.
        model: hash of the bundle's model.
    """
    if record.model_sha256 != model:
        return f"it was built from another model ({record.model_sha256[:12]}, not {model[:12]})"
    if numbers(record.package_version)[:3] != numbers(wanted.version)[:3]:
        return f"it needs version {record.package_version}, and {wanted.version} is installed"
    if wanted.sm is not None and wanted.sm not in record.targets:
        return f"it is for {record.gpus}, and the GPU is sm_{wanted.sm}"
    return ""


def engine_bytes(bundle: Bundle, record: EngineRecord) -> bytes:
    """An engine, decompressed, its checksum checked again.

    Raises:
        BundleError: it is damaged.
        MissingExtraError: it is compressed and zstandard is not installed.
    """
    data = bundle.file(record.file)
    if record.compression == "zstd":
        data = decompress(data, size=record.size, name=record.file)
    if len(data) != record.size or sha256_bytes(data) != record.sha256:
        raise BundleError(
            f"{record.file} is not the engine that its record names: "
            f"{len(data):,} bytes, {record.size:,} recorded",
            remedy=_AGAIN,
        )
    return data


def store(bundle: Bundle, record: EngineRecord, engine: bytes) -> Bundle:
    """Put an engine and its record into a bundle, as one change of the whole folder.

    Args:
        bundle: rewritten in place; its version stays.
        record: of the engine.
        engine: compressed here where the record says so.

    Returns:
        The bundle, reopened.

    Raises:
        BundleError: the folder holds another model by now, or is damaged.
    """
    from moon.bundle import Bundle
    from moon.rewrite import with_engine_files

    current = Bundle.open(bundle.path)  # another threshold may have come meanwhile
    if model_hash(current.model_bytes()) != record.model_sha256:
        raise BundleError(
            f"{bundle.path} holds another model than the one the engine was built from",
            remedy=_AGAIN,
        )
    name = record_name(record.file)
    data = compress(engine) if record.compression == "zstd" else engine
    stem = name.removesuffix(".json")
    other = [one for one in (f"{stem}.engine", f"{stem}.engine.zst") if one != record.file]
    files = {record.file: data, name: record.to_bytes()}
    return with_engine_files(current, files, drop=other)


def facts(bundle: Bundle) -> list[dict[str, Any]]:
    """What engines a bundle has, as JSON: their records, with ``stale`` and ``stored_bytes``."""
    found: list[dict[str, Any]] = []
    stored = records(bundle)
    model = model_hash(bundle.model_bytes()) if stored else ""
    for name, record in stored.items():
        if isinstance(record, BundleError):
            found.append({"record": name, "error": record.cause})
        else:
            found.append(
                {
                    "record": name,
                    **record.to_json(),
                    "stored_bytes": bundle.manifest.files[record.file].size,
                    "stale": record.model_sha256 != model,
                }
            )
    return found
