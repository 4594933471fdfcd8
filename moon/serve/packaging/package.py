"""A folder with a bundle and the files to run its service on other machines."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from moon import __version__
from moon.bundle import Bundle
from moon.errors import BundleError, MissingExtraError, UsageError
from moon.files import replacing_directory

__all__ = ["package"]

_MARKER = "nginx.conf"
_GRACE_SECONDS, _FINISH_SECONDS = 15, 30
_LONGEST_NAME = 50  # of 63 that Kubernetes allows; others are made of it
# registry.example:5000/team/name:tag or name@sha256:...
_IMAGE = re.compile(r"[a-z0-9][\w.:/@-]*[\w]", re.ASCII)
_TEMPLATES = Path(__file__).parent / "templates"
_RENAMED = {"dockerignore": ".dockerignore", "service.txt": "service.py"}
_BUNDLES = ("bundle", "bento/bundle")


def package(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image: str | None = None,
    replicas: int = 2,
    force: bool = False,
) -> list[str]:
    """Write the folder.

    Args:
        bundle: a calibrated bundle.
        out: the folder to make.
        image: of the container, as it will be pushed; default the model's name with the first
            digits of its version as the tag.
        replicas: at least so many pods; five times as many at most.
        force: replace a folder that this made before.

    Returns:
        Relative paths of what was written, bundles as one.

    Raises:
        BundleError: the bundle is damaged or not calibrated.
        UsageError: ``out`` exists, or ``image`` or ``replicas`` is none.
    """
    opened = Bundle.open(bundle)
    gate = opened.gate()
    if gate is None:
        raise BundleError(
            f"{opened.path} is not calibrated, so a service of it would refuse to start",
            remedy=f"Run moon calibrate {opened.path} --data SOURCE",
        )
    manifest = opened.manifest
    slug = _slug(manifest.name)
    image = image or f"{slug}:{manifest.version.removeprefix('sha256:')[:12]}"
    if not _IMAGE.fullmatch(image):
        raise UsageError(
            f"{image!r} is no name of an image",
            remedy="Write --image registry.example/team/name:tag",
        )
    if replicas < 1:
        raise UsageError(f"--replicas must be 1 or more, not {replicas}")
    what = f"rejects {gate.alpha:g}" if gate.alpha is not None else f"has the method {gate.method}"
    values = {
        "name": _one_word(manifest.name),
        "slug": slug,
        "version": manifest.version,
        "image": image,
        "replicas": replicas,
        "grace": _GRACE_SECONDS,
        "finish": _FINISH_SECONDS,
        "moon": __version__,
        "gate": what,
    }
    with replacing_directory(out, force=force, marker=_MARKER) as aside:
        written = [_render(path, name, aside, values) for path, name in _templates()]
        for place in _BUNDLES:
            shutil.copytree(opened.path, aside / place)
            Bundle.open(aside / place)  # what was copied is what was checked
            written.append(place)
        (aside / "wheels").mkdir()
        (aside / "wheels" / "README").write_text(
            "Wheels that pip takes before those of an index.\n", encoding="utf-8"
        )
    return sorted(written)


def _slug(name: str) -> str:
    """A name as Kubernetes takes it."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_LONGEST_NAME].strip("-")
    if not slug:
        return "moon"
    return slug if slug[0].isalpha() else f"moon-{slug}"


def _one_word(name: str) -> str:
    """A name that can stand in a comment and between quotes."""
    return re.sub(r"[^\w .:+-]", "_", name, flags=re.ASCII)


def _templates() -> list[tuple[Path, str]]:
    """Every template, and what becomes of it."""
    found = []
    for path in sorted(_TEMPLATES.rglob("*")):
        if path.is_file():
            target = path.with_name(_RENAMED.get(path.name, path.name))
            found.append((path, target.relative_to(_TEMPLATES).as_posix()))
    return found


def _render(template: Path, name: str, folder: Path, values: dict[str, Any]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "serve", "moon package") from error
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    text = environment.from_string(template.read_text(encoding="utf-8")).render(values)
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return name
