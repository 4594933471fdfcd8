"""Plans in a bundle: found for the CPU at hand, and put there."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moon.calibrated import model_hash
from moon.errors import BackendError, BundleError
from moon.runtime.sparse.tuning import Target, Tuning, file_name, is_tuning

if TYPE_CHECKING:
    from moon.bundle import Bundle

__all__ = ["facts", "find", "store"]

_AGAIN = "moon bench --tune measures again"


def find(bundle: Bundle, model: bytes, isa: str = "native") -> tuple[Tuning | None, str]:
    """The plans that a bundle has for this CPU.

    Args:
        bundle: opened.
        model: its ONNX file.
        isa: instruction set.

    Returns:
        The plans, or None and why those that there are do not serve; "" where there are none for
        this CPU.

    Raises:
        BundleError: the file is damaged, by its checksum.
        UsageError, MissingExtraError: as :func:`moon.runtime.sparse.isa.choose`.
    """
    if not any(is_tuning(name) for name in bundle.manifest.files):
        return None, ""
    from moon.runtime.sparse.isa import choose, target

    try:
        chosen = choose(isa)
        cpu, _ = target(chosen)
    except BackendError:  # the engine will say so
        return None, ""
    name = file_name(cpu, chosen)
    if name not in bundle.manifest.files:
        return None, ""
    from moon.runtime.sparse.jit import fingerprint
    from moon.runtime.sparse.kernels import SOURCES

    data = bundle.file(name)
    try:
        tuning = Tuning.from_bytes(data)
    except BundleError as error:
        return None, f"{name} is passed over: {error.cause}; {_AGAIN}"
    here = Target(cpu, chosen, fingerprint(*SOURCES), model_hash(model))
    if what := tuning.target.differs(here):
        return None, f"{name} is passed over: it is for {what}; {_AGAIN}"
    return tuning, ""


def store(bundle: Bundle, tuning: Tuning) -> Bundle:
    """Put plans into a bundle, as one change of the whole folder; its version stays.

    What is there for the same CPU and other numbers of images stays as well.

    Returns:
        The bundle, reopened.

    Raises:
        BundleError: the folder holds another model by now, or is damaged.
    """
    from moon.bundle import Bundle
    from moon.rewrite import with_engine_file

    current = Bundle.open(bundle.path)  # another threshold may have come meanwhile
    if model_hash(current.model_bytes()) != tuning.target.model:
        raise BundleError(
            f"{bundle.path} holds another model than the one that was tuned", remedy="Tune it again"
        )
    name = file_name(tuning.target.cpu, tuning.target.isa)
    if name in current.manifest.files:
        with suppress(BundleError):  # what cannot be read is replaced
            tuning = tuning.with_batches(Tuning.from_bytes(current.file(name)))
    return with_engine_file(current, name, tuning.to_bytes())


def facts(bundle: Bundle) -> list[dict[str, Any]]:
    """What a bundle has for which CPUs, as JSON: an entry for each file and number of images."""
    found: list[dict[str, Any]] = []
    for name in sorted(filter(is_tuning, bundle.manifest.files)):
        try:
            tuning = Tuning.from_bytes(bundle.file(name))
        except BundleError as error:
            found.append({"file": name, "error": error.cause})
            continue
        for images, one in sorted(tuning.batches.items()):
            times = one.measured.to_json()
            del times["layers_us"]
            found.append(
                {
                    "file": name,
                    "cpu": tuning.target.cpu,
                    "isa": tuning.target.isa,
                    "together": images,
                    "threads": one.threads,
                    "plans": len(one.plans),
                    "verdict": one.verdict,
                    **times,
                }
            )
    return found
