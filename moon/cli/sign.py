"""``moon sign``: say who made a bundle."""

from __future__ import annotations

__all__ = ["sign"]

from pathlib import Path
from typing import Annotated

import typer

from moon.cli.console import output, print_json
from moon.cli.options import AsJson, Debug


def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle to sign.")],
    key: Annotated[
        Path,
        typer.Option(
            "--key",
            metavar="PRIVATE.pem",
            help="An Ed25519 key: openssl genpkey -algorithm ed25519 -out private.pem",
        ),
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Sign a bundle, so that verify, predict and serve with --key PUBLIC.pem take no other.

    The signature is of manifest.json, which holds a hash of every file. Calibrating, tuning or
    adding an engine changes it: sign again afterwards.
    """
    from moon.signature import sign as run

    fingerprint = run(bundle, key)
    if as_json:
        print_json({"bundle": str(bundle), "key": fingerprint})
    else:
        line = f"{bundle} is signed with the key {fingerprint[:16]}"
        output().print(line, soft_wrap=True, markup=False)
