"""``python -m moon`` is the ``moon`` command."""

from __future__ import annotations

import sys

from moon.cli import main

if __name__ == "__main__":
    sys.exit(main())
