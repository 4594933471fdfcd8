"""Runs of several processes, for test_ranks.py and test_distributed.py: a process of its own.

``python -m tests.trainer.ranked FOLDER SCENARIO`` prints one line of JSON. Each rank is a fork,
because that spares it the imports, with the environment that torchrun would give it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Some of these are here for the forks alone.
import safetensors.torch  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
from torch import Tensor, nn

import moon.trainer.group  # noqa: F401
import moon.trainer.session as session_module
from moon.errors import MoonError
from moon.trainer.checkpoint import Checkpoint
from moon.trainer.fit import fit
from moon.trainer.ranks import joined
from moon.trainer.session import Session
from tests.trainer.killable import facts, outcome
from tests.trainer.recipes_small import tiny_recipe

Outcome = dict[str, Any]


def together(
    folder: Path, action: Callable[[int], Outcome | None], world: int = 2
) -> list[Outcome]:
    """Run ``action`` as every rank.

    Returns:
        What each rank's action returned, with its exit ``status`` (minus a signal's number)
        and, after a MoonError, ``error``, its kind, and whether it is ``told`` elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    processes = [_forked(folder, rank, world, port, action) for rank in range(world)]
    statuses = [outcome(process) for process in processes]
    found = []
    for rank, status in enumerate(statuses):
        path = folder / f"{rank}.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)
        found.append({"status": status, **result})
    return found


def _forked(
    folder: Path, rank: int, world: int, port: int, action: Callable[[int], Outcome | None]
) -> int:
    process = os.fork()
    if process:
        return process
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    status = 1
    try:
        result = action(rank) or {}
        status = 0
    except MoonError as error:
        result = {"error": str(error), "kind": type(error).__name__, "told": error.told}
    except BaseException as error:
        result = {"error": repr(error), "kind": "unexpected"}
        status = 2
    (folder / f"{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weights(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    for name in sorted(checkpoint.state):
        digest.update(checkpoint.state[name].numpy().tobytes())
    for name in sorted(checkpoint.masks):
        digest.update(checkpoint.masks[name].numpy().tobytes())
    return digest.hexdigest()


def trained(run: Path | None, *settings: str, **options: Any) -> Callable[[int], Outcome]:
    def act(rank: int) -> Outcome:
        reported: list[int] = []
        checkpoint = fit(
            tiny_recipe(*settings),
            run,
            device="cpu",
            report=lambda record: reported.append(record.epoch),
            **options,
        )
        return {
            "weights": weights(checkpoint),
            "reported": reported,
            "left": torch.distributed.is_initialized(),
            "metrics": {k: v for k, v in checkpoint.metrics.items() if k != "seconds"},
        }

    return act


def smoke(folder: Path) -> Outcome:
    run = folder / "run"

    def act(rank: int) -> Outcome:
        first = trained(run)(rank)
        try:
            fit(tiny_recipe(), run, device="cpu")
        except MoonError as error:
            found = {**first, "again": str(error), "told": error.told}
        finished = fit(tiny_recipe(), run, device="cpu", resume=True)
        return {**found, "finished": weights(finished)}

    return {"ranks": together(folder, act), "file": weights(Checkpoint.load(run))}


class Plain(nn.Sequential):
    """A network without batch norm, whose gradients are means over images and nothing else."""

    def __init__(self, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, outputs),
        )


def _plain(name: str, *, outputs: int, seed: int, **_: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Plain(outputs)


# Slices of 17 and 18 images, and of 2 and 3 at the end of an epoch; w is e itself at first.
UNEVEN = (
    "batch_size=35",
    "epochs=5",
    "moon.vote_epochs=2",
    "moon.init_factor=1",
    "update.stop=0.6",
    "update.interval=3",
)


def equal(folder: Path) -> Outcome:
    """One process beside two: the largest differences of everything that came out."""
    session_module.build = _plain  # type: ignore[assignment]
    found = {}
    for rule in ("rigl", "set"):
        recipe = tiny_recipe(*UNEVEN, f"rule={rule}")
        fit(recipe, folder / f"{rule}-1", device="cpu")
        together(folder, trained(folder / f"{rule}-2", *UNEVEN, f"rule={rule}"))
        one, two = Checkpoint.load(folder / f"{rule}-1"), Checkpoint.load(folder / f"{rule}-2")
        found[rule] = {
            "masks": all(torch.equal(mask, two.masks[name]) for name, mask in one.masks.items()),
            "turnover": one.metrics["turnover"],
            "weights": max(_apart(value, two.state[name]) for name, value in one.state.items()),
            "history": _history_apart(folder / f"{rule}-1", folder / f"{rule}-2"),
            "accuracy": one.metrics["accuracy"] - two.metrics["accuracy"],
        }
    return found


def _apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def _history_apart(one: Path, two: Path) -> dict[str, float]:
    pairs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    keys = ("loss", "w", "p_unknown", "accuracy", "train_accuracy", "lr", "turnover")
    return {key: max(abs(a[key] - b[key]) for a, b in zip(*pairs, strict=True)) for key in keys}


def streamed(folder: Path) -> Outcome:
    """A set that is streamed beside one in memory; which of its items each rank decodes."""
    from moon.trainer.pixels import _Decoding

    settings = ("epochs=2", "moon.vote_epochs=0", "moon.warmup_epochs=1", "data.augment=crop")
    memory = together(folder, trained(None, *settings))

    def act(rank: int) -> Outcome:
        decoded: list[int] = []
        inner = _Decoding.__getitem__

        def spy(self: _Decoding, i: int) -> Any:
            decoded.append(i)
            return inner(self, i)

        _Decoding.__getitem__ = spy  # type: ignore[method-assign]
        found = trained(None, *settings, budget=10, workers=0)(rank)
        return {**found, "decoded": len(decoded)}

    return {"memory": memory, "streamed": together(folder, act)}


def tampered(folder: Path) -> Outcome:
    def act(rank: int) -> Outcome:
        inner = Session._train

        def spoiled(self: Session, epoch: int, *args: Any) -> Any:
            result = inner(self, epoch, *args)
            if rank == 1 and epoch == 2:
                mask = self.sparsifier.masks["stages.1.0.weight"]
                on, off = tuple(mask.nonzero()[0]), tuple((~mask).nonzero()[0])
                mask[on], mask[off] = False, True
            return result

        Session._train = spoiled  # type: ignore[method-assign]
        return trained(folder / "run")(rank)

    ranks = together(folder, act)
    state = torch.load(folder / "run" / "last" / "state.pt", weights_only=True)
    return {"ranks": ranks, "kept": state["epoch"]}


def mistakes(folder: Path) -> Outcome:
    """Errors of one rank alone: in the loss, in reading an image, in what is the same."""

    def infinite(rank: int) -> Outcome:
        inner = Session._check_finite

        def checked(self: Session, epoch: int) -> None:
            if rank == 1 and epoch == 3:
                self.tally._bad_step.fill_(2)
                self.tally._bad_loss.fill_(float("inf"))
            inner(self, epoch)

        Session._check_finite = checked  # type: ignore[method-assign]
        return trained(folder / "infinite")(rank)

    def unreadable(rank: int) -> Outcome:
        from moon.errors import ImageError
        from moon.trainer.pixels import _Decoding

        inner, count = _Decoding.__getitem__, [0]

        def failing(self: _Decoding, i: int) -> Any:
            count[0] += 1
            if rank == 1 and count[0] == 150:
                raise ImageError("seven.png is truncated", remedy="Replace it")
            return inner(self, i)

        _Decoding.__getitem__ = failing  # type: ignore[method-assign]
        return trained(folder / "unreadable", budget=10, workers=0)(rank)

    def another(rank: int) -> Outcome:
        return trained(folder / "another", f"lr=0.0{rank + 4}")(rank)

    def nowhere(rank: int) -> Outcome:
        return trained(folder / "nowhere", "data.train=/nowhere")(rank)

    def small(rank: int) -> Outcome:
        return trained(folder / "small", "batch_size=3")(rank)

    def unwritable(rank: int) -> Outcome:
        (folder / "file").write_text("")
        return trained(folder / "file" / "run")(rank)

    actions = (infinite, unreadable, another, nowhere, small, unwritable)
    return {each.__name__: together(folder, each) for each in actions}


def alone(folder: Path) -> Outcome:
    """A run that two processes began is gone on with by one, and the other way round."""
    run, single = folder / "two", folder / "one"

    def half(rank: int) -> Outcome:
        _before_step(20)
        return trained(run)(rank)

    found = together(folder, half)
    try:
        fit(tiny_recipe(), run, device="cpu", resume=True)
        by_one = ""
    except MoonError as error:
        by_one = str(error)
    process = os.fork()
    if not process:
        _before_step(20)
        fit(tiny_recipe(), single, device="cpu")
    outcome(process)
    return {
        "statuses": [rank["status"] for rank in found],
        "by_one": by_one,
        "by_two": together(folder, trained(single, resume=True)),
    }


def _before_step(number: int) -> None:
    from moon.trainer.step import Step

    inner, count = Step.__call__, [0]

    def counted(self: Step, *args: Any, **options: Any) -> None:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, *args, **options)

    Step.__call__ = counted  # type: ignore[method-assign]


def killed(folder: Path) -> Outcome:
    """One rank dies, at a step or in saving; then all go on: what differs from a whole run."""
    together(folder, trained(folder / "whole"))
    expected = facts(folder / "whole")
    found = {}
    for victim, step in ((0, 3), (0, 21), (1, 9), (1, 33)):
        run = folder / f"{victim}-{step}"

        def dying(rank: int, run: Path = run, victim: int = victim, step: int = step) -> Outcome:
            if rank == victim:
                _before_step(step)
            return trained(run)(rank)

        start = time.monotonic()
        first = together(folder, dying)
        again = together(folder, trained(run, resume=True))
        now = facts(run)
        found[f"{victim} {step}"] = {
            "seconds": time.monotonic() - start,
            "first": first,
            "again": [rank["status"] for rank in again],
            "wrong": [key for key in expected if now.get(key) != expected[key]],
        }
    return found


def adopted(folder: Path) -> Outcome:
    """A process group of the caller's own is used, and left as it was."""

    def act(rank: int) -> Outcome:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        found = trained(folder / "run")(rank)
        with joined("cpu") as ranks:
            found["world"] = ranks.world
        total = torch.ones(1)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return {**found, "total": float(total)}

    return {"ranks": together(folder, act)}


def silent(folder: Path) -> Outcome:
    """A rank that hangs is given up after the timeout."""

    def act(rank: int) -> Outcome:
        os.environ["MOON_RANK_TIMEOUT"] = "2"
        with joined("cpu") as ranks:
            if rank == 1:
                time.sleep(6)
            ranks.gather(0)
        return {}

    start = time.monotonic()
    return {"ranks": together(folder, act), "seconds": time.monotonic() - start}


def norms(folder: Path) -> Outcome:
    """Statistics of batch norm recomputed by three ranks, beside one process's."""
    from moon.trainer.dataset import open_dataset
    from moon.trainer.finish import _recompute_batch_norm
    from moon.trainer.ranks import Ranks

    settings = {"few": "batch_size=90", "many": "batch_size=24"}

    def recomputed(ranks: Ranks, setting: str) -> dict[str, list[float]]:
        recipe = tiny_recipe(setting).resolved()
        device = torch.device("cpu")
        session = Session(recipe, open_dataset(recipe, device, ranks=ranks), device, ranks=ranks)
        _recompute_batch_norm(session, lambda done, total, what: None)
        buffers = session.model.named_buffers()
        return {name: value.double().flatten().tolist() for name, value in buffers}

    def act(rank: int) -> Outcome:
        with joined("cpu") as ranks:
            return {name: recomputed(ranks, setting) for name, setting in settings.items()}

    whole = {name: recomputed(Ranks(), setting) for name, setting in settings.items()}
    return {"ranks": together(folder, act, world=3), "whole": whole}


SCENARIOS = (smoke, equal, streamed, tampered, mistakes, alone, killed, adopted, silent, norms)


def main() -> None:
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    scenario = {each.__name__: each for each in SCENARIOS}[name]
    print(json.dumps(scenario(folder)))


if __name__ == "__main__":
    main()
