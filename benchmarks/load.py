"""What loading a packed model costs in ONNX Runtime: time and memory, against the dense file.

    python benchmarks/load.py [--model resnet50] [--sparsity 0.9] [--side 224] [--rounds 7]
    python benchmarks/load.py MODEL.onnx ...

Without files: the network with random weights and ERK masks, as dense fp32, coo fp32, compact fp32
and compact fp16. Every load is a process of its own, and the forms take turns. Time is the
processor's, of making the session of bytes already read, with one thread (on a quiet machine it is
the clock's); `ratio` is the median over the rounds of the time by that of the first file in the
same round. Memory is the process's own (RSS) above what it held before: `peak` the most on the way,
`after` once the session is made and the file's bytes are dropped, `held` once the allocator has
given back what is free (malloc_trim), and `used` after one more inference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FORMS = (("dense", "fp32"), ("coo", "fp32"), ("compact", "fp32"), ("compact", "fp16"))

MEMORY = ("peak", "after", "held", "used")

# Only what a device would run: no torch, no onnx.
CHILD = """
import ctypes, gc, json, sys, time
import numpy as np
from moon.runtime.onnxruntime import open_session

def held(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

data = open(sys.argv[1], "rb").read()
size = len(data)
before = held("VmRSS") - size
start = time.process_time()
session = open_session(data, threads=1)
seconds = time.process_time() - start
del data
gc.collect()
after, peak = held("VmRSS") - before, held("VmHWM") - before
ctypes.CDLL(None).malloc_trim(0)
kept = held("VmRSS") - before
value = session.get_inputs()[0]
shape = [side if isinstance(side, int) else 1 for side in value.shape]
session.run(None, {value.name: np.zeros(shape, np.float32)})
used = held("VmRSS") - before
memory = {"peak": peak, "after": after, "held": kept, "used": used}
print(json.dumps({"bytes": size, "ms": 1e3 * seconds, **memory}))
"""


def write_forms(folder: Path, model: str, sparsity: float, side: int) -> list[Path]:
    """Files of one network, by form."""
    from bytes import OUTPUTS, sparse_net

    from moon.export.head import add_head
    from moon.export.pack import pack
    from moon.export.trace import trace

    net = sparse_net(sparsity, 0, model=model, size=(side, side))
    graph = trace(net, channels=3, size=(side, side))
    plain = add_head(graph, outputs=OUTPUTS, unknown_index=OUTPUTS - 1)
    paths = []
    for weights, values in FORMS:
        path = folder / f"{weights} {values}.onnx"
        packed = pack(plain, weights=weights, values=values)  # type: ignore[arg-type]
        path.write_bytes(packed.SerializeToString())
        paths.append(path)
    return paths


def load(path: Path) -> dict[str, Any]:
    words = [sys.executable, "-c", CHILD, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(paths: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Medians by file."""
    runs: list[list[dict[str, Any]]] = [[load(path) for path in paths] for _ in range(rounds)]
    rows = []
    for i, path in enumerate(paths):
        own = [each[i] for each in runs]
        row = {key: statistics.median(one[key] for one in own) for key in own[0]}
        ratio = statistics.median(each[i]["ms"] / each[0]["ms"] for each in runs)
        fastest = min(one["ms"] for one in own)
        rows.append({"file": path.stem, **row, "fastest_ms": fastest, "ratio": ratio})
    return rows


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        paths = given.files or write_forms(Path(folder), given.model, given.sparsity, given.side)
        rows = measure(paths, given.rounds)
    table = Table("file", "bytes", "load", "fastest", "ratio", *MEMORY)
    for row in rows:
        table.add_row(
            row["file"], f"{row['bytes']:,.0f}", f"{row['ms']:.0f} ms",
            f"{row['fastest_ms']:.0f} ms", f"{row['ratio']:.2f}",
            *(f"{row[key] / 1e6:.0f} MB" for key in MEMORY),
        )  # fmt: skip
    Console(width=110).print(table)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
