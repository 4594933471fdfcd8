from __future__ import annotations

import multiprocessing
from pathlib import Path

from moon.runtime.sparse.cache import Cache


def _hammer(folder: str, seed: int, failures: multiprocessing.Queue[str]) -> None:
    cache = Cache(folder, limit=40_000)
    keys = [bytes([i]) * 32 for i in range(10)]
    for turn in range(300):
        key = keys[(turn * 7 + seed) % len(keys)]
        data = key * (100 + 20 * ((turn + seed) % 5))
        cache.put(key, data)
        found = cache.get(key)
        if found is not None and found.replace(key, b""):
            failures.put(f"{seed}: another's data under a key")
    failures.put("done" if cache.folder is not None else cache.reason)


def test_eight_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failures: multiprocessing.Queue[str] = context.Queue()
    folder = tmp_path / "a" / "b"
    workers = [context.Process(target=_hammer, args=(str(folder), i, failures)) for i in range(8)]
    for worker in workers:
        worker.start()
    assert [failures.get(timeout=120) for _ in workers] == ["done"] * 8
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert not [path.name for path in folder.iterdir() if not path.name.endswith(".object")]
