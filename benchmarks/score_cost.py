"""What each score in the graph costs, as a share of the model's latency and in bytes.

    python benchmarks/score_cost.py [--scores knn,vim] [--rounds 60] [--json FILE]

The model is ResNet-18 for images of 32x32 (10 classes and the unknown one), 95% sparse by ERK,
its weights random and its batch statistics those of smooth random images, which the scores are
fitted to as well, by the exporter's own settings. It is packed as an export packs it and run by
ONNX Runtime with one thread on one image.

A score takes microseconds and the model milliseconds, less than the noise of the whole. So two
kinds are measured: whole models, with no head, with the scores that every graph carries, with these
and label and decision (the default head), and with one more score each; and heads
alone, fed with logits and features. In service a head finds the caches full of the model, so each
of its runs comes after one of the model; over and over, it is several times faster (`hot_us`). All
take turns in one run, in blocks, every second round in reverse; a block's figure is its median.
`share` is what a score adds to the default head, over the time of the model without a head in the
same round, `whole` the ratio of whole models; both are medians over the rounds, with the central
95% of 2,000 bootstrap resamples of them. Times are CPU time of the one thread, so that other
processes that take turns with it do not count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from head_alone import head_alone, passing
from numpy.typing import NDArray
from onnx import ModelProto
from plausible import Model, plausible
from spread import Grid, environment

from moon.data.items import Source
from moon.errors import MoonError, UsageError
from moon.export.fit_images import FitImages
from moon.export.fitting import Fitting, fit_scores
from moon.export.graph import array, copied, initializers, prune
from moon.export.head import carried_scores
from moon.export.pack import pack
from moon.export.session import Session
from moon.files import write_json
from moon.scores import SCORE_TABLE, FittedScore

NONE, FOUR, DEFAULT = "no head", "default scores", "default head"
WHOLE, AFTER, HOT = "whole model, ", "after the model, ", "over and over, "
SMALL = 1_000_000  # bytes of constants
_COOLED = "temperature"
RUNS, HOT_RUNS = 3, 50
Arrays = dict[str, NDArray[Any]]
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Block:
    """So many timed runs, each after an untimed one of ``before``."""

    call: Callable[[], None]
    runs: int
    before: Callable[[], None] | None = None

    def run(self) -> float:
        """Median CPU time of a run, in microseconds."""
        times = np.empty(self.runs)
        for i in range(self.runs):
            if self.before is not None:
                self.before()
            start = time.thread_time_ns()
            self.call()
            times[i] = time.thread_time_ns() - start
        return float(np.median(times)) / 1e3


def main(words: Sequence[str] | None = None) -> int:
    args = _arguments(words)
    torch.set_num_threads(1)
    try:
        result = run(args)
        if args.json:
            write_json(args.json, result)
    except MoonError as error:
        print(f"score_cost: {error}", file=sys.stderr)
        return error.exit_code
    _show(result)
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scores", metavar="A,B", help="default: all that are fitted")
    parser.add_argument("--model", default="resnet18", help="as recipes name it")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--images", type=int, default=1500, help="to fit the scores to")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build, fit, measure; figures in microseconds, milliseconds and bytes."""
    if args.rounds < 2 or args.images < 600:
        raise UsageError("--rounds must be 2 or more, and --images 600 or more")
    names = [name for name in SCORE_TABLE if name not in carried_scores(0)]
    asked = args.scores.split(",") if args.scores else names
    strange = [name for name in asked if name not in names]
    if strange:
        raise UsageError(f"{strange[0]} is not a fitted score", remedy=", ".join(names))
    model = plausible(args.model, args.size, args.sparsity, args.images, args.seed)
    fitted, left_out = fit(model, asked, every=args.scores is None)
    sizes = {score.name: constants_bytes(model, score) for score in fitted}
    us = _in_turn(_blocks(model, fitted), args.rounds)
    bare = us[WHOLE + NONE]

    def figures(name: str, beside: str) -> Figures:
        added = us[AFTER + name] - us[AFTER + beside]
        return {
            "us": _spread(added),
            "hot_us": _spread(us[HOT + name] - us[HOT + beside]),
            "share": _spread(added / bare),
            "whole": _spread(us[WHOLE + name] / us[WHOLE + beside]),
        }

    return {
        "environment": {**environment(), "onnxruntime": onnxruntime.__version__},
        "model": {
            "name": args.model, "size": args.size, "sparsity": args.sparsity,
            "seed": args.seed, "outputs": model.outputs, "images": args.images,
        },
        "rounds": args.rounds,
        "runs_in_a_block": {"model": RUNS, "head": RUNS, "hot head": HOT_RUNS},
        "model_ms": _spread(bare / 1e3),
        "call_us": _spread(us[AFTER + NONE]),
        "default_scores": figures(FOUR, NONE),
        "default_head": figures(DEFAULT, NONE),
        "scores": {
            score.name: {
                "reads": list(score.reads),
                "bytes": sizes[score.name],
                "target": _target(score, sizes[score.name]),
                **figures(score.name, DEFAULT),
            }
            for score in fitted
        },
        "left_out": dict(left_out),
    }  # fmt: skip


def fit(
    model: Model, names: Sequence[str], *, every: bool
) -> tuple[tuple[FittedScore, ...], Mapping[str, str]]:
    """The scores as an export fits them, and why any was left out."""
    source = Source(spec="smooth random images", items=list(model.images), labels=model.labels)

    def fitted(images: FitImages, carry: Sequence[str]) -> Fitting:
        return fit_scores(
            model.body,
            images,
            score="ebo",
            carry=carry,
            settings={},
            classes=[str(i) for i in range(model.outputs - 1)],
            preprocess=model.preprocess,
            unknown_index=model.unknown_index,
        )

    # A temperature takes images that no other score is fitted to, and there are no others here.
    others = ("all",) if every else tuple(name for name in names if name != _COOLED)
    found = fitted(FitImages(training=source, held_out=None), others)
    left_out = {name: why for name, why in found.left_out.items() if name != _COOLED}
    if not every and _COOLED not in names:
        return found.scores, left_out
    cooled = fitted(FitImages(training=None, held_out=source), [_COOLED])
    return (*cooled.scores, *found.scores), left_out


def constants_bytes(model: Model, score: FittedScore) -> int:
    """Of what the graph holds for this score alone."""
    own = f"head/{score.name}/"
    held = initializers(model.with_head([score]))
    return sum(array(tensor).nbytes for name, tensor in held.items() if name.startswith(own))


def _blocks(model: Model, fitted: Sequence[FittedScore]) -> dict[str, Block]:
    """Whole models; heads alone, each run after one of the model; and heads over and over."""
    default = model.with_head()
    graphs = {
        FOUR: scores_of(default),
        DEFAULT: default,
        **{s.name: model.with_head([s]) for s in fitted},
    }
    image = {"input": model.preprocess.normalise(model.images[:1])}
    wholes = {
        name: _caller(pack(graph, weights="compact", values="fp32"), image)
        for name, graph in {NONE: model.body, **graphs}.items()
    }
    seen = Session(model.with_head(features=True)).run(image)
    feeds = {"logits": seen["logits"], model.features: seen["features"]}
    heads = {NONE: _caller(passing(feeds), feeds)}
    heads |= {name: _caller(head_alone(graph, feeds), feeds) for name, graph in graphs.items()}
    before = wholes[NONE]
    return {
        **{WHOLE + name: Block(call=call, runs=RUNS) for name, call in wholes.items()},
        **{AFTER + n: Block(call=call, runs=RUNS, before=before) for n, call in heads.items()},
        **{HOT + name: Block(call=call, runs=HOT_RUNS) for name, call in heads.items()},
    }


def scores_of(model: ModelProto) -> ModelProto:
    """The graph without label and decision."""
    alone = copied(model)
    kept = [value for value in alone.graph.output if value.name.startswith(("logits", "score_"))]
    names = {value.name for value in kept}
    for i in reversed(range(len(alone.graph.output))):
        if alone.graph.output[i].name not in names:
            del alone.graph.output[i]
    for i in reversed(range(len(alone.graph.input))):
        if alone.graph.input[i].name == "threshold":
            del alone.graph.input[i]
    prune(alone)
    return alone


def _caller(graph: ModelProto, feeds: Arrays) -> Callable[[], None]:
    session = Session(graph)

    def call() -> None:
        session.run(feeds)

    call()
    return call


def _in_turn(blocks: Mapping[str, Block], rounds: int) -> dict[str, NDArray[np.float64]]:
    """By name the median CPU time of a run in each round, in microseconds."""
    times = {name: np.empty(rounds) for name in blocks}
    for i in range(-1, rounds):  # the first round warms up
        for name in list(blocks)[:: -1 if i % 2 else 1]:
            found = blocks[name].run()
            if i >= 0:
                times[name][i] = found
    return times


def _spread(values: NDArray[np.float64]) -> dict[str, Any]:
    picks = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return {"median": float(np.median(values)), "ci95": [float(low), float(high)]}


def _target(score: FittedScore, size: int) -> float | None:
    """The largest share of the model's time meant for it."""
    if score.reads == ("logits",):
        return 0.01
    return 0.05 if size <= SMALL else None


def _show(result: Mapping[str, Any]) -> None:
    four, default = result["default_scores"], result["default_head"]
    rows = [
        (FOUR, "logits", "", *_cells(four), "1.0%", _met(four, 0.01)),
        (DEFAULT, "logits", "", *_cells(default), "-", "-"),
    ]
    for name, one in result["scores"].items():
        target = "-" if one["target"] is None else f"{one['target']:.1%}"
        rows.append(
            (name, "+".join(one["reads"]), f"{one['bytes']:,}", *_cells(one), target,
             _met(one, one["target"]))
        )  # fmt: skip
    model, call = result["model_ms"], result["call_us"]
    facts = result["model"]
    Grid(
        title=f"{facts['name']}, {facts['size']} pixels, {facts['sparsity']:.0%} sparse,"
        f" {model['median']:.2f} ms an image without a head",
        columns=("score", "reads", "bytes", "adds µs", "hot", "share of the model, 95%",
                 "whole, 95%", "target", "met"),
        rows=rows,
        texts=2,
        notes=[
            f"{result['rounds']} rounds; heads less an empty call of {call['median']:.1f} µs; a "
            "score adds to the default head; whole: ratio of whole models, with it to without",
            *(f"left out: {name}: {why}" for name, why in result["left_out"].items()),
            ", ".join(f"{name} {value}" for name, value in result["environment"].items()),
        ],
    ).show()  # fmt: skip


def _cells(one: Mapping[str, Any]) -> tuple[str, str, str, str]:
    share, whole = one["share"], one["whole"]
    low, high = share["ci95"]
    return (
        f"{one['us']['median']:.1f}",
        f"{one['hot_us']['median']:.1f}",
        f"{share['median']:.2%} ({low:.2%} to {high:.2%})",
        f"{whole['median']:.3f} ({whole['ci95'][0]:.3f} to {whole['ci95'][1]:.3f})",
    )


def _met(one: Mapping[str, Any], target: float | None) -> str:
    if target is None:
        return "-"
    return "yes" if one["share"]["ci95"][1] < target else "NO"


if __name__ == "__main__":
    sys.exit(main())
