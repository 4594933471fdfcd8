"""Whether a SOURCE still holds what it held, by content: not by where it lies, or its dates."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from moon.data.spec import parse
from moon.files import sha256_file

# Bytes in a folder up to which its files are read; names and sizes have to do above.
READ = 1 << 31


@cache
def fingerprint(source: str) -> str:
    """SHA-256 over a SOURCE's files, and over what it chooses of them.

    Of a package's set (sklearn:, torchvision:), which the package vouches for, over its name.
    """
    base = parse(source).base
    digest = hashlib.sha256(source.strip()[len(base) :].encode())
    if base.startswith("torchvision:"):
        digest.update(base.partition("@")[0].encode())
        return digest.hexdigest()
    # FILE.txt@ROOT is two places.
    for part in [base] if _path(base).exists() else base.split("@"):
        path = _path(part)
        if path.is_dir():
            _add_folder(digest, path)
        else:
            digest.update((sha256_file(path) if path.is_file() else part).encode())
    return digest.hexdigest()


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _add_folder(digest: hashlib._Hash, folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    read = sum(sizes) <= READ
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"{path.relative_to(folder)}\n{size}\n".encode())
        if read:
            digest.update(sha256_file(path).encode())
