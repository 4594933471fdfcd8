"""Does `moon serve` survive whatever is sent to it? Mutated requests, for some minutes.

    python -m benchmarks.serve_fuzz [--bundle BUNDLE] [--minutes 10] [--clients 8] [--seed 0]
                                    [--workers 1] [--out FILE.json]

Valid and hostile requests (tests/serve/hostile_requests.py) are cut, spliced, repeated, sent with
bits flipped, in pieces, or not to their end. Any 500, any answer that does not come, any request
for /livez that takes longer than 5 s, a worker that dies, or memory that keeps growing is a
finding, printed with the seed that makes it again, and makes the exit status 1. Growth compares
the resident memory of the workers after half of the time with that at the end. Needs the extras
serve and dev.
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from benchmarks.serve import jpeg, trivial_bundle
from moon import __version__
from moon.files import write_json
from moon.runtime.bench_host import host
from tests.serve.conftest import Server
from tests.serve.hostile_requests import FORM, HOSTILE, INFER, JSON, post, request

PATIENCE = 20.0
# Of a machine that others may be using; the figures tell how long it took.
LIVE_SECONDS = 5.0
GROWTH = 0.05
# Shorter than by default, so that more is sent in the time.
LIMITS = {
    f"MOON_SERVE_{name}_SECONDS": "0.5" for name in ("HEAD", "BODY", "LINGER", "IDLE", "WRITE")
}


@dataclass
class Tally:
    """What happened, over all clients."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[str] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def saw(self, status: str) -> None:
        with self.lock:
            self.statuses[status] += 1

    def found(self, what: str) -> None:
        with self.lock:
            self.findings.append(what)
            print(f"finding: {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="default: a trivial model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or trivial_bundle(Path(folder))
        server = Server(Path(folder), str(bundle), "--workers", str(options.workers), **LIMITS)
        try:
            result = fuzz(server, options)
        finally:
            server.kill()
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(options.out, result)
    sys.exit(1 if result["findings"] else 0)


def fuzz(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Send until the time is over, and say what came of it."""
    tally, stop = Tally(), Event()
    workers = server.workers()
    threads = [
        Thread(target=client, args=(server, f"{options.seed}.{index}", tally, stop))
        for index in range(options.clients)
    ]
    threads.append(Thread(target=watch, args=(server, tally, stop)))
    for thread in threads:
        thread.start()
    seconds = 60 * options.minutes
    time.sleep(seconds / 2)
    before = resident(workers)
    time.sleep(seconds / 2)
    stop.set()
    for thread in threads:
        thread.join()
    if server.workers() != workers:
        tally.found("a worker died")
    after = resident(server.workers())
    if after > before * (1 + GROWTH):
        tally.found(f"resident memory grew from {before / 1e6:.0f} to {after / 1e6:.0f} MB")
    code = server.stop(signal.SIGTERM)
    if code or "Traceback" in server.errors():
        tally.found(f"exit status {code}; stderr: {server.errors()[-2000:]}")
    live = sorted(tally.live)
    return {
        "findings": tally.findings,
        "requests": sum(tally.statuses.values()),
        "statuses": dict(sorted(tally.statuses.items())),
        "livez_ms": {"median": 1e3 * live[len(live) // 2], "largest": 1e3 * live[-1]},
        "resident_mb": {"after half": before / 1e6, "at the end": after / 1e6},
        "environment": {"moon": __version__, **host()},
    }


def client(server: Server, seed: str, tally: Tally, stop: Event) -> None:
    """One client that never behaves for long."""
    hostile = list(HOSTILE.values())
    seeds = valid()
    seeds *= len(hostile) // len(seeds)
    seeds += hostile
    turn = 0
    while not stop.is_set():
        turn += 1
        rng = random.Random(f"{seed}.{turn}")
        try:
            status = send(server, mutated(rng, seeds), rng)
        except TimeoutError:
            status = "hang"
        except OSError:
            status = "reset"
        tally.saw(status)
        if status == "hang" or (status.startswith("5") and status not in {"503", "504"}):
            tally.found(f"{status} at seed {seed}.{turn}")


def valid() -> list[bytes]:
    """Requests of every kind that are answered with 200."""
    picture = jpeg(224)
    text = base64.b64encode(picture).decode()
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    size = len(picture) + 4
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": size}}]}).encode()
    body = head + len(picture).to_bytes(4, "little") + picture
    gets = [
        "/",
        "/livez",
        "/readyz",
        "/metrics",
        "/v2",
        "/v2/models/tiny",
        "/openapi.json",
        "/docs",
    ]
    return [
        post({"Content-Type": "image/jpeg"}, picture),
        post(JSON, json.dumps({"instances": [{"b64": text}] * 3}).encode()),
        post(FORM, part + picture + b"\r\n" + part + picture + b"\r\n--b--\r\n"),
        post(JSON, json.dumps({"inputs": [{**tensor, "data": [text]}]}).encode(), INFER),
        post({"Inference-Header-Content-Length": str(len(head))}, body, INFER),
        *(request("GET", path, {}) for path in gets),
    ]


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A request, or what is left of it."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        # The head is short beside the body, and more is decided by it.
        if rng.random() < 0.5:
            at = min(at, rng.randrange(300))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + rng.randrange(1, 40)] = b""
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 400)]
        elif kind == 4:
            other = rng.choice(seeds)
            data[at:] = other[rng.randrange(len(other)) :]
        else:
            data = data[:at]
    return bytes(data)


def send(server: Server, data: bytes, rng: random.Random) -> str:
    """The status of the first answer, or what came instead of one."""
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        pieces = rng.choice([1, 1, 1, 2, 5])
        step = len(data) // pieces + 1
        for start in range(0, len(data), step):
            connection.sendall(data[start : start + step])
            if pieces > 1:
                time.sleep(0.01)
        if rng.random() < 0.1:
            return "left"
        if rng.random() < 0.1:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        # To the end: an answer that is never closed is a hang.
        while chunk := connection.recv(65536):
            answer = answer or chunk
    return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"


def watch(server: Server, tally: Tally, stop: Event) -> None:
    """Ask /livez all the time."""
    while not stop.wait(0.2):
        start = time.monotonic()
        try:
            with server.client() as asking:
                alive = asking.get("/livez").status_code == 200
        except Exception as error:
            alive = False
            tally.found(f"/livez failed: {error!r}")
        seconds = time.monotonic() - start
        tally.live.append(seconds)
        if not alive or seconds > LIVE_SECONDS:
            tally.found(f"/livez took {seconds:.2f} s")


def resident(processes: list[int]) -> float:
    """Bytes in memory of some processes together."""
    found = 0.0
    for process in processes:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        found += next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return found


if __name__ == "__main__":
    main()
