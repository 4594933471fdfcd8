"""How a model starts: loading and first inferences in processes that did nothing else before.

A process that has loaded one model has the libraries of the next already in memory, its threads
running and its memory mapped, so what it takes to load one there is no measure of a cold start.
``python -m moon.runtime.bench_process`` is such a process: it reads what to do from stdin, as
JSON, and writes what it measured to stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from moon.errors import BackendError
from moon.progress import Progress, silent
from moon.runtime.bench_host import read_text

__all__ = ["Start", "measure_start"]

_LIMIT_S = 1800
# What a backend imports when it is first opened, which is not part of loading a model.
_LIBRARIES = {
    "onnxruntime": ("onnxruntime",),
    "sparse": ("onnxruntime", "moon.runtime.sparse.backend"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx",),
}


@dataclass(frozen=True)
class Start:
    """What was measured in each of several processes, one value a process.

    Attributes:
        import_ms: importing moon's runtime, numpy and the libraries of the backend.
        load_ms: opening the backend.
        cold_ms: the first inference.
        warm_ms: the second.
        peak_bytes: most memory the process had at once.
    """

    import_ms: tuple[float, ...]
    load_ms: tuple[float, ...]
    cold_ms: tuple[float, ...]
    warm_ms: tuple[float, ...]
    peak_bytes: tuple[int | None, ...]

    def figures(self) -> dict[str, Any]:
        """Medians, and every value under ``start``."""
        peaks = [peak for peak in self.peak_bytes if peak is not None]
        return {
            "load_ms": statistics.median(self.load_ms),
            "first_inference_ms": {
                "cold": statistics.median(self.cold_ms),
                "warm": statistics.median(self.warm_ms),
            },
            "peak_bytes": int(statistics.median(peaks)) if peaks else None,
            "start": {
                "import_ms": list(self.import_ms),
                "load_ms": list(self.load_ms),
                "cold_ms": list(self.cold_ms),
                "warm_ms": list(self.warm_ms),
                "peak_bytes": list(self.peak_bytes),
            },
        }


def measure_start(
    bundle: Path,
    model: bytes | None,
    backend: str,
    *,
    samples: int,
    threads: int,
    spin: bool,
    processes: int,
    progress: Progress = silent,
) -> Start:
    """Load a model, and run it twice, in fresh processes one after the other.

    Args:
        bundle: opened and whole, for its model and its golden inputs.
        model: another graph to run instead.
        backend: its name.
        samples: images in a query.
        threads, spin: for one inference.
        processes: how many.
        progress: told how many are done.

    Raises:
        BackendError: the backend cannot run there.
    """
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = None
        if model is not None:
            file = str(Path(folder, "model.onnx"))
            Path(file).write_bytes(model)
        asked = {
            "bundle": str(bundle), "model": file, "backend": backend, "samples": samples,
            "threads": threads, "spin": spin,
        }  # fmt: skip
        for i in range(processes):
            progress(i, processes, "starting fresh processes")
            found.append(_once(asked))
    keys = ("import_ms", "load_ms", "cold_ms", "warm_ms", "peak_bytes")
    return Start(*(tuple(one[key] for one in found) for key in keys))


def _once(asked: dict[str, Any]) -> dict[str, Any]:
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "moon.runtime.bench_process"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise BackendError(
            f"{asked['backend']} in a process of its own ended with {done.returncode}: {last}",
            remedy="--processes 0 leaves such processes out",
        ) from error
    if "error" in answer:
        raise BackendError(answer["error"], remedy=answer["remedy"])
    return answer


def _measure(asked: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    from moon.bundle import Bundle
    from moon.runtime.backend import open_backend
    from moon.runtime.bench_inputs import inputs_of

    for library in _LIBRARIES.get(asked["backend"].split(":")[0], ()):
        with contextlib.suppress(ImportError):  # opening the backend says what is missing
            import_module(library)
    imported = time.perf_counter()
    bundle = Bundle.open(asked["bundle"])
    batch = inputs_of(bundle, asked["samples"])[0]
    model = bundle if asked["model"] is None else Path(asked["model"]).read_bytes()
    opening = time.perf_counter()
    backend = open_backend(model, asked["backend"], threads=asked["threads"], spin=asked["spin"])
    opened = time.perf_counter()
    backend.run(batch)
    first = time.perf_counter()
    backend.run(batch)
    second = time.perf_counter()
    return {
        "import_ms": (imported - start) * 1e3,
        "load_ms": (opened - opening) * 1e3,
        "cold_ms": (first - opened) * 1e3,
        "warm_ms": (second - first) * 1e3,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int | None:
    # getrusage would tell the peak of the process that started this one, if that was larger.
    status = read_text(Path("/proc/self/status")) or ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _main() -> None:
    from moon.errors import MoonError

    try:
        answer = _measure(json.load(sys.stdin))
    except MoonError as error:
        answer = {"error": error.cause, "remedy": error.remedy}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main()
