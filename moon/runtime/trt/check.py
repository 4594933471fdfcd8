"""Is an engine in a bundle whole, of this model, and what the package here takes?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moon.calibrated import model_hash
from moon.errors import BundleError, MissingExtraError, MoonError
from moon.runtime.trt.api import load, numbers
from moon.runtime.trt.package import PACKAGES, installed
from moon.runtime.trt.sidecar import EngineRecord
from moon.runtime.trt.stored import engine_bytes, records

if TYPE_CHECKING:
    from moon.bundle import Bundle

__all__ = ["check_engines"]


def check_engines(bundle: Bundle) -> list[tuple[str, bool, str]]:
    """For each engine: its file, whether it is as it should be, and the figures or what is wrong.

    An engine for another version of the package, or for GPUs that are not here, is whole all the
    same; that it was not run is said.
    """
    stored = records(bundle)
    model = model_hash(bundle.model_bytes()) if stored else ""
    found = []
    for name, record in stored.items():
        if isinstance(record, BundleError):
            found.append((name, False, str(record)))
            continue
        try:
            ok, detail = _checked(bundle, record, model)
        except BundleError as error:
            ok, detail = False, str(error)
        found.append((record.file, ok, detail))
    return found


def _checked(bundle: Bundle, record: EngineRecord, model: str) -> tuple[bool, str]:
    what = f"{record.title} for {record.gpus}, {record.precision}"
    if record.model_sha256 != model:
        return False, f"stale: it was built from another model; moon export BUNDLE --trt for {what}"
    try:
        data = engine_bytes(bundle, record)
    except MissingExtraError as error:
        return True, f"{what}; not read: {error.cause}"
    return _header(record, data, what)


def _header(record: EngineRecord, data: bytes, what: str) -> tuple[bool, str]:
    version = installed(record.package)
    if version is None:
        title = PACKAGES[record.package].title
        return True, f"{what}; whole, and not run: {title} is not installed"
    try:
        api = load(record.package)
        if numbers(record.package_version)[:3] != numbers(api.version)[:3]:
            return True, f"{what}; whole, and not run: {api.title} is installed"
        validity = api.check(data)
    except MoonError as error:
        return True, f"{what}; whole, and not run: {error.cause}"
    if validity.ok:
        return True, f"{what}; whole, its header valid"
    # Only on a GPU can a whole engine be unfit: for another GPU, or an older driver.
    return validity.complete, f"{what}; {validity.why}"
