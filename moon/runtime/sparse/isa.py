"""Instruction sets: which this CPU has, and how LLVM is told to use one.

LLVM's default is the oldest CPU of an architecture, so that the host's name and every one of its
features are passed. A narrower set is the same CPU with features switched off: what one machine
can do at most, it can also run as a lesser one would.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, Literal, get_args

from moon.errors import BackendError, MissingExtraError, UsageError

__all__ = ["VARIABLE", "Isa", "available", "choose", "llvm", "target"]

Isa = Literal["avx512", "avx2", "sse", "neon", "native"]
VARIABLE = "MOON_ENGINE_ISA"
# The features a set cannot do without.
_NEEDS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"),
    "avx2": ("avx2", "fma"),
    "sse": ("sse2",),
}
# What a narrower set goes without, by how the names begin. Some, such as "+vaes", bring AVX along.
_WITHOUT: dict[str, tuple[str, ...]] = {
    "avx512": (),
    "avx2": ("avx512", "avx10", "amx", "evex512"),
    "sse": (
        "avx", "amx", "evex512", "fma", "f16c", "xop", "vaes", "vpclmulqdq", "sha512", "sm3", "sm4",
    ),
}  # fmt: skip
# Last in the list, so that nothing before them switches the wider registers on again. Without the
# first, LLVM halves vectors of 512 bits on CPUs that slow down with them; the kernels gain anyhow.
_LAST = {"avx512": ("-prefer-256-bit",), "avx2": ("-avx512f",), "sse": ("-avx",)}


@lru_cache(maxsize=1)
def llvm() -> Any:
    """The module ``llvmlite.binding``, ready to compile for this machine.

    Raises:
        MissingExtraError: llvmlite is not installed.
        BackendError: it cannot compile for this machine, or the system forbids new code.
    """
    try:
        from llvmlite import binding
    except ImportError as error:
        raise MissingExtraError("llvmlite", "engine", "the sparse CPU engine") from error
    try:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        binding.check_jit_execution()
    except (OSError, RuntimeError) as error:
        raise BackendError(
            f"the sparse CPU engine cannot make code on this system: {error}",
            remedy="Use --backend onnxruntime",
        ) from error
    return binding


@lru_cache(maxsize=1)
def available() -> tuple[str, ...]:
    """The sets of this CPU, the widest first; ``("native",)`` on an architecture without a name.

    Raises:
        MissingExtraError, BackendError: as `llvm`.
    """
    architecture = llvm().get_process_triple().split("-")[0]
    if architecture in ("aarch64", "arm64"):
        return ("neon",)
    if architecture != "x86_64":
        return ("native",)
    has = _features()
    return tuple(isa for isa, needs in _NEEDS.items() if all(has.get(name) for name in needs))


def choose(isa: str = "native") -> str:
    """The set to use: ``isa``, for "native" what MOON_ENGINE_ISA says, or the widest there is.

    Returns:
        One of :func:`available`.

    Raises:
        UsageError: there is no set of that name.
        BackendError: this CPU does not have it; or as `llvm`.
    """
    wanted = isa if isa != "native" else os.environ.get(VARIABLE, "").strip() or "native"
    if wanted not in get_args(Isa):
        raise UsageError(
            f"no instruction set is called {wanted!r}",
            remedy=f"Choose one of {', '.join(get_args(Isa))}"
            + ("" if wanted == isa else f" for {VARIABLE}"),
        )
    found = available()
    if wanted == "native":
        return found[0]
    if wanted not in found:
        raise BackendError(
            f"this CPU cannot run {wanted}", remedy=f"It has {', '.join(found)}; native takes best"
        )
    return wanted


def target(isa: str = "native") -> tuple[str, str]:
    """The CPU's name and its features, as LLVM spells them.

    Raises:
        UsageError, BackendError, MissingExtraError: as `choose`.
    """
    chosen = choose(isa)
    without = _WITHOUT.get(chosen, ())
    features = [
        ("+" if has and not name.startswith(without or ("?",)) else "-") + name
        for name, has in sorted(_features().items())
    ]
    return llvm().get_host_cpu_name(), ",".join([*features, *_LAST.get(chosen, ())])


def _features() -> dict[str, bool]:
    try:
        return dict(llvm().get_host_cpu_features())
    except RuntimeError:  # LLVM cannot tell on this system; the CPU's name has to do
        return {}
