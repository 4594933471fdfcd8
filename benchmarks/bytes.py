"""Bytes of sparse models in every form, and whether ONNX Runtime's answers are bit-equal.

    python benchmarks/bytes.py [--sparsity 0.8 0.9 0.95 0.99] [--seed 0]
    python benchmarks/bytes.py RUN|BUNDLE|MODEL.onnx ... [--out FOLDER]

Without a model: ResNet-18 for small images (3x3 stem, no max-pool, 11 outputs), its weights
random, its masks random with layer densities by ERK. Shares are of the whole file, with dense
float32 weights and the same score head. zstd is of level 9. "random" is what was found for random
masks of equal density in every layer, weights alone; it stands where the sparsity is one of those.
Load time is the processor's, the fastest of three. --out writes bytes.json, and bytes.md, a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from rich.console import Console
from rich.table import Table

from moon.bundle import Bundle
from moon.errors import ExportError, MoonError, UsageError
from moon.export.checks import check_onnx, check_packed
from moon.export.codec import KINDS, Kind
from moon.export.graph import array, initializers, weight_names
from moon.export.head import add_head
from moon.export.pack import Values, Weights, pack, round_values
from moon.export.trace import trace
from moon.runtime.onnxruntime import open_session
from moon.runtime.unpack import dense_model
from moon.trainer.checkpoint import Checkpoint
from moon.trainer.models import build
from moon.trainer.sparsity.budget import counts, densities
from moon.trainer.sparsity.topology import find_layers, generator, random_mask
from moon.zstd import compress

OUTPUTS, SIZE = 11, (32, 32)
LEVEL, LOADS = 9, 3


@dataclass(frozen=True)
class Form:
    """A way to store the weights; ``random`` are shares by sparsity in percent, without zstd and
    with it."""

    title: str
    weights: Weights
    values: Values
    kinds: tuple[Kind, ...]
    random: dict[int, float]
    random_zstd: dict[int, float]


def _shares(*four: float) -> dict[int, float]:
    return dict(zip((80, 90, 95, 99), four, strict=False))


FORMS = (
    Form("dense fp32", "dense", "fp32", (), {}, {}),
    Form("dense fp16", "dense", "fp16", (), {}, _shares(0.145, 0.080, 0.044, 0.010)),
    Form("coo fp32", "coo", "fp32", (), _shares(0.60, 0.30, 0.15, 0.030), {}),
    Form("bitmask fp16", "compact", "fp16", ("bitmask",), _shares(0.131, 0.081, 0.056, 0.036), {}),
    Form(
        "deltas fp16", "compact", "fp16", ("gaps",),
        _shares(0.150, 0.075, 0.037, 0.0077), _shares(0.118, 0.062, 0.032, 0.0070),
    ),
    Form("compact fp16", "compact", "fp16", KINDS, {}, {}),
    Form("compact fp32", "compact", "fp32", KINDS, {}, {}),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    form: str
    bytes: int
    share: float
    zstd_bytes: int
    zstd_share: float
    random: float | None
    random_zstd: float | None
    exact: bool
    load_ms: float
    checker: str


@dataclass(frozen=True)
class Subject:
    """A model with plain dense weights."""

    name: str
    model: ModelProto

    @property
    def sparsity(self) -> float:
        held = initializers(self.model)
        weights = [array(held[name]) for name in weight_names(self.model)]
        return 1 - sum(map(np.count_nonzero, weights)) / sum(one.size for one in weights)


def sparse_net(
    sparsity: float, seed: int, *, model: str = "resnet18", size: tuple[int, int] = SIZE
) -> torch.nn.Module:
    """The network with random weights and masks."""
    net = build(model, outputs=OUTPUTS, channels=3, size=size, seed=seed)
    layers = find_layers(net)
    kept = counts(layers, densities(layers, 1 - sparsity, "erk"))
    with torch.no_grad():
        for layer in layers:
            draw = generator(seed, 0, layer.name)
            layer.weight.mul_(random_mask(layer.weight, kept[layer.name], draw))
    return net


def random_subject(sparsity: float, seed: int) -> Subject:
    """The traced graph with its score head."""
    graph = trace(sparse_net(sparsity, seed), channels=3, size=SIZE)
    model = add_head(graph, outputs=OUTPUTS, unknown_index=OUTPUTS - 1)
    return Subject(f"ResNet-18, random, {sparsity:.0%}", model)


def open_subject(path: Path) -> Subject:
    """A run, a bundle or an ONNX file.

    Raises:
        MoonError: it is none of them, or damaged.
    """
    if (path / "checkpoint.json").is_file():
        run = Checkpoint.load(path)
        prepared = run.preprocess
        net = trace(run.model(), channels=prepared.channels, size=prepared.crop)
        model = add_head(net, outputs=run.outputs, unknown_index=run.unknown_index)
        return Subject(path.name, model)
    data = path.read_bytes() if path.is_file() else Bundle.open(path).model_bytes()
    return Subject(path.name, onnx.load_model_from_string(dense_model(data)))


def feeds(model: ModelProto, seed: int) -> dict[str, Any]:
    """Seven random images for the graph's inputs."""
    rng = np.random.default_rng(seed)
    found = {}
    for value in open_session(model.SerializeToString(), threads=1).get_inputs():
        shape = [side if isinstance(side, int) else 7 for side in value.shape]
        if value.type == "tensor(uint8)":
            found[value.name] = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            found[value.name] = rng.standard_normal(shape).astype(np.float32)
    return found


def load_and_run(data: bytes, inputs: dict[str, Any]) -> tuple[list[Any], float]:
    times = []
    for _ in range(LOADS):
        start = time.process_time()
        session = open_session(data, threads=1)
        times.append(time.process_time() - start)
    return session.run(None, inputs), min(times) * 1e3


def checked(model: ModelProto) -> str:
    for full in (True, False):
        try:
            check_onnx(model, full=full)
        except ExportError:
            continue
        return "full" if full else "without shapes"
    return "refused"


def measure(subject: Subject, seed: int) -> list[Row]:
    inputs = feeds(subject.model, seed)
    dense = subject.model.ByteSize()
    known = round(100 * subject.sparsity)
    rows, expected = [], {}
    for form in FORMS:
        rounded = round_values(subject.model, form.values)
        if form.values not in expected:
            expected[form.values] = load_and_run(rounded.SerializeToString(), inputs)[0]
        packed = pack(subject.model, weights=form.weights, values=form.values, kinds=form.kinds)
        check_packed(packed, rounded)
        data = packed.SerializeToString()
        got, load_ms = load_and_run(data, inputs)
        wanted = expected[form.values]
        same = all(a.tobytes() == b.tobytes() for a, b in zip(wanted, got, strict=True))
        small = len(compress(data, level=LEVEL))
        rows.append(
            Row(
                form.title, len(data), len(data) / dense, small, small / dense,
                form.random.get(known), form.random_zstd.get(known), same, load_ms,
                checked(packed),
            )
        )  # fmt: skip
    return rows


def show(console: Console, subject: Subject, rows: list[Row]) -> None:
    table = Table(title=f"{subject.name}: {subject.sparsity:.2%} of the weights are zero")
    table.add_column("form")
    for column in ("bytes", "share", "random", "zstd", "share", "random", "outputs", "load"):
        table.add_column(column, justify="right")
    table.add_column("checker")
    for row in rows:
        table.add_row(
            row.form, f"{row.bytes:,}", _percent(row.share), _percent(row.random),
            f"{row.zstd_bytes:,}", _percent(row.zstd_share), _percent(row.random_zstd),
            "bit-equal" if row.exact else "DIFFERENT", f"{row.load_ms:.1f} ms", row.checker,
        )  # fmt: skip
    console.print(table)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def markdown(found: list[tuple[Subject, list[Row]]]) -> str:
    """Shares by model: a row a form, and one for each with zstd."""
    head = ["form", *(f"{subject.name}, {subject.sparsity:.1%}" for subject, _ in found)]
    lines = [head, ["---"] * len(head)]
    for i, form in enumerate(FORMS):
        each = [rows[i] for _, rows in found]
        lines.append([form.title, *(_beside(row.share, row.random) for row in each)])
        lines.append(
            [f"{form.title}, zstd", *(_beside(row.zstd_share, row.random_zstd) for row in each)]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _beside(share: float, random: float | None) -> str:
    return _percent(share) + (f" ({_percent(random)})" if random is not None else "")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="RUN|BUNDLE|MODEL.onnx")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    console = Console(width=130)
    try:
        for sparsity in given.sparsity:
            if not 0 <= sparsity < 1:
                raise UsageError(f"--sparsity {sparsity:g} is not from 0 to below 1")
        if given.models:
            subjects = [open_subject(path) for path in given.models]
        else:
            subjects = [random_subject(sparsity, given.seed) for sparsity in given.sparsity]
        found = []
        for subject in subjects:
            found.append((subject, measure(subject, given.seed)))
            show(console, *found[-1])
    except MoonError as error:
        print(f"bytes: {error}", file=sys.stderr)
        return error.exit_code
    tools = (
        f"outputs: against dense weights rounded alike; onnx {onnx.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, {platform.machine()}"
    )
    console.print(tools)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        plain = [
            {"name": one.name, "sparsity": one.sparsity, "rows": [asdict(row) for row in rows]}
            for one, rows in found
        ]
        document = json.dumps({"tools": tools, "models": plain}, indent=2)
        (given.out / "bytes.json").write_text(document + "\n", encoding="utf-8")
        (given.out / "bytes.md").write_text(markdown(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
