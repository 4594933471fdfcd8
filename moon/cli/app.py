"""The table of commands: each is a function in the file of its name."""

from __future__ import annotations

__all__ = ["app"]

from collections.abc import Callable
from typing import Annotated, Any

import typer

from moon import __version__
from moon.cli.bench import bench
from moon.cli.calibrate import calibrate
from moon.cli.demo import demo
from moon.cli.doctor import doctor
from moon.cli.drift import drift
from moon.cli.eval import evaluate
from moon.cli.export import export
from moon.cli.inspect import inspect
from moon.cli.monitor import monitor
from moon.cli.options import Command, Commands
from moon.cli.package import package
from moon.cli.predict import predict
from moon.cli.recipes import recipes
from moon.cli.score import score
from moon.cli.serve import serve
from moon.cli.sign import sign
from moon.cli.train import train
from moon.cli.verify import verify

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moon {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def moon(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On failure show the traceback.")] = False,
) -> None:
    """Sparse image classifiers that know what they do not know.

    Train one, export it to a small ONNX bundle, give it a threshold with a guarantee, then
    predict, measure or serve. First steps: moon demo. Every command has --help and --json.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def _add(name: str, command: Callable[..., Any], short: str, example: str) -> None:
    app.command(name, cls=Command, short_help=short, epilog=f"Example: {example}")(command)


_add("demo", demo, "The whole way on shipped data, in under three minutes.", "moon demo --out demo")
_add(
    "train",
    train,
    "Train a sparse classifier from a recipe.",
    "moon train cifar10-resnet18-rigl95-moon --set epochs=30 --out runs/c10",
)
_add(
    "export",
    export,
    "Make a bundle of a run, or of an ONNX model.",
    "moon export runs/c10 --out c10.moon --values fp16",
)
_add(
    "calibrate",
    calibrate,
    "Give a bundle a threshold with a guarantee.",
    "moon calibrate c10.moon --data held-out/ --score ebo --reject 0.05",
)
_add(
    "predict",
    predict,
    "Decide images: a label, or abstain.",
    "moon predict c10.moon cat.jpg dog.png --json",
)
_add(
    "eval",
    evaluate,
    "Measure accuracy, calibration and OOD detection.",
    "moon eval c10.moon --id test/ --near c100=cifar100.npz#test --far svhn=svhn/ --out report",
)
_add(
    "bench",
    bench,
    "Measure latency against a baseline.",
    "moon bench c10.moon --threads 1 --out bench.json",
)
_add("serve", serve, "Answer predictions over HTTP.", "moon serve c10.moon --port 3000")
_add(
    "package",
    package,
    "Write what runs the service elsewhere: container, Kubernetes, bento.",
    "moon package c10.moon --out c10-service --image registry.example/c10:1",
)
_add(
    "score",
    score,
    "Decide a whole set of images into a Parquet file.",
    "moon score c10.moon 'images.npz#test' --out scores.parquet",
)
_add(
    "drift",
    drift,
    "Test decided images for drift.",
    "moon drift c10.moon monday.parquet tuesday.parquet",
)
_add(
    "monitor",
    monitor,
    "Write a dashboard and alert rules for moon serve.",
    "moon monitor --out monitoring",
)
_add(
    "sign",
    sign,
    "Sign a bundle with a key file.",
    "moon sign c10.moon --key private.pem",
)
_add("verify", verify, "Check a bundle's files and answers.", "moon verify c10.moon")
_add(
    "inspect",
    inspect,
    "Show a bundle or run: layers, density, bytes, FLOPs.",
    "moon inspect c10.moon",
)
_add("recipes", recipes, "List the built-in recipes.", "moon recipes cifar10 moon")
_add("doctor", doctor, "What is installed, and what can run here.", "moon doctor --json")
