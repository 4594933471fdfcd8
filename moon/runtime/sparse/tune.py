"""Plans by measurement: every convolution's likely plans, timed within the whole network.

A round gives every convolution another plan, builds the network, and runs it some times; so a
layer meets the caches as they will be. What seems best is then timed against the default by turns,
and kept only where it is clearly better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon import __version__
from moon.calibrated import model_hash
from moon.errors import BackendError, UsageError
from moon.progress import Progress, silent
from moon.runtime.sparse.conv_weights import ConvWeights
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.jit import fingerprint
from moon.runtime.sparse.kernels import SOURCES
from moon.runtime.sparse.plan import Plan
from moon.runtime.sparse.sample import sample
from moon.runtime.sparse.search import Search
from moon.runtime.sparse.session import Session
from moon.runtime.sparse.steps import Conv
from moon.runtime.sparse.timing import groups
from moon.runtime.sparse.trial import Stage, by_turns
from moon.runtime.sparse.tuning import Measured, Target, Tuned, Tuning, Verdict

__all__ = ["BUDGET_S", "tune"]

BUDGET_S = 30.0
# Shares of the time until the search and the choice end.
_SEARCH, _CHOICE = 0.65, 0.85
# Runs of a round: so many, or for so long, but three at least.
_RUNS, _RUNS_S = 10, 0.25
_FEWEST = 3
# Something else must be faster by so much, beyond the noise.
_CLEAR = 0.03
_FEWEST_TURNS = 5


@dataclass(frozen=True)
class _Clock:
    """When parts of the work end, and who is told."""

    start: float
    budget: float
    progress: Progress

    def until(self, share: float) -> float:
        return self.start + share * self.budget

    def tell(self, what: str) -> None:
        total = max(1, math.ceil(self.budget))
        done = int(time.perf_counter() - self.start)
        self.progress(min(done, total), total, what)


def tune(
    model: bytes,
    *,
    threads: int = 1,
    batch: int = 1,
    isa: str = "native",
    force: bool = False,
    budget: float = BUDGET_S,
    progress: Progress = silent,
) -> Tuning:
    """Find plans for a model on this CPU.

    Args:
        model: an ONNX file.
        threads: that run together; 0 for as many cores as this process may use.
        batch: images in a run.
        isa: instruction set.
        force: let the engine run all it can, worth it or not.
        budget: seconds in all, about; kernels that were never compiled take some of them.
        progress: told of the seconds that are over.

    Returns:
        A plan for each convolution, and whether ONNX Runtime is faster with the whole model.

    Raises:
        UsageError: the engine does not run the model, so there is nothing to tune; or an
            argument is out of range.
        BackendError, MissingExtraError: as :class:`moon.runtime.sparse.engine.SparseEngine`.
    """
    if not (math.isfinite(budget) and budget > 0):
        raise UsageError(f"a budget of {budget} seconds", remedy="Give it a positive number")
    clock = _Clock(time.perf_counter(), budget, progress)
    engine = SparseEngine(model, threads=threads, isa=isa, force=force)
    try:
        if engine.machine is None:
            raise UsageError(
                f"there is nothing to tune: ONNX Runtime runs {engine.handed_over}",
                remedy="Use --backend onnxruntime",
            )
        stage = Stage(engine, sample(engine, batch))
        searches = _searches(stage, engine)
        _search(stage, searches, clock)
        plans, layers = _choice(stage, searches, clock)
        tuned = _verdict(stage, searches, plans, layers, clock, _whole(model, engine, batch))
        jit = engine.machine.jit
    finally:
        engine.close()
    target = Target(jit.cpu, jit.isa, fingerprint(*SOURCES), model_hash(model))
    return Tuning(target=target, moon=__version__, batches={stage.images: tuned})


def _searches(stage: Stage, engine: SparseEngine) -> dict[str, Search]:
    """Of every convolution, by what it makes."""
    assert engine.machine is not None
    found: dict[str, Search] = {}
    for program in stage.programs:
        for group in groups(program):
            if isinstance(group.step, Conv):
                convolution, geometry = program.convolutions[group.target]
                weights = ConvWeights(group.step.weight, group.step.groups).summary(geometry)
                costs = engine.machine.costs
                found[group.target] = Search(geometry, weights, costs, convolution.plan)
    for one in found.values():
        one.siblings = [other for other in found.values() if other.kin == one.kin and other != one]
    return found


def _search(stage: Stage, searches: Mapping[str, Search], clock: _Clock) -> None:
    """Rounds, until the time is over or no plan is left that could be better."""
    plans = {name: one.default for name, one in searches.items()}
    while True:
        stage.prepared(plans)()
        for name, seconds in _least(stage).items():
            if name in searches:
                searches[name].note(plans[name], seconds)
        wanted = [(n, plan) for n, one in searches.items() for plan in one.finalists]
        stage.kept.only(wanted)
        clock.tell("trying plans")
        if time.perf_counter() >= clock.until(_SEARCH):
            return
        chosen: dict[str, Plan] = {}
        for name, one in searches.items():
            taken = [
                chosen[n] for n, other in searches.items() if n in chosen and other.kin == one.kin
            ]
            if (plan := one.next(taken)) is not None:
                chosen[name] = plan
        if not chosen:
            return
        plans = {name: chosen.get(name, one.best) for name, one in searches.items()}


def _least(stage: Stage) -> dict[str, float]:
    """The least seconds of each layer over a round's runs."""
    stage.run()
    end = time.perf_counter() + _RUNS_S
    runs: list[dict[str, float]] = []
    while len(runs) < _RUNS and (len(runs) < _FEWEST or time.perf_counter() < end):
        runs.append(stage.run())
    return {name: min(run[name] for run in runs) for name in runs[0]}


def _choice(
    stage: Stage, searches: Mapping[str, Search], clock: _Clock
) -> tuple[dict[str, Plan], dict[str, tuple[float, float]]]:
    """The plans to keep; of each layer microseconds with its default and with what is kept."""
    sets = [{name: one.finalists[i] for name, one in searches.items()} for i in range(3)]
    uses = [stage.prepared(plans) for plans in sets]
    clock.tell("comparing")
    found = by_turns([_side(use, stage.run) for use in uses], clock.until(_CHOICE), _FEWEST_TURNS)
    kept, layers = {}, {}
    for name in searches:
        times = [side[name] for side in found]
        best = 1 + int(np.argmin([np.median(times[1]), np.median(times[2])]))
        which = best if clearly(times[best], times[0]) else 0
        kept[name] = sets[which][name]
        layers[name] = (float(np.median(times[0])) * 1e6, float(np.median(times[which])) * 1e6)
    return kept, layers


def clearly(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether times are less than others by 3%, and by twice the error of that; [turns] each."""
    middle, error = _ratio(one, other)
    return middle + 2 * error < 1 - _CLEAR


def _ratio(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """The median of times as shares of others taken in the same turns, and its error."""
    ratios = one / other
    middle = float(np.median(ratios))
    spread = 1.4826 * float(np.median(np.abs(ratios - middle)))
    return middle, spread / math.sqrt(len(ratios))


def _whole(model: bytes, engine: SparseEngine, batch: int) -> Callable[[], dict[str, float]] | None:
    """A run of the whole model by ONNX Runtime; None where it refuses."""
    try:
        session = Session(model, threads=engine.threads, spin=True)
    except BackendError:
        return None
    feeds = sample(engine, batch)

    def run() -> dict[str, float]:
        start = time.perf_counter()
        session.run(feeds)
        return {"all": time.perf_counter() - start}

    return run


def _verdict(
    stage: Stage,
    searches: Mapping[str, Search],
    plans: dict[str, Plan],
    layers: dict[str, tuple[float, float]],
    clock: _Clock,
    whole: Callable[[], dict[str, float]] | None,
) -> Tuned:
    """Whether all plans together are better than the defaults, and ONNX Runtime than both."""
    default = {name: one.default for name, one in searches.items()}
    times = _whole_runs(stage, [default, plans], clock, whole)
    ratio, error = _ratio(times[1], times[0])
    if plans == default or ratio - 2 * error > 1:
        # Layers that are faster each can be slower together: what they do to each other's caches.
        plans, times[1], ratio = default, times[0], 1.0
        layers = {name: (before, before) for name, (before, _) in layers.items()}
    verdict: Verdict = "sparse"
    if whole is not None and clearly(times[2], times[1]):
        verdict = "onnxruntime"
    milliseconds = [float(np.median(one)) * 1e3 for one in times]
    return Tuned(
        threads=stage.engine.threads,
        plans={name: plan.to_json() for name, plan in plans.items()},
        verdict=verdict,
        measured=Measured(
            default_ms=milliseconds[0],
            tuned_ms=milliseconds[0] * ratio,
            onnxruntime_ms=milliseconds[2] if whole is not None else None,
            layers=layers,
        ),
    )


def _whole_runs(
    stage: Stage,
    sets: Sequence[Mapping[str, Plan]],
    clock: _Clock,
    whole: Callable[[], dict[str, float]] | None,
) -> list[NDArray[np.float64]]:
    """Seconds of whole runs by turns: with sets of plans, and by ONNX Runtime; [turns] each."""

    def run() -> dict[str, float]:
        return {"all": stage.seconds()}

    clock.tell("comparing whole runs")
    sides = [_side(stage.prepared(plans), run) for plans in sets]
    if whole is not None:
        sides.append(lambda: whole)
    found = by_turns(sides, clock.until(1.0), _FEWEST_TURNS)
    clock.tell("comparing whole runs")
    return [side["all"] for side in found]


def _side(
    use: Callable[[], None], run: Callable[[], dict[str, float]]
) -> Callable[[], Callable[[], dict[str, float]]]:
    def ready() -> Callable[[], dict[str, float]]:
        use()
        return run

    return ready
