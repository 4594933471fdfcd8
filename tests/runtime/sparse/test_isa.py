from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("llvmlite")
from llvmlite import ir

from moon.errors import BackendError, MissingExtraError, UsageError
from moon.runtime.sparse import isa

ALL = isa.available()
X86 = "sse" in ALL


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.VARIABLE, raising=False)


def assembly(name: str) -> str:
    """Assembler of adding up products of sixteen floats, as a set spells it."""
    vector, pointer = ir.VectorType(ir.FloatType(), 16), ir.PointerType()
    module = ir.Module("m")
    fma = ir.Function(module, ir.FunctionType(vector, [vector] * 3), "llvm.fmuladd.v16f32")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), "k")
    builder = ir.IRBuilder(function.append_basic_block())
    x = builder.load(function.args[0], typ=vector, align=64)
    builder.store(builder.call(fma, [x, x, x]), function.args[0], align=64)
    builder.ret_void()
    cpu, features = isa.target(name)
    target = isa.llvm().Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    return str(machine.emit_assembly(isa.llvm().parse_assembly(str(module))))


def test_sets_are_the_widest_first() -> None:
    order = ["avx512", "avx2", "sse", "neon", "native"]
    assert ALL and list(ALL) == sorted(ALL, key=order.index)


@pytest.mark.parametrize("name", ALL)
def test_code_uses_just_the_registers_of_its_set(name: str) -> None:
    found = {kind for kind in ("xmm", "ymm", "zmm") if re.search(rf"%{kind}\d", assembly(name))}
    if X86:
        assert found == {{"avx512": "zmm", "avx2": "ymm", "sse": "xmm"}[name]}
        assert ("vfmadd" in assembly(name)) == (name != "sse")
    else:
        assert "fmla" in assembly(name) or name == "native"


@pytest.mark.skipif(not X86, reason="not an x86 CPU")
def test_a_narrower_set_has_nothing_of_a_wider_one() -> None:
    on = {name: re.findall(r"\+([^,]+)", isa.target(name)[1]) for name in ALL}
    assert not [feature for feature in on["sse"] if "avx" in feature or "fma" in feature]
    assert "sse2" in on["sse"]
    if "avx2" in ALL:
        assert {"avx2", "fma"} < set(on["avx2"])
        assert not [feature for feature in on["avx2"] if "avx512" in feature or "avx10" in feature]


def test_native_is_the_widest_unless_the_variable_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isa.choose() == isa.choose("native") == ALL[0]
    monkeypatch.setenv(isa.VARIABLE, ALL[-1])
    assert isa.choose() == ALL[-1]
    assert isa.choose(ALL[0]) == ALL[0], "what a caller asks for by name stays"
    monkeypatch.setenv(isa.VARIABLE, "")
    assert isa.choose() == ALL[0]
    monkeypatch.setenv(isa.VARIABLE, "mmx")
    with pytest.raises(UsageError, match=r"called 'mmx'.*avx512, avx2.*for MOON_ENGINE_ISA"):
        isa.choose()


def test_a_set_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=rf"cannot run neon.*{ALL[0]}" if X86 else "cannot run"):
        isa.choose("neon" if X86 else "sse")
    with pytest.raises(UsageError, match="no instruction set is called 'avx'"):
        isa.target("avx")


def test_a_cpu_without_fma_gets_the_plain_set(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"sse2": True, "avx2": True, "fma": False, "avx512f": True}
    monkeypatch.setattr(isa, "_features", lambda: features)
    fake = type("Llvm", (), {"get_process_triple": staticmethod(lambda: "x86_64-unknown-linux")})
    monkeypatch.setattr(isa, "llvm", lambda: fake)
    assert isa.available.__wrapped__() == ("sse",)


@pytest.fixture
def forgetful() -> Iterator[None]:
    isa.llvm.cache_clear()
    yield
    isa.llvm.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_a_missing_llvmlite_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    with pytest.raises(MissingExtraError, match=r"llvmlite.*moon-toolkit\[engine\]"):
        isa.llvm()


@pytest.mark.usefixtures("forgetful")
def test_a_system_that_forbids_new_code_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from llvmlite import binding

    def forbid() -> None:
        raise OSError(13, "cannot allocate executable memory")

    monkeypatch.setattr(binding, "check_jit_execution", forbid)
    with pytest.raises(BackendError, match=r"executable memory.*--backend onnxruntime"):
        isa.llvm()


def test_importing_these_modules_imports_no_llvmlite() -> None:
    code = (
        "import sys, moon.runtime, moon.runtime.sparse.isa, moon.runtime.sparse.cache\n"
        "import moon.runtime.sparse.jit\n"
        "assert not [name for name in sys.modules if name.startswith('llvmlite')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
