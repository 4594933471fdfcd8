"""``moon inspect``: layers, density, bytes, FLOPs, memory and gate of a bundle or a run."""

from __future__ import annotations

__all__ = ["inspect"]

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moon.cli.bytes_view import SORTS, bytes_facts, show_bytes
from moon.cli.classes import show_classes
from moon.cli.console import output, print_json, working
from moon.cli.engine_build import add_engines
from moon.cli.engine_view import engine_facts, show_engine
from moon.cli.facts import (
    bundle_facts,
    bytes_line,
    classes_line,
    plans_line,
    run_facts,
    show_layers,
)
from moon.cli.gpu_view import gpu_facts, show_gpu
from moon.cli.options import AsJson, Debug
from moon.cli.text import count, gate_line, pairs, percent, rates, share, size
from moon.errors import UsageError


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|RUN|MODEL.onnx",
            help="A bundle or a training run; with a view below, a bundle or an ONNX file.",
        ),
    ],
    engine: Annotated[
        bool,
        typer.Option(
            "--engine", help="Run it in the sparse CPU engine, and show what each layer takes."
        ),
    ] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Threads, with --engine; 0: all.")
    ] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images, with --engine.")] = 1,
    isa: Annotated[
        str,
        typer.Option("--isa", metavar="NAME", help="Instruction set, with --engine."),
    ] = "native",
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu", help="Say which layers a GPU's sparse kernels can run (2:4), and why."
        ),
    ] = False,
    in_bytes: Annotated[
        bool,
        typer.Option("--bytes", help="Show in what form each layer is stored, and its bytes."),
    ] = False,
    sort: Annotated[
        str,
        typer.Option("--sort", metavar="ORDER", help=f"Order of --bytes: {', '.join(SORTS)}."),
    ] = "graph",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a bundle or a training run: layers, density, bytes, FLOPs, memory, gate."""
    views = {"--engine": engine, "--gpu": gpu, "--bytes": in_bytes}
    asked = [name for name, wanted in views.items() if wanted]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} are separate views", remedy="Ask for one")
    if asked:
        with working("Running" if engine else "Reading"):
            if engine:
                facts = engine_facts(path, threads=threads, batch=batch, isa=isa)
            else:
                facts = gpu_facts(path) if gpu else bytes_facts(path, sort)
        show = show_engine if engine else show_gpu if gpu else show_bytes
        if as_json:
            print_json(facts)
        else:
            show(output(), facts)
        return
    if path.is_file() and path.suffix == ".onnx":
        raise UsageError(
            f"{path} is an ONNX file, not a bundle",
            remedy="Ask for a view of it: --bytes, --gpu or --engine",
        )
    with working("Reading"):
        if (path / "checkpoint.json").is_file():
            facts, gate = run_facts(path), None
        elif (path / "recipe.toml").is_file():
            raise UsageError(
                f"{path} is a run that has not finished",
                remedy=f"Finish it: moon train {path / 'recipe.toml'} --out {path} --resume",
            )
        else:
            from moon.bundle import Bundle

            bundle = Bundle.open(path)
            facts, gate = bundle_facts(bundle), bundle.gate()
    if as_json:
        print_json(facts)
        return
    console = output()
    _show_head(console, facts, gate)
    show_layers(console, facts["layers"])


def _show_head(console: Console, facts: dict[str, Any], gate: Any) -> None:
    table = pairs()
    table.add_row(facts["kind"].capitalize(), escape(facts["path"]))
    table.add_row("Name", escape(facts["name"]))
    table.add_row("Classes", classes_line(facts))
    if facts["kind"] == "bundle":
        table.add_row("Version", facts["version"])
        sides = "x".join(str(side) for side in facts["input"]["size"])
        channels = facts["channels"]
        kind = facts["input"]["dtype"]
        table.add_row("Input", f"{sides} pixels, {channels} channel{'s'[: channels > 1]}, {kind}")
        table.add_row("Scores", ", ".join(facts["scores"]))
        table.add_row("model.onnx", bytes_line(facts))
        for plans in facts["plans"]:
            table.add_row("Plans", escape(plans_line(plans)))
        add_engines(table, facts)
    else:
        table.add_row("Recipe", f"sha256:{facts['recipe_sha256']}")
        table.add_row("Held out", escape(facts["validation"]["source"]))
        table.add_row("Checkpoint", size(facts["checkpoint_bytes"]))
        accuracy = facts["metrics"].get("accuracy")
        table.add_row("Accuracy", f"{percent(accuracy)} on the held-out images")
    table.add_row(
        "Sparsity", f"{percent(facts['sparsity'])} of {facts['weights']:,} weights are zero"
    )
    if facts["flops"] is not None:
        saved = f"{count(facts['flops'])} of {count(facts['flops_dense'])} dense"
        table.add_row("FLOPs", f"{saved} ({share(facts['flops'], facts['flops_dense'])}), an image")
    if facts["kind"] == "run":
        _add_training(table, facts)
    if facts["kind"] == "bundle":
        table.add_row("Gate", gate_line(gate))
        if gate is not None and gate.per_class is None:
            rate, ci95 = gate.achieved["reject"], rates(gate.achieved["ci95"])
            table.add_row("", f"rejected {percent(rate)} when calibrated, true rate {ci95} (95%)")
    console.print(table)
    console.print()
    if gate is not None and gate.per_class is not None:
        show_classes(console, gate)
        console.print()


def _add_training(table: Table, facts: dict[str, Any]) -> None:
    """What the whole run spent, and what it held."""
    metrics, spent = facts["metrics"], facts["flops_training"]
    images = metrics["epochs"] * metrics["training_images"]
    dense = 3 * facts["flops_dense"] * images
    table.add_row(
        "Training", f"{count(spent)} FLOPs of {count(dense)} dense ({share(spent, dense)})"
    )
    memory = facts["memory"]
    if memory is None:
        return
    table.add_row(
        "Weights", f"{size(memory['sparse_bytes'])} sparse, {size(memory['dense_bytes'])} dense"
    )
    beside = ", ".join(
        f"{size(memory[f'{name}_bytes'])} {what}"
        for name, what in (("gradient", "gradients"), ("slot", "optimizer"), ("mask", "masks"))
    )
    kept = f"{size(memory['saved_bytes'])} an image"
    table.add_row(
        "Memory",
        f"{size(memory['training_bytes'])} at batch {memory['batch_size']}: the dense weights, "
        f"{beside}, and {kept} kept for the backward pass",
    )
