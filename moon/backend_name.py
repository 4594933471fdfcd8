"""What a user writes after ``--backend``, taken apart.

    onnxruntime                                  a backend
    onnxruntime:cuda                             with one of its providers
    onnxruntime:cuda,device_id=1                 and an option of the provider
    onnxruntime:cuda,session.intra_op.allow_spinning=0   and an entry of the session's configuration
    onnxruntime:cuda,fallback=cpu                and what to do where the provider cannot run

A key with a dot is an entry of ONNX Runtime's session configuration, as all of them are named;
a key without one is an option of the provider. A comma that no ``KEY=`` follows belongs to the
value before it: ``device_type=HETERO:GPU,CPU`` is one option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from moon.errors import UsageError

__all__ = ["FALLBACK", "BackendName"]

FALLBACK = "fallback"
_WITH_PROVIDERS = "onnxruntime"
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*\Z")
# Where the entries that ONNX Runtime reads begin; it ignores others without a word.
_AREAS = ("ep.", "memory.", "mlas.", "optimization.", "session.")


@dataclass(frozen=True)
class BackendName:
    """A backend, and how it is to run.

    Attributes:
        name: of the backend, such as ``onnxruntime``.
        provider: of ONNX Runtime's execution providers, by moon's short name; "" for its CPU
            provider and for other backends.
        options: of the provider.
        entries: of the session configuration.
        falls_back: go on with the CPU where the provider cannot run, or leaves layers to it.
        written: as the user wrote it.
    """

    name: str
    provider: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    falls_back: bool = False
    written: str = ""

    def __str__(self) -> str:
        return self.written or self.key

    @property
    def key(self) -> str:
        """What a gate is filed under: options have no part in it."""
        return f"{self.name}:{self.provider}" if self.provider else self.name

    @property
    def plain(self) -> bool:
        """Whether it is a backend's name and nothing else."""
        return not (self.provider or self.options or self.entries or self.falls_back)

    @classmethod
    def parse(cls, text: str) -> BackendName:
        """Read a name. Whether there is such a backend or provider is not asked here.

        Raises:
            UsageError: it is not of the form above; names what is wrong.
        """
        head, *pieces = text.strip().split(",")
        name, colon, provider = head.partition(":")
        if not name or (colon and not provider):
            raise UsageError(
                f"{text!r} names no backend",
                remedy="Write NAME, as onnxruntime or onnxruntime:cuda",
            )
        provider = "" if provider == "cpu" else provider
        found = _pairs(text, pieces)
        if (colon or found) and name != _WITH_PROVIDERS:
            raise UsageError(
                f"the backend {name} takes neither a provider nor options",
                remedy=f"Write --backend {name}, or {_WITH_PROVIDERS}:PROVIDER,KEY=VALUE",
            )
        fallback = found.pop(FALLBACK, None)
        if fallback not in (None, "cpu"):
            raise UsageError(
                f"{FALLBACK}={fallback} is not known",
                remedy=f"Write {FALLBACK}=cpu to go on with the CPU, or leave it out to stop",
            )
        entries = {key: found.pop(key) for key in list(found) if "." in key}
        for key in entries:
            _check_entry(key)
        return cls(name, provider, found, entries, fallback is not None, text.strip())


def _pairs(text: str, pieces: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    last = ""
    for piece in pieces:
        key, equals, value = piece.partition("=")
        key = key.strip()
        if equals and _KEY.match(key):
            if key in found:
                raise UsageError(f"{text!r} gives {key} twice", remedy="Give it once")
            found[key] = value.strip()
            last = key
        elif last:
            found[last] += f",{piece}"
        else:
            raise UsageError(
                f"{piece!r} in {text!r} is not KEY=VALUE", remedy="Write it as device_id=1"
            )
    return found


def _check_entry(key: str) -> None:
    if not key.startswith(_AREAS):
        raise UsageError(
            f"{key} is no entry of ONNX Runtime's session configuration",
            remedy=f"Such an entry begins with one of {', '.join(_AREAS)}; "
            "an option of a provider has no dot",
        )
