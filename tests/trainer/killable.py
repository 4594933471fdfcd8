"""Runs that are killed, or run out of disk, for test_kill.py: a process of its own.

``python -m tests.trainer.killable FOLDER SCENARIO`` prints one line of JSON. Each run is a
fork, because only a process can be killed; torch keeps to one thread, which makes that safe.
The run they are compared with is trained here, and spares the forks the imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import moon.trainer.finish as finish_module
from moon.errors import MoonError
from moon.trainer.fit import fit
from moon.trainer.step import Step
from tests.trainer.recipes_small import tiny_recipe


def forked(action: Callable[[], object]) -> int:
    """The process running ``action``, which exits 0, or 1 after a MoonError it prints."""
    process = os.fork()
    if process:
        return process
    try:
        action()
        os._exit(0)
    except MoonError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(2)


def outcome(process: int) -> int:
    """Exit status; minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(run: Path, spot: str, number: int) -> Callable[[], object]:
    """A run that is killed when it has come to ``spot`` for the ``number``-th time."""

    def act() -> object:
        if spot == "step":
            _before(Step, "_compute", number)
        elif spot == "update":
            # After the topology has changed and before the optimizer has moved the weights.
            from moon.trainer.sparsity.sparsifier import Sparsifier

            _after(Sparsifier, "_update", number)
        elif spot == "half-written":
            _before(Path, "replace", number)
        elif spot == "written":
            _after(Path, "replace", number)
        elif spot == "finish":
            _before(finish_module, "recompute_batch_norm", number)
        return fit(tiny_recipe(), run, device="cpu", resume=True)

    return act


def _before(owner: Any, name: str, number: int) -> None:
    inner, count = getattr(owner, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            die()
        return inner(*args, **options)

    setattr(owner, name, counted)


def _after(owner: Any, name: str, number: int) -> None:
    inner, count = getattr(owner, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        result = inner(*args, **options)
        count[0] += 1
        if count[0] == number:
            die()
        return result

    setattr(owner, name, counted)


def resumed(run: Path) -> Callable[[], object]:
    return lambda: fit(tiny_recipe(), run, device="cpu", resume=True)


def facts(run: Path) -> dict[str, Any]:
    """What two runs must agree on to the bit."""
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    digests = {path: _digest(value) for path, value in _leaves("", state)}
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": hashlib.sha256((run / "checkpoint.safetensors").read_bytes()).hexdigest(),
        "state": {path: d for path, d in digests.items() if not path.endswith("/seconds")},
        "history": [{k: v for k, v in record.items() if k != "seconds"} for record in history],
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")
                        if not path.name.endswith(".tmp")),
    }  # fmt: skip


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(f"{path}/{k}", v)]
    if isinstance(value, list | tuple):
        return [leaf for i, v in enumerate(value) for leaf in _leaves(f"{path}/{i}", v)]
    return [(path, value)]


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()
    return repr(value)


# Six steps an epoch: the warm-up is steps 1 to 6; updates come every fourth step until
# 21; votes are cast after steps 30 and 36; the files 14 and 15 are the checkpoint's.
EVERYWHERE = (
    ("step", 3), ("step", 7), ("step", 9), ("step", 27), ("step", 33), ("update", 1),
    ("update", 3), ("half-written", 1), ("half-written", 2), ("half-written", 6),
    ("half-written", 12), ("written", 2), ("written", 6), ("written", 13), ("finish", 1),
    ("half-written", 14), ("half-written", 15), ("written", 14),
)  # fmt: skip
SOME = (("step", 3), ("update", 3), ("step", 33), ("half-written", 6), ("finish", 1))


def kill_at(folder: Path, spots: Sequence[tuple[str, int]]) -> dict[str, Any]:
    whole = folder / "whole"
    resumed(whole)()
    expected = facts(whole)
    results = {}
    for spot, number in spots:
        run = folder / f"{spot}-{number}"
        killed = outcome(forked(killing(run, spot, number)))
        again = outcome(forked(resumed(run)))
        found = facts(run) if again == 0 else {}
        wrong = [key for key in expected if found.get(key) != expected[key]]
        results[f"{spot} {number}"] = [killed, again, wrong]
    return results


def kill_at_random(folder: Path) -> dict[str, Any]:
    whole, run = folder / "whole", folder / "run"
    resumed(whole)()
    start = time.monotonic()
    assert outcome(forked(resumed(folder / "timed"))) == 0
    took = time.monotonic() - start
    draws = random.Random(0)
    kills = 0
    for attempt in range(60):
        process = forked(resumed(run))
        # Longer as time goes by, so that a busy machine gets through an epoch at last.
        time.sleep(took * draws.uniform(0.1, 0.6) * (1 + attempt / 10))
        os.kill(process, signal.SIGKILL)
        status = outcome(process)
        kills += status == -signal.SIGKILL
        if status == 0:
            break
        if (run / "checkpoint.json").exists():
            break
    status = outcome(forked(resumed(run)))
    wrong = [key for key, value in facts(whole).items() if facts(run)[key] != value]
    return {"kills": kills, "status": status, "wrong": wrong}


def disk_full(folder: Path) -> dict[str, Any]:
    whole, run = folder / "whole", folder / "run"
    resumed(whole)()
    # The votes' sums make the state larger: four epochs fit, the first voting one does not.
    limit = (whole / "last" / "state.pt").stat().st_size - 1000

    def limited() -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return fit(tiny_recipe(), run, device="cpu")

    full = outcome(forked(limited))
    epoch = torch.load(run / "last" / "state.pt", weights_only=True)["epoch"]
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    status = outcome(forked(resumed(run)))
    wrong = [key for key, value in facts(whole).items() if facts(run)[key] != value]
    return {"full": full, "epoch": epoch, "left": left, "status": status, "wrong": wrong}


def main() -> None:
    torch.set_num_threads(1)
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    scenarios: dict[str, Callable[[Path], dict[str, Any]]] = {
        "everywhere": lambda folder: kill_at(folder, EVERYWHERE),
        "some": lambda folder: kill_at(folder, SOME),
        "random": kill_at_random,
        "full": disk_full,
    }
    print(json.dumps(scenarios[scenario](folder)))


if __name__ == "__main__":
    main()
