"""What serving costs: `moon serve` beside a stock BentoML service, in one run, interleaved.

    python -m benchmarks.serve [--bundle BUNDLE] [--rounds 5] [--out FILE.json]

Both serve the same bundle, by default a trivial model, and are sent the same 224-pixel
JPEG over kept loopback connections. The servers are pinned to one core and the load to
another where there are two. Overhead is the median time of a request from one client, less
the median time of the same decision in process, on the server's core. Needs the extras
serve and dev.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

from moon.files import write_json
from moon.runtime.predictor import Predictor

CLIENTS = 8
WARM_UP = 50
SEQUENTIAL = 300
SECONDS = 2.0
PACKAGES = ("bentoml", "uvicorn", "starlette", "uvloop", "httptools", "onnxruntime", "pillow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="default: a trivial model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or trivial_bundle(Path(folder))
        result = measure(bundle.resolve(), Path(folder), options.rounds)
    show(result)
    if options.out:
        write_json(options.out, result)


def measure(bundle: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Every figure, and the machine they were taken on."""
    server_cores, client_cores = cores()
    picture = jpeg()
    os.sched_setaffinity(0, server_cores)
    in_process = decision_ms(bundle, picture)
    os.sched_setaffinity(0, client_cores)
    figures: dict[str, list[dict[str, float]]] = {"moon": [], "stock": []}
    with (
        server(moon_command(bundle), folder, server_cores, bundle) as moon,
        server(stock_command(), folder, server_cores, bundle) as stock,
    ):
        ports = {"moon": moon, "stock": stock}
        for port in ports.values():
            sequential(port, picture, WARM_UP)
        for turn in range(rounds):
            for name in list(ports) if turn % 2 == 0 else list(ports)[::-1]:
                figures[name].append(one_round(ports[name], picture))
    return {
        "in_process_ms": in_process,
        "servers": {name: summary(found, in_process) for name, found in figures.items()},
        "ratio_requests_per_second": median(
            ours["rps"] / theirs["rps"]
            for ours, theirs in zip(figures["moon"], figures["stock"], strict=True)
        ),
        "rounds": figures,
        "environment": environment(server_cores, client_cores),
    }


def one_round(port: int, picture: bytes) -> dict[str, float]:
    times = sequential(port, picture, SEQUENTIAL)
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "rps": concurrent(port, picture)}


def sequential(port: int, picture: bytes, requests: int) -> list[float]:
    """Milliseconds of each request of one client."""
    found = []
    with Connection(port) as connection:
        for _ in range(requests):
            start = time.perf_counter()
            connection.ask(picture)
            found.append(1e3 * (time.perf_counter() - start))
    return found


def concurrent(port: int, picture: bytes) -> float:
    """Requests a second of several clients that each wait for their answers."""
    counts = [0] * CLIENTS
    end = time.perf_counter() + SECONDS

    def client(index: int) -> None:
        with Connection(port) as connection:
            while time.perf_counter() < end:
                connection.ask(picture)
                counts[index] += 1

    threads = [Thread(target=client, args=(index,)) for index in range(CLIENTS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


class Connection:
    """A kept HTTP connection that does no more than needed: the load must not be the limit."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, picture: bytes) -> bytes:
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(picture)}\r\n\r\n".encode() + picture)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self.receive()
        head_bytes, _, body = answer.partition(b"\r\n\r\n")
        status, *lines = head_bytes.lower().split(b"\r\n")
        if b" 200 " not in status:
            raise SystemExit(f"refused: {answer.decode()}")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        while len(body) < length:
            body += self.receive()
        return body

    def receive(self) -> bytes:
        chunk = self.socket.recv(65536)
        if not chunk:
            raise SystemExit("the server closed the connection")
        return chunk


@contextmanager
def server(command: list[str], folder: Path, pinned: set[int], bundle: Path) -> Iterator[int]:
    """A server in a process of its own, from its first answer on; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    variables = {
        **os.environ,
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(folder / "bentoml"),
        "MOON_SERVE_GRACE_SECONDS": "0",
        "ORT_DISABLE_TELEMETRY": "1",
        "STOCK_BUNDLE": str(bundle),
    }
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=variables,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, pinned),
        )
    try:
        wait(port, process)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
                probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if b" 200 " in probe.recv(100):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{process.args!r} did not get ready")


def moon_command(bundle: Path) -> list[str]:
    return [sys.executable, "-m", "moon", "serve", str(bundle)]


def stock_command() -> list[str]:
    service = "benchmarks.stock_service:Stock"
    return [sys.executable, "-m", "bentoml", "serve", service, "--host", "127.0.0.1"]


def decision_ms(bundle: Path, picture: bytes) -> float:
    """Median milliseconds of the same decision without any server."""
    predictor = Predictor.open(bundle)
    times = []
    for _ in range(SEQUENTIAL):
        start = time.perf_counter()
        predictor.predict([picture])
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def trivial_bundle(folder: Path) -> Path:
    from tests.bundles import make_bundle

    return make_bundle(folder / "trivial", channels=3, size=32).path


def jpeg() -> bytes:
    """A smooth picture with some noise, as photographs are."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (14, 14, 3), np.uint8))
    pixels = np.asarray(small.resize((224, 224), Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def cores() -> tuple[set[int], set[int]]:
    mine = sorted(os.sched_getaffinity(0))
    return {mine[0]}, {mine[-1]}


def summary(found: list[dict[str, float]], in_process: float) -> dict[str, float]:
    middle = {name: median(one[name] for one in found) for name in found[0]}
    return {**middle, "overhead_ms": middle["p50_ms"] - in_process}


def environment(server_cores: set[int], client_cores: set[int]) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": {"server": sorted(server_cores), "load": sorted(client_cores)},
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")


def show(result: dict[str, Any]) -> None:
    print(f"the decision alone, in process: {result['in_process_ms']:.2f} ms (median)")
    print(f"{'':8}{'p50 ms':>9}{'p99 ms':>9}{'overhead ms':>13}{'requests/s':>12}")
    for name, found in result["servers"].items():
        numbers = f"{found['p50_ms']:9.2f}{found['p99_ms']:9.2f}{found['overhead_ms']:13.2f}"
        print(f"{name:8}{numbers}{found['rps']:12.0f}")
    print(f"requests/s, moon over stock: {result['ratio_requests_per_second']:.2f} (median)")
    print(json.dumps(result["environment"]))


if __name__ == "__main__":
    main()
