"""How a measurement is done: what is asked, and what is made of it once speeds are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moon.errors import UsageError

__all__ = ["ENOUGH_QUERIES", "SCENARIOS", "Plan", "Settings"]

SCENARIOS = ("single", "multi", "rate")
# MLPerf's single stream asks for so many queries, its multi-stream for so many samples in each.
ENOUGH_QUERIES = 1024
MULTI_SAMPLES = 8
_ROUNDS = 32
# Where nothing is asked: long enough for counters that tick a hundred times a second, and for
# clocks to settle.
_MIN_TIME_S = 2.0
# Of the time allowed, what may go to warming up.
_WARM_SHARE = 0.1
# Loadings where nothing is asked: fewer where they would take longer than the queries, and this.
_LOADS, _FEWEST_LOADS, _LOADING_S = 8, 4, 5.0
# With fewer, what is not counted around them would take most of the time.
_QUERIES_A_LOAD, _QUERIES_A_BLOCK = 16, 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked; see :func:`moon.runtime.bench.bench`.

    Raises:
        UsageError: a value is out of range.
    """

    backends: tuple[str, ...]
    baseline: str | None = None
    batch: int = 1
    threads: int = 1
    scenario: str = "single"
    queries: int | None = None
    warmup: int | None = None
    settle: int = 2
    rate: float | None = None
    spin: bool = True
    transfers: bool = True
    affinity: tuple[int, ...] | None = None
    loads: int | None = None
    processes: int = 3
    min_time: float | None = None
    max_time: float | None = None

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise UsageError(
                f"no scenario is called {self.scenario}",
                remedy=f"Choose one of {', '.join(SCENARIOS)}",
            )
        if not self.backends or len(set(self.backends)) != len(self.backends):
            raise UsageError("name one or more different backends")
        for name, least in (("batch", 1), ("queries", 1), ("loads", 1), ("settle", 0),
                            ("warmup", 0), ("processes", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be {least} or more, not {value}")
        if self.scenario == "multi" and self.batch not in (1, MULTI_SAMPLES):
            raise UsageError(f"the scenario multi always has {MULTI_SAMPLES} images in a query")
        rate = self.rate
        if rate is not None and (self.scenario != "rate" or not (math.isfinite(rate) and rate > 0)):
            raise UsageError("a rate must be a positive number, and needs the scenario rate")
        if self.scenario == "rate" and not self.transfers:
            raise UsageError("what waits for a query in a queue cannot leave transfers out")
        self._check_times()

    def _check_times(self) -> None:
        for name in ("min_time", "max_time"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} must be seconds, not {value}")
        if self.max_time is not None and self.max_time <= 0:
            raise UsageError("max_time must be more than 0 seconds")
        if (self.min_time or 0) > (self.max_time or math.inf):
            raise UsageError(
                f"at least {self.min_time} s and at most {self.max_time} s go ill together"
            )

    @property
    def samples(self) -> int:
        """Images in a query."""
        return MULTI_SAMPLES if self.scenario == "multi" else self.batch

    @property
    def warm_queries(self) -> int:
        """Uncounted queries of each subject first."""
        if self.warmup is not None:
            return self.warmup
        return max(10, (self.queries or ENOUGH_QUERIES) // 20)

    @property
    def warm_limit_s(self) -> float | None:
        """Seconds that warming up may take, of all subjects together."""
        return None if self.max_time is None else _WARM_SHARE * self.max_time


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is made of it.

    Attributes:
        queries: of each subject.
        rounds: blocks of each subject.
        loads: times that each model is loaded, in equal shares of the rounds.
        rate: queries a second, None in a closed loop.
    """

    queries: int
    rounds: int
    loads: int
    rate: float | None

    @classmethod
    def of(
        cls, settings: Settings, seconds: list[float], rate: float | None, load_s: float = 0.0
    ) -> Plan:
        """From the seconds that a query of each subject took while warming up.

        The time asked for is of all subjects together, and of queries alone.

        Args:
            load_s: seconds that it took to load all subjects once.
        """
        each = sum(seconds) if rate is None else len(seconds) / rate
        queries = settings.queries
        least = settings.min_time
        if queries is None:
            queries = ENOUGH_QUERIES
            if least is None:
                least = min(_MIN_TIME_S, settings.max_time or math.inf)
        queries = max(queries, math.ceil((least or 0.0) / each))
        if settings.max_time is not None:
            queries = max(1, min(queries, int(settings.max_time / each)))
        loads = settings.loads
        if loads is None:
            worth_s = max(queries * each, _LOADING_S)
            worth = int(min(worth_s / load_s if load_s else _LOADS, queries / _QUERIES_A_LOAD))
            loads = max(_FEWEST_LOADS, min(_LOADS, worth))
        loads = min(loads, queries)
        rounds = min(_ROUNDS, max(loads, queries // _QUERIES_A_BLOCK))
        return cls(
            queries=queries, rounds=max(loads, rounds - rounds % loads), loads=loads, rate=rate
        )

    def share(self, turn: int) -> int:
        """Queries of a block in round ``turn``."""
        return self.queries // self.rounds + (turn < self.queries % self.rounds)

    def starts_load(self, turn: int) -> bool:
        """Whether models are loaded again before round ``turn``; for the first they are there."""
        return turn > 0 and turn % (self.rounds // self.loads) == 0
