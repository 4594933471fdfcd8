"""``moon demo``: the whole way on images that come with scikit-learn, in a few minutes."""

from __future__ import annotations

__all__ = ["demo"]

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moon.cli.console import error_console, output, print_json, working
from moon.cli.demo_folder import DemoFolder
from moon.cli.facts import bundle_facts, bytes_line
from moon.cli.options import AsJson, Debug
from moon.cli.predict import decide, show_predictions
from moon.cli.text import gate_line, milliseconds, pairs, percent
from moon.cli.train import training_view
from moon.errors import MissingExtraError

RECIPE = "digits-cnn-rigl90-moon"
KNOWN = "sklearn:digits#test{label in 0..7}"
NEAR = {"digits-8-9": "sklearn:digits#test{label in 8..9}"}
FAR = {"photos": "sklearn:photos"}
REJECT = 0.05
QUERIES = 2048
_SAMPLES = {
    "three.png": "sklearn:digits#test{label==3}",
    "seven.png": "sklearn:digits#test{label==7}",
    "eight.png": "sklearn:digits#test{label==8}",
    "nine.png": "sklearn:digits#test{label==9}",
    "photo.png": "sklearn:photos",
}


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything is written.")
    ] = Path("demo"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Go the whole way on scanned digits: train, export, calibrate, evaluate, bench, predict.

    The digits 0 to 7 are the known classes; 8 and 9 (near) and crops of photographs (far)
    play the unknown. Needs no download, and takes under three minutes on two cores. A
    demo's own earlier files in DIR are replaced; other files there stop it.
    """
    began = time.monotonic()
    _require_packages()
    # The network is too small to gain from threads, and they wait for each other on a busy box.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    steps = _Steps(error_console(), DemoFolder(out))
    _train(steps)
    bundle = _export(steps)
    report = _evaluate(steps, bundle)
    timing = _bench(steps, bundle)
    predictions = _predict(steps, bundle)
    facts = bundle_facts(bundle)
    document = {
        "bundle": str(bundle.path),
        "run": str(out / "run"),
        "report": str(out / "report" / "report.html"),
        "model": {k: v for k, v in facts.items() if k not in ("layers", "provenance")},
        "evaluation": {k: v for k, v in report.items() if k != "plots"},
        "bench": timing,
        "predictions": predictions,
        "seconds": {**steps.seconds, "total": round(time.monotonic() - began, 1)},
    }
    steps.folder.finish(document)
    if as_json:
        print_json(document)
    else:
        show_predictions(output(), predictions)
        _show(output(), document, bundle.gate())


def _require_packages() -> None:
    for package in ("torch", "safetensors", "sklearn", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "train", "moon demo")


@dataclass
class _Steps:
    """Announces each step, with the command that does the same, and times it."""

    console: Console
    folder: DemoFolder
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, part: str, command: str) -> Iterator[Path]:
        number = len(self.seconds) + 1
        self.console.print(f"[bold]{number}/5 {name}[/]  [dim]{escape(command)}[/]", soft_wrap=True)
        began = time.monotonic()
        with self.folder.part(part) as path:
            yield path
        self.seconds[part.partition(".")[0]] = round(time.monotonic() - began, 1)


def _train(steps: _Steps) -> None:
    command = f"moon train {RECIPE} --out {steps.folder.path / 'run'}"
    with steps.step("Train", "run", command) as run:
        from moon.trainer.recipes import find_recipe

        recipe = find_recipe(RECIPE)
        with training_view(recipe.epochs, every=10) as view:
            view.say("loading")
            from moon.trainer.fit import fit

            fit(recipe, run, device="cpu", report=view.report, progress=view.progress)


def _export(steps: _Steps) -> Any:
    run = steps.folder.path / "run"
    command = f"moon export {run} --out {steps.folder.path / 'digits.moon'} --reject {REJECT}"
    with (
        steps.step("Export and calibrate", "digits.moon", command) as path,
        working("") as progress,
    ):
        from moon.export.to_bundle import to_bundle

        return to_bundle(run, path, name="digits", reject=REJECT, progress=progress)


def _evaluate(steps: _Steps, bundle: Any) -> dict[str, Any]:
    sets = [f"--near '{k}={v}'" for k, v in NEAR.items()]
    sets += [f"--far {k}={v}" for k, v in FAR.items()]
    where = steps.folder.path / "report"
    command = f"moon eval {bundle.path} --id '{KNOWN}' {' '.join(sets)} --out {where}"
    with steps.step("Evaluate", "report", command) as folder, working("") as progress:
        from moon.evaluation.evaluate import evaluate

        report = evaluate(bundle, id=KNOWN, near=NEAR, far=FAR, out=folder, progress=progress)
        return report.to_json()


def _bench(steps: _Steps, bundle: Any) -> dict[str, Any]:
    command = f"moon bench {bundle.path} --out {steps.folder.path / 'bench.json'}"
    with steps.step("Bench", "bench.json", command) as path, working("") as progress:
        from moon.files import write_json
        from moon.runtime.bench import bench

        result = bench(bundle, queries=QUERIES, progress=progress)
        write_json(path, result)
        return result


def _predict(steps: _Steps, bundle: Any) -> list[dict[str, Any]]:
    where = steps.folder.path / "images"
    command = f"moon predict {bundle.path} {where}/*.png"
    with steps.step("Predict", "images", command) as folder:
        from moon.runtime.predictor import Predictor

        files = _save_samples(folder)
        return decide(Predictor.open(bundle), [str(file) for file in files])


def _save_samples(folder: Path) -> list[Path]:
    from PIL import Image

    from moon.data.source import open_source

    folder.mkdir(parents=True)
    files = []
    for name, spec in _SAMPLES.items():
        item: Any = open_source(spec).item(0)
        image = item if isinstance(item, Image.Image) else Image.fromarray(item)
        image.save(folder / name)
        files.append(folder / name)
    return files


def _show(console: Console, document: dict[str, Any], gate: Any) -> None:
    known, scores = document["evaluation"]["id"], document["evaluation"]["scores"]
    gated, timing = document["evaluation"]["gate"], document["bench"]
    console.print("\n[bold]Digits 0 to 7 known; 8 and 9 (near) and photographs (far) unknown[/]\n")
    table = pairs()
    table.add_row("Accuracy", f"{percent(known['accuracy'])} of {known['n']:,} test images")
    table.add_row("Calibration error", f"ECE {percent(known['ece'])}")
    table.add_row("Sparsity", f"{percent(document['model']['sparsity'])} of the weights are zero")
    table.add_row("model.onnx", bytes_line(document["model"]))
    for name, figures in scores.items():
        line = f"near {percent(figures['near']['auroc'])}, far {percent(figures['far']['auroc'])}"
        table.add_row(f"AUROC, {name}", line + (" (the gate's)" if name == gate.score else ""))
    table.add_row("Gate", gate_line(gate))
    rejected = f"{percent(1 - gated['id']['accept'])} of known"
    near, far = percent(gated["near"]["reject"]), percent(gated["far"]["reject"])
    table.add_row("Rejected", f"{rejected}, {near} of near and {far} of far unknown images")
    table.add_row("Latency", _latency(timing))
    table.add_row("Time", f"{document['seconds']['total']:.0f} s in all")
    console.print(table)
    console.print(f"\nBundle  {document['bundle']}", soft_wrap=True, markup=False)
    console.print(f"Report  {document['report']}", soft_wrap=True, markup=False)
    console.print(f"Next    moon serve {document['bundle']}", soft_wrap=True, markup=False)


def _latency(timing: dict[str, Any]) -> str:
    latency, speedup = timing["latency_ms"], timing["speedup"]
    line = f"p50 {milliseconds(latency['p50'])}, p90 {milliseconds(latency['p90'])}"
    low, high = speedup["ci95"]
    line += f"; {speedup['ratio']:.2f} times as fast as dense ({low:.2f} to {high:.2f})"
    return line if timing["valid"] else f"{line} (not valid: {timing['warnings'][0]})"
