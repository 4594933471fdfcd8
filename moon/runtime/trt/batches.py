"""Batches of any size, cut into those that an engine was built for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moon.errors import BackendError

__all__ = ["Profile"]


@dataclass(frozen=True)
class Profile:
    """How many rows an engine takes at once.

    Attributes:
        least: fewest.
        best: what it was tuned for.
        most: most.
    """

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise BackendError(
                f"the engine's profile is for {self.least}, {self.best} and {self.most} rows, "
                "which is no range",
                remedy="Build the engine again",
            )

    def pieces(self, rows: int) -> list[slice]:
        """Slices that cover ``rows`` in order, each of at most :attr:`most`.

        All but the last are as large as can be: shapes that come again are run by graphs that
        were captured, and by kernels that were specialised.
        """
        return [slice(start, min(start + self.most, rows)) for start in range(0, rows, self.most)]

    def padded(self, rows: int) -> int:
        """How many rows are run for so many: at least :attr:`least`."""
        return max(rows, self.least)

    def fill(self, target_R: NDArray[np.generic], rows_N: NDArray[np.generic]) -> int:
        """Put rows, [N, ...], into the start of ``target_R``; the last one again where too few.

        Rows do not depend on each other, so that copies change nothing and are dropped again.

        Returns:
            How many rows of the target were filled.
        """
        count, total = len(rows_N), self.padded(len(rows_N))
        np.copyto(target_R[:count], rows_N)
        target_R[count:total] = rows_N[-1]
        return total
