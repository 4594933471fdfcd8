"""The drift test's file: shared, whole whatever happens, and of one gate only."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moon.drift import DriftTest
from moon.errors import MoonError
from moon.gate import Decision
from moon.serve.ledger import GATHER_SECONDS, Ledger

TEST = DriftTest({1.0: 0.06})


def decided(*rejected: bool, threshold: float = 1.0) -> list[Decision]:
    return [
        Decision(
            accepted=not x, label=None, reason=None, top=(), score_name="ebo", score=0.0,
            threshold=threshold, p_value=None,
        )
        for x in rejected
    ]  # fmt: skip


def test_two_see_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    first, second = Ledger(TEST, "m", path), Ledger(TEST, "m", path)
    alone = Ledger(TEST, "m")
    for ledger, x in ((first, True), (second, False), (second, True), (first, True)):
        ledger.add(decided(x))
        alone.add(decided(x))
    for ledger in (first, second):
        assert ledger.read().e_value == alone.read().e_value
        assert ledger.read().rejected == 3
    assert Path(path).stat().st_mode & 0o077 == 0
    first.close()
    second.close()


def test_an_event_loop_writes_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "state")
    first, second, alone = Ledger(TEST, "m", path), Ledger(TEST, "m", path), Ledger(TEST, "m")
    turns = []
    watch = DriftTest.watch
    monkeypatch.setattr(DriftTest, "watch", lambda *args: turns.append(1) or watch(*args))

    async def work() -> None:
        for x in (True, False, True):
            first.add(decided(x))
        assert second.read().images == 0 and first.read().images == 3
        first.add(decided(False, True))
        await asyncio.sleep(2 * GATHER_SECONDS)
        assert second.read().images == 5
        first.add(decided(True))
        first.close()

    asyncio.run(work())
    assert len(turns) == 3
    alone.add(decided(True, False, True, False, True, True))
    assert second.read().rejected == 4
    assert second.read().log_e_value == pytest.approx(alone.read().log_e_value, abs=1e-12)
    second.close()


def test_decisions_of_another_gate_do_not_count(tmp_path: Path) -> None:
    ledger = Ledger(TEST, "m", str(tmp_path / "state"))
    ledger.add(decided(True, threshold=2.0))
    ledger.add([])
    assert ledger.read().images == 0
    ledger.add([*decided(True, threshold=2.0), *decided(True)])
    assert ledger.read().images == 1
    ledger.close()


@pytest.mark.parametrize("harm", ["other model", "other gate", "bit", "short", "long", "foreign"])
def test_what_is_not_its_own_begins_anew(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    ledger = Ledger(TEST, "m", str(path))
    ledger.add(decided(*[True] * 20))
    ledger.close()
    data = bytearray(path.read_bytes())
    if harm == "bit":
        data[100] ^= 1
    changed = {"short": data[:-1], "long": data + b"0", "foreign": b"PK\3\4", "bit": data}
    path.write_bytes(changed.get(harm, data))
    test = DriftTest({1.0: 0.07}) if harm == "other gate" else TEST
    with caplog.at_level(logging.WARNING):
        fresh = Ledger(test, "n" if harm == "other model" else "m", str(path))
    assert fresh.read().images == 0
    assert "begins anew" in caplog.text
    fresh.add(decided(True))
    assert fresh.read().images == 1
    fresh.close()


def test_no_folder_for_it(tmp_path: Path) -> None:
    with pytest.raises(MoonError, match="could not open the drift test's state"):
        Ledger(TEST, "m", str(tmp_path / "none" / "state"))


WORKER = """
import sys
from moon.serve.ledger import Ledger
from tests.serve.test_ledger import TEST, decided

ledger = Ledger(TEST, "m", sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[2])):
    ledger.add(decided(i % 10 == 0))
"""


def test_processes_lose_nothing_to_each_other(tmp_path: Path) -> None:
    path, each = str(tmp_path / "state"), 300
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, path, str(each)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.communicate("go\n", timeout=60)
        assert worker.returncode == 0
    ledger = Ledger(TEST, "m", path)
    watched = ledger.read()
    assert (watched.images, watched.rejected) == (2 * each, 2 * each // 10)
    assert np.isfinite(watched.log_e_value)
    ledger.close()
