"""``moon drift``: the drift test over images that ``moon score`` decided."""

from __future__ import annotations

__all__ = ["drift"]

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moon.cli.console import output, print_json, working
from moon.cli.options import AsJson, Backend, Debug
from moon.errors import DataError, UsageError

if TYPE_CHECKING:
    from moon.drift import DriftTest

_COLUMNS = ["decision", "threshold"]


def drift(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What decided.")],
    scores: Annotated[
        list[Path], typer.Argument(metavar="FILE.parquet ...", help="Tables, in order of time.")
    ],
    backend: Backend = "onnxruntime",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Test whether more images are abstained from than the calibration allows.

    The same test that moon serve runs on its traffic. Rows count in the order of the tables,
    which should be that of time; those of images that could not be read do not.
    """
    from moon.bundle import Bundle
    from moon.drift import DriftTest

    opened = Bundle.open(bundle)
    gate = opened.gate(backend)
    if gate is None:
        raise UsageError(f"{bundle} is not calibrated", remedy="Run moon calibrate first")
    with working("Testing"):
        found = _test(DriftTest.of(gate), scores)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _test(test: DriftTest, tables: list[Path]) -> dict[str, Any]:
    from moon.drift import DETECTOR_ALARM, E_VALUE_ALARM, NOTHING

    watched = NOTHING
    reached: dict[str, int | None] = {"e_value": None, "detector": None}
    for rejected, thresholds in _decisions(tables):
        paths = test.path(rejected, thresholds, watched)
        levels = (E_VALUE_ALARM, DETECTOR_ALARM)
        for name, path, level in zip(reached, paths, levels, strict=True):
            over = (path >= math.log(level)).nonzero()[0]
            if reached[name] is None and len(over):
                reached[name] = watched.images + int(over[0]) + 1
        watched = test.watch(rejected, thresholds, watched)
    return {
        "images": watched.images,
        "rejected": watched.rejected,
        "bound": max(test.bounds.values()),
        # Infinity is not JSON.
        "log10_e_value": watched.log_e_value / math.log(10),
        "log10_detector": watched.log_detector / math.log(10) if watched.images else None,
        "alarm": reached["e_value"] is not None,
        "first_image": reached,
    }


def _decisions(tables: list[Path]) -> Iterator[tuple[Any, Any]]:
    import pyarrow
    from pyarrow import parquet

    for table in tables:
        try:
            with parquet.ParquetFile(table) as file:
                for batch in file.iter_batches(columns=_COLUMNS):
                    decided = batch.filter(batch["decision"].is_valid())
                    rejected = decided["decision"].to_numpy(zero_copy_only=False) == "abstain"
                    yield rejected, decided["threshold"].to_numpy(zero_copy_only=False)
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{table} is not a table of decisions: {error}",
                remedy="Make one with moon score BUNDLE SOURCE --out FILE.parquet",
            ) from error


def _show(found: dict[str, Any]) -> None:
    images, rejected = found["images"], found["rejected"]
    share = f", {rejected / images:.2%}" if images else ""
    lines = [f"{images:,} images, {rejected:,} abstained{share} (allowed {found['bound']:.2%})"]
    if found["alarm"]:
        first = found["first_image"]["e_value"]
        lines.append(f"Drift: the e-value reached 10^3 at image {first:,}")
    else:
        lines.append("No drift: the e-value never reached 10^3")
    lines.append(f"It ends at 10^{found['log10_e_value']:.1f}")
    for line in lines:
        output().print(line, markup=False)
