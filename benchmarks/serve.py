"""What serving costs: `moon serve` beside a stock BentoML and a plain FastAPI service, in one run.

    python -m benchmarks.serve [--bundle BUNDLE] [--sides 32,224] [--rounds 5] [--seconds 3]
        [--servers moon,bentoml,fastapi] [--soak SECONDS] [--json FILE]

All serve the same bundle, by default a trivial model, on one core, and are sent the same JPEG by
a load generator on another where there are two. Each is measured in turn, every second round in
reverse order:

    one client      median and 99th percentile of a request, kept connection; `overhead` is the
                    median less that of the same decision in process on the servers' core
    saturation      answers a second with 16 clients that ask without a pause
    70%             requests at random times (Poisson) at 70% of the server's own saturation, of
                    that round; times count from when a request was due

Ratios are medians over the rounds of what was measured in the same round. Of moon alone:

    overload        at twice its saturation: good answers a second over those at saturation, how
                    soon the rest are refused, and what else happened
    slow clients    500 that send a byte a second: memory, and how long /livez takes meanwhile
    soak            memory after --soak seconds at 70%, over what it was after a tenth of that

`late` is how far behind its times the load generator fell; where it is not small the load was the
limit. Needs the extras serve and dev, and for FastAPI: pip install 'fastapi[standard]'.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serve_load import Outcome, closed, open_loop, request
from benchmarks.serve_servers import COMMANDS, Server, missing, serving
from moon import __version__
from moon.files import write_json
from moon.runtime.bench_host import host
from moon.runtime.predictor import Predictor

CLIENTS = 16
WARM_SECONDS = 1.0
SLOW_CLIENTS = 500
SLOW_SECONDS = 10.0
LOAD = 0.7
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="default: a trivial model")
    parser.add_argument("--sides", default="32,224", help="of the JPEGs, in pixels")
    parser.add_argument("--servers", default=",".join(COMMANDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or trivial_bundle(Path(folder))
        result = measure(bundle.resolve(), Path(folder), options)
    show(result)
    if options.json:
        write_json(options.json, result)


def measure(bundle: Path, folder: Path, options: argparse.Namespace) -> Figures:
    """Every figure, and the machine they were taken on."""
    server_cores, load_cores = cores()
    names = [name for name in options.servers.split(",") if not _left_out(name)]
    result: Figures = {
        "environment": {
            "moon": __version__,
            **host(),
            "server_cores": sorted(server_cores),
            "load_cores": sorted(load_cores),
        },
        "sides": {},
    }
    for side in map(int, options.sides.split(",")):
        picture = jpeg(side)
        os.sched_setaffinity(0, server_cores)
        in_process = decision_ms(bundle, picture)
        os.sched_setaffinity(0, load_cores)
        payload = request(picture, "image/jpeg")
        with ExitStack() as stack:
            servers = [
                stack.enter_context(serving(name, bundle, folder, server_cores)) for name in names
            ]
            for server in servers:
                closed(server.port, payload, CLIENTS, seconds=WARM_SECONDS)
            rounds: dict[str, list[Figures]] = {name: [] for name in names}
            for turn in range(options.rounds):
                for server in servers[:: -1 if turn % 2 else 1]:
                    one = one_round(server, payload, options.seconds, turn)
                    rounds[server.name].append(one)
        result["sides"][side] = {
            "jpeg_bytes": len(picture),
            "in_process_ms": in_process,
            "servers": {name: summary(found, in_process) for name, found in rounds.items()},
            "moon_over": {name: ratios(rounds["moon"], rounds[name]) for name in names[1:]}
            if names[0] == "moon"
            else {},
            "rounds": rounds,
        }
    if "moon" in names:
        with serving("moon", bundle, folder, server_cores) as server:
            result["moon"] = alone(server, payload, options)
    return result


def _left_out(name: str) -> bool:
    if name not in COMMANDS:
        raise SystemExit(f"serve: no server {name!r}; there are {', '.join(COMMANDS)}")
    if package := missing(name):
        print(f"{name} left out: the package {package} is not installed")
        return True
    return False


def one_round(server: Server, payload: bytes, seconds: float, turn: int) -> Figures:
    one = closed(server.port, payload, 1, seconds=seconds)
    many = closed(server.port, payload, CLIENTS, seconds=seconds)
    some = open_loop(server.port, payload, LOAD * many.rate, seconds=seconds, seed=turn)
    return {
        "p50_ms": one.percentile(50),
        "p99_ms": one.percentile(99),
        "saturation_rps": many.rate,
        "at_70_p50_ms": some.percentile(50),
        "at_70_p99_ms": some.percentile(99),
        "at_70_not_200": len(some.refused) + sum(some.failed.values()),
        "failed": {**one.failed, **many.failed},
        "late_ms": some.late * 1e3,
    }


def alone(server: Server, payload: bytes, options: argparse.Namespace) -> Figures:
    """What is asked of moon beyond comparisons."""
    seconds = max(options.seconds, 5.0)
    full = closed(server.port, payload, CLIENTS, seconds=seconds)
    over = open_loop(server.port, payload, 2 * full.rate, seconds=seconds)
    found: Figures = {
        "overload": {
            "saturation_rps": full.rate,
            "asked_rps": 2 * full.rate,
            "goodput": over.rate / full.rate,
            "refused": len(over.refused),
            "refused_p50_ms": over.percentile(50, refused=True),
            "refused_p99_ms": over.percentile(99, refused=True),
            "answered_p99_ms": over.percentile(99),
            "failed": over.failed,
            "late_ms": over.late * 1e3,
        },
        "slow_clients": slow_clients(server),
    }
    if options.soak:
        found["soak"] = soak(server, payload, LOAD * full.rate, options.soak)
    return found


def slow_clients(server: Server) -> Figures:
    """Many that send a byte a second of a body that they announced."""
    before = server.resident
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    head += b"Content-Length: 900000\r\n\r\n"
    clients = []
    refused = 0
    for _ in range(SLOW_CLIENTS):
        try:
            client = socket.create_connection(("127.0.0.1", server.port), timeout=5)
            client.sendall(head)
            clients.append(client)
        except OSError:
            refused += 1
    times: list[float] = []
    most = before
    end = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < end:
        for client in clients:
            try:
                client.send(b"x")
            except OSError:
                continue
        times.append(_live_ms(server.port))
        most = max(most, server.resident)
        time.sleep(1)
    for client in clients:
        client.close()
    return {
        "clients": len(clients),
        "not_accepted": refused,
        "memory_grown_mb": (most - before) / 1e6,
        "livez_most_ms": max(times),
    }


def _live_ms(port: int) -> float:
    start = time.perf_counter()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as probe:
            probe.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            alive = b" 200 " in probe.recv(100)
    except OSError:
        alive = False
    return (time.perf_counter() - start) * 1e3 if alive else float("inf")


def soak(server: Server, payload: bytes, rate: float, seconds: float) -> Figures:
    """Memory over time."""
    total = Outcome()
    first = open_loop(server.port, payload, rate, seconds=seconds / 10)
    early = server.resident
    total = open_loop(server.port, payload, rate, seconds=seconds * 0.9, seed=1)
    return {
        "seconds": seconds,
        "requests": len(first.answered) + len(total.answered),
        "failed": {**first.failed, **total.failed},
        "refused": len(first.refused) + len(total.refused),
        "memory_mb": [early / 1e6, server.resident / 1e6],
        "grown": server.resident / early - 1,
    }


def decision_ms(bundle: Path, picture: bytes) -> float:
    """Median milliseconds of the same decision without any server."""
    predictor = Predictor.open(bundle)
    times = []
    for _ in range(300):
        start = time.perf_counter()
        predictor.predict([picture])
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def trivial_bundle(folder: Path) -> Path:
    from tests.bundles import make_bundle

    return make_bundle(folder / "trivial", channels=3, size=32).path


def jpeg(side: int) -> bytes:
    """A smooth picture with some noise, as photographs are."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (14, 14, 3), np.uint8))
    pixels = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def cores() -> tuple[set[int], set[int]]:
    """Of the servers, and of the load."""
    mine = sorted(os.sched_getaffinity(0))
    return {mine[0]}, {mine[-1]}


def summary(found: list[Figures], in_process: float) -> Figures:
    """Medians over the rounds; of what must not happen the sum."""
    numbers = [name for name in found[0] if name not in ("failed", "at_70_not_200")]
    middle = {name: median(one[name] for one in found) for name in numbers}
    failed: dict[str, int] = {}
    for one in found:
        for status, count in one["failed"].items():
            failed[status] = failed.get(status, 0) + count
    return {
        **middle,
        "at_70_not_200": sum(one["at_70_not_200"] for one in found),
        "overhead_ms": middle["p50_ms"] - in_process,
        "failed": failed,
    }


def ratios(ours: list[Figures], theirs: list[Figures]) -> Figures:
    """Of rounds, paired."""

    def of(name: str) -> float:
        return median(a[name] / b[name] for a, b in zip(ours, theirs, strict=True))

    return {
        "requests_per_second": of("saturation_rps"),
        "p99_at_70": of("at_70_p99_ms"),
    }


def show(result: Figures) -> None:
    say: Callable[[str], None] = print
    for side, found in result["sides"].items():
        alone = f"the decision alone {found['in_process_ms']:.2f} ms"
        say(f"JPEG of {side} x {side} pixels, {found['jpeg_bytes']:,} bytes; {alone}")
        say(f"{'':9}{'one client':>22}{'over-':>8}{'16 clients':>13}{'at 70% of that':>18}")
        say(
            f"{'':9}{'p50 ms':>11}{'p99 ms':>11}{'head':>8}{'answers/s':>13}"
            f"{'p50 ms':>9}{'p99 ms':>9}{'not 200':>9}{'late ms':>9}"
        )
        for name, one in found["servers"].items():
            say(
                f"{name:9}{one['p50_ms']:11.2f}{one['p99_ms']:11.2f}{one['overhead_ms']:8.2f}"
                f"{one['saturation_rps']:13.0f}{one['at_70_p50_ms']:9.2f}{one['at_70_p99_ms']:9.2f}"
                f"{one['at_70_not_200']:9d}{one['late_ms']:9.2f}"
            )
        for name, ratio in found["moon_over"].items():
            rps, p99 = ratio["requests_per_second"], ratio["p99_at_70"]
            say(f"moon over {name}: {rps:.2f} times the answers/s, {p99:.2f} of its p99 at 70%")
        say("")
    if "moon" in result:
        for name, one in result["moon"].items():
            say(f"{name}: {json.dumps(one)}")
    say(json.dumps(result["environment"]))


if __name__ == "__main__":
    main()
