"""From LLVM IR to the addresses of functions.

    Jit.addresses({key: build})  ->  loaded before?  in the cache?  build, optimise, compile
                                     all objects into one engine, for the life of the process

A function is compiled alone and may call nothing outside itself: what is loaded is what was
checked, and an object depends on nothing but its key.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from moon.errors import BackendError
from moon.files import canonical_json
from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.elf import read_symbols
from moon.runtime.sparse.isa import choose, llvm, target

__all__ = ["Build", "Jit", "fingerprint"]

# Adds the function to an empty llvmlite.ir.Module.
Build = Callable[[Any], None]

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
# Before LLVM would make calls to memset and the like out of loops.
_ALONE = '"no-builtins"'
_lock = threading.RLock()
_addresses: dict[bytes, int] = {}
_kept: list[Any] = []

if hasattr(os, "register_at_fork"):
    # A child that is forked in the middle of a compilation would wait for it for ever.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def fingerprint(*modules: str) -> str:
    """A hash of the source of modules, by their dotted names; they are not imported.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    digest = hashlib.sha256()
    for name in sorted(modules):
        spec = find_spec(name)
        read = getattr(spec.loader, "get_data", None) if spec is not None else None
        if spec is None or read is None or spec.origin is None:
            raise ModuleNotFoundError(f"no source of {name}", name=name)
        data: bytes = read(spec.origin)
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(data).digest())
    return digest.hexdigest()


class Jit:
    """Compiles functions for one instruction set. Safe for several threads; one compiles at a time.

    Args:
        isa: the set, see :data:`moon.runtime.sparse.isa.Isa`.
        cache: keeps object code between processes; None for none.
        fingerprint: of all that decides what a key's function is, but for its key; see
            :func:`fingerprint`. Equal ones share their code.

    Attributes:
        isa: the set in use, never "native" where it has a name.
        cpu, features: as LLVM spells them.

    Raises:
        UsageError, BackendError, MissingExtraError: as :func:`moon.runtime.sparse.isa.choose`.
    """

    def __init__(
        self, isa: str = "native", cache: Cache | None = None, *, fingerprint: str
    ) -> None:
        self.isa = choose(isa)
        self.cpu, self.features = target(self.isa)
        self._cache = cache
        self._about = [
            _own(), self.isa, self.cpu, self.features, *_versions(), fingerprint
        ]  # fmt: skip
        self._known: dict[str, int] = {}

    def address(self, key: str, build: Build) -> int:
        """`addresses` of one function."""
        known = self._known.get(key)
        return self.addresses({key: build})[key] if known is None else known

    def addresses(self, builds: Mapping[str, Build]) -> dict[str, int]:
        """The address of each function, for as long as the process lives.

        Args:
            builds: by the function's name, a C identifier, what adds it to an empty module. Called
                only where the function is neither loaded nor in the cache.

        Raises:
            BackendError: LLVM refuses what was built; or it lacks the function, or calls another.
            ValueError: a name is no C identifier.
        """
        missing = {key: build for key, build in builds.items() if key not in self._known}
        if missing:
            with _lock:
                self._load(missing)
        return {key: self._known[key] for key in builds}

    def _load(self, builds: Mapping[str, Build]) -> None:
        digests = {key: self._digest(key) for key in builds}
        # Another Jit may have loaded them, or another thread while this one waited.
        fresh = [key for key, digest in digests.items() if digest not in _addresses]
        objects = {key: self._object(key, digests[key], builds[key]) for key in fresh}
        if objects:
            found = self._link(objects)
            _addresses.update((digests[key], address) for key, address in found.items())
        self._known.update((key, _addresses[digest]) for key, digest in digests.items())

    def _digest(self, key: str) -> bytes:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no name for a function")
        return hashlib.sha256(canonical_json([key, *self._about])).digest()

    def _object(self, key: str, digest: bytes, build: Build) -> bytes:
        if self._cache is not None:
            kept = self._cache.get(digest)
            if kept is not None and not _fault(key, kept):
                return kept
        made = self._compile(key, build)
        if fault := _fault(key, made):
            raise BackendError(f"the kernel {key} {fault}", remedy="Use --backend onnxruntime")
        if self._cache is not None:
            self._cache.put(digest, made)
        return made

    def _compile(self, key: str, build: Build) -> bytes:
        from llvmlite import ir

        machine = _machine(self.cpu, self.features)
        written = ir.Module(key)
        written.triple, written.data_layout = machine.triple, str(machine.target_data)
        build(written)
        for function in written.functions:
            if not function.is_declaration:
                # Past the check of llvmlite, which knows only the attributes without a quote.
                set.add(function.attributes, _ALONE)
        try:
            module = llvm().parse_assembly(str(written))
            module.verify()
            _optimise(module, machine)
            return bytes(machine.emit_object(module))
        except RuntimeError as error:
            raise BackendError(
                f"LLVM refuses the kernel {key}: {error}", remedy="Use --backend onnxruntime"
            ) from error

    def _link(self, objects: Mapping[str, bytes]) -> dict[str, int]:
        binding = llvm()
        # A machine of its own: the engine becomes its owner.
        machine = _new_machine(self.cpu, self.features)
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        for data in objects.values():
            engine.add_object_file(binding.object_file.ObjectFileRef.from_data(data))
        engine.finalize_object()
        found = {key: int(engine.get_function_address(key)) for key in objects}
        # Never freed, not even as the interpreter ends: a thread may be running the code.
        engine.detach()
        _kept.append((engine, objects))
        if not all(found.values()):
            raise BackendError("LLVM loaded a kernel without an address")
        return found


def _fault(key: str, data: bytes) -> str:
    """What forbids to load an object; LLVM would end the process."""
    try:
        symbols = read_symbols(data)
    except ValueError as error:
        return f"cannot be loaded: {error}"
    if symbols.missing:
        return f"calls {', '.join(sorted(symbols.missing))}, which is not in it"
    if key not in symbols.functions:
        return "has no function of that name"
    also = (symbols.functions | symbols.others) - {key}
    return f"shows {', '.join(sorted(also))} to others as well" if also else ""


@lru_cache(maxsize=1)
def _own() -> str:
    """What another way of compiling here changes."""
    return fingerprint(__name__)


def _versions() -> list[str]:
    import llvmlite

    binding = llvm()
    version = ".".join(str(part) for part in binding.llvm_version_info)
    return [binding.get_process_triple(), version, llvmlite.__version__]


def _optimise(module: Any, machine: Any) -> None:
    """O2 in 3/4 of its time: kernels are vectors and unrolled already, so nothing need do that."""
    binding = llvm()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_interleaving = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)


@lru_cache(maxsize=8)
def _machine(cpu: str, features: str) -> Any:
    return _new_machine(cpu, features)


def _new_machine(cpu: str, features: str) -> Any:
    binding = llvm()
    # Code may lie far from its constants: the large code model, which is that of jit=True.
    return binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
        cpu=cpu, features=features, opt=3, jit=True
    )
