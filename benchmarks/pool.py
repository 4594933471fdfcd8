"""Workers side by side: each a process of its own, none stopped by another's failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from jobs import Job

from moon.errors import UsageError

WORKER = Path(__file__).with_name("worker.py")
# Seconds between two lines of one run.
EVERY = 10.0
Say = Callable[[str], None]


class StoppedError(Exception):
    """Ctrl-C or SIGTERM; all workers have ended, and every run can be taken up again."""


class Pool:
    """Workers, so many at a time.

    Args:
        parallel: how many.
        say: told a line now and then.
    """

    def __init__(self, parallel: int, say: Say) -> None:
        if parallel < 1:
            raise UsageError(f"--jobs must be at least 1, got {parallel}")
        self._parallel, self._say = parallel, say
        self._running: set[subprocess.Popen] = set()
        self._lock = Lock()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Do what is left of the jobs.

        Returns:
            Why each job failed that did, by name.

        Raises:
            StoppedError: stopped from outside.
        """
        before = signal.signal(signal.SIGTERM, _interrupt)
        failures: dict[str, str] = {}
        try:
            with ThreadPoolExecutor(self._parallel) as threads:
                pending = [
                    (job, threads.submit(self._one, job, f"[{i}/{len(jobs)}] {job.name}"))
                    for i, job in enumerate(jobs, 1)
                ]
                try:
                    for job, future in pending:
                        if reason := future.result():
                            failures[job.name] = reason
                except KeyboardInterrupt:
                    self._stop()
                    raise StoppedError from None
        finally:
            signal.signal(signal.SIGTERM, before)
        return failures

    def _one(self, job: Job, title: str) -> str:
        """Run one job; why it failed, or ""."""
        log = job.out / "logs" / f"{job.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        path = job.write()
        with log.open("wb") as errors:
            with self._lock:
                if self._stopped:
                    return "stopped"
                process = subprocess.Popen(
                    [sys.executable, WORKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, text=True, env=self._environment(), start_new_session=True,
                )  # fmt: skip
                self._running.add(process)
            with process:
                self._tell(process, title)
                # Before stdin is closed, which would end it.
                code = process.wait()
            with self._lock:
                self._running.discard(process)
        if self._stopped:
            return "stopped"
        if code == 0:
            self._say(f"{title}: done")
            return ""
        reason = _last_line(log) or f"its process ended with {code}"
        self._say(f"{title}: FAILED: {reason}")
        return reason

    def _tell(self, process: subprocess.Popen, title: str) -> None:
        """Pass on the worker's lines, the first and then one every few seconds."""
        told = 0.0
        for line in process.stdout or ():
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                self._say(f"{title}: {line.rstrip()}")

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self._parallel)
        return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
