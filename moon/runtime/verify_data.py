"""A bundle's backends against one another over real images, where there is no PyTorch.

The reference is the bundle's own graph on ONNX Runtime's CPU provider, which the export compared
with the model. It is run as the others are; itself it is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moon.bundle import Bundle
from moon.errors import DataError, UsageError
from moon.progress import Progress
from moon.runtime.agreement import IMAGES, Budget
from moon.runtime.backend import DEFAULT, open_backend
from moon.runtime.sampled import Compared, compared, flips_remedy, run_backend, run_images
from moon.runtime.verify import Check

if TYPE_CHECKING:
    from moon.data.items import Source

__all__ = ["over_images"]


def over_images(
    bundle: Bundle,
    data: str | Source,
    names: Sequence[str],
    limit: int | None,
    flips: int | None,
    progress: Progress,
) -> list[Check]:
    """A check for each backend but the reference, over images.

    Args:
        data: the images; labels are not needed.
        names: of the backends.
        limit: how many images, spread evenly over the source; default 1,000.
        flips: see :class:`moon.runtime.agreement.Budget`.
        progress: told how many images are done.

    Raises:
        DataError, ImageError: the images cannot be read.
        BackendError: ONNX Runtime cannot run the graph.
        UsageError: a number is out of range.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit must be 1 or more, not {limit}")
    if flips is not None and flips < 0:
        raise UsageError(f"the flips allowed must be 0 or more, not {flips}")
    pixels, spec = _pixels(bundle, data, IMAGES if limit is None else limit)
    backend = open_backend(bundle, DEFAULT, threads=0)
    reference = run_images(bundle, backend, pixels, lambda done, n: progress(done, n, DEFAULT))
    checks = []
    for name in names:
        if name == DEFAULT:
            continue
        ran = run_backend(
            bundle,
            name,
            pixels,
            reference,
            progress=lambda done, n, name=name: progress(done, n, name),  # type: ignore[misc]
        )
        found = compared(ran, reference, bundle, Budget(flips))
        checks.append(_check(found, ran.notes, bundle, reference, spec))
    return checks


def _pixels(bundle: Bundle, data: str | Source, most: int) -> tuple[NDArray[np.uint8], str]:
    from moon.data.load import load_pixels
    from moon.data.source import open_source

    source = open_source(data) if isinstance(data, str) else data
    if not len(source):
        raise DataError(f"{source.spec} holds no images", remedy="Use another source")
    count = min(most, len(source))
    rows = np.arange(count) * len(source) // count
    return load_pixels(source, bundle.preprocess, rows), source.spec


def _check(
    found: Compared,
    notes: Sequence[str],
    bundle: Bundle,
    reference: Mapping[str, NDArray[Any]],
    spec: str,
) -> Check:
    name = f"{found.name} on {spec}"
    if found.agreement is None:
        return Check(name, False, found.refused)
    detail = str(found.agreement)
    if found.own_gate:
        detail += ", by its own gate"
    if found.excess:
        detail = f"{found.excess}, compared with {DEFAULT}"
    remedy = ""
    if "decides" in found.excess:
        remedy = flips_remedy(found, str(bundle.path))
    elif "another class" in found.excess:
        remedy = f"Accept them with --flips {found.agreement.labels_differ}"
    detail += "".join(f"; {note}" for note in notes)
    return Check(name, not found.excess, detail, found.to_json(), remedy)
