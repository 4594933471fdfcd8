from __future__ import annotations

import subprocess
import sys

from moon.serve.supervisor import LONGEST_PAUSE, Grave

START = """
from moon.serve.address import bind
from moon.serve.settings import Served, Settings
from moon.serve.supervisor import Supervisor, configuration

if __name__ == "__main__":
    config = configuration(Settings(served=(Served("a", "no-such-bundle"),)), workers=1)
    supervisor = Supervisor(config, [bind("127.0.0.1", 0)], lambda: print("ready"))
    supervisor.run()
    print("failed" if supervisor.failed else "ended")
"""


def test_a_worker_that_cannot_start_ends_it() -> None:
    asked = [sys.executable, "-c", START]
    found = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "failed\n"
    assert "no-such-bundle does not exist" in found.stderr
    assert "Traceback" not in found.stderr


def test_first_death_is_made_good_at_once() -> None:
    assert Grave().another(1, 100.0) == Grave(pid=1, time=100.0, deaths=1, until=100.0)


def test_a_worker_that_keeps_dying_waits_ever_longer() -> None:
    grave, pauses = Grave(), []
    now = 100.0
    for pid in range(8):
        grave = grave.another(pid, now)
        pauses.append(grave.until - now)
        now = grave.until + 1
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30]
    # Long after, it counts as the first again.
    later = grave.another(9, now + 2 * LONGEST_PAUSE)
    assert later.until == later.time
