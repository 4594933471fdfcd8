"""The comparison of backends with the model: its options, and how it is shown."""

from __future__ import annotations

__all__ = [
    "ParityBackend",
    "ParityFlips",
    "ParityImages",
    "agreement_line",
    "int8_line",
    "parity_lines",
]

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

ParityImages = Annotated[
    int,
    typer.Option(
        "--parity-images",
        metavar="N",
        min=1,
        help="Compare every backend here with the model over N of the images.",
    ),
]
ParityFlips = Annotated[
    int | None,
    typer.Option(
        "--parity-flips",
        metavar="N",
        min=0,
        help="Decisions that may differ beyond the tolerance; default 0, in fp16 0.5%.",
    ),
]
ParityBackend = Annotated[
    list[str],
    typer.Option(
        "--parity-backend",
        metavar="NAME",
        help="Compare this backend; repeatable. Default all that can run here.",
    ),
]


def parity_lines(parity: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was compared and how it came out, from a manifest's record of it; a pair a line."""
    sample = parity.get("sample")
    if sample is None:
        return
    images = "images" if sample["real"] else "random images"
    yield "Compared", f"{sample['images']:,} {images} with {sample['reference']}"
    for name, found in parity["backends"].items():
        if "not_compared" in found:
            yield f"  {name}", f"not compared: {found['not_compared']}"
        else:
            yield f"  {name}", "; ".join([agreement_line(found), *found["notes"]])
    if "int8" in parity:
        yield "  int8", int8_line(parity["int8"])
    if "rounding" in parity:
        yield "  rounding", f"{agreement_line(parity['rounding'])}; of the weights, by itself"
    if "largest_in_fp16" in parity:
        largest = parity["largest_in_fp16"]
        yield "  largest", f"{largest['value']:,.0f} of fp16's 65,504, in {largest['layer']}"


def int8_line(measured: Mapping[str, Any]) -> str:
    """What int8 changed, over images that neither ranges nor scores were fitted to."""
    same = [f"{measured[f'{what}_agreement']:.2%}" for what in ("top1", "gate")]
    line = f"labels {same[0]}, decisions {same[1]} those of fp32"
    if measured["accuracy"] is not None:
        accuracy = measured["accuracy"]
        line = f"accuracy {accuracy['int8']:.2%}, of fp32 {accuracy['fp32']:.2%}; {line}"
    return f"{line}; over {measured['images']:,} images"


def agreement_line(found: Mapping[str, Any]) -> str:
    """``logits within 3.2e-06 (allowed 1e-04), labels 100.00%, decisions 100.00% of 998``."""
    gap = "not finite" if found["max_abs"] is None else f"within {found['max_abs']:.1e}"
    line = f"logits {gap} (allowed {found['tolerance']:.0e}), labels {found['top1_agreement']:.2%}"
    if found["gate_agreement"] is None:
        return line
    line += f", decisions {found['gate_agreement']:.2%} of {found['gate_images']:,}"
    flips, within = found["flips"], found["flips_within"]
    if flips or within:
        line += f" ({flips} flipped, {within} within the tolerance)"
    return line + (", by its own gate" if found.get("own_gate") else "")
