from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moon import files
from moon.errors import MoonError, UsageError
from moon.files import (
    canonical_json,
    replacing_directory,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_makes_parents_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "é")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["b.txt"]


def test_write_json_is_indented_and_ends_in_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_cannot_hold(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", value)
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)
    assert names(tmp_path) == []


def test_a_failed_rename_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(MoonError, match=r"could not write .*x: No space left.*Free some space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_file_size_limit_leaves_no_half_file(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from moon.errors import MoonError
from moon.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(sys.argv[1], bytes(5000))
except MoonError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "big: File too large. Raise the file size limit" in done.stdout
    assert names(tmp_path) == []


def test_what_cannot_be_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoonError, match="Is a directory"):
        write_text(tmp_path, "x")
    with pytest.raises(MoonError, match="part of the path is a file"):
        write_text(tmp_path / "file" / "x", "x")
    with pytest.raises(MoonError, match="shorter name"):
        write_text(tmp_path / ("n" * 300), "x")


def test_a_link_keeps_pointing_and_keeps_permissions(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "target").chmod(0o600)
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_written_to_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    write_text(pipe, "through")
    assert reader.communicate()[0] == b"through"
    assert pipe.is_fifo()


def test_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with replacing_directory(out, force=False) as aside:
        assert aside.parent == out.parent
        (aside / "sub").mkdir()
        (aside / "sub" / "f").write_text("1")
        assert not out.exists()
    assert (out / "sub" / "f").read_text() == "1"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("atomic", [True, False])
def test_force_replaces_all_of_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    if not atomic:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    with replacing_directory(out, force=True) as aside:
        (aside / "new").write_text("")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_an_exception_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    with pytest.raises(KeyError), replacing_directory(out, force=True) as aside:
        (aside / "new").write_text("")
        raise KeyError
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_an_existing_folder_needs_force_unless_empty(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with replacing_directory(out, force=False) as aside:
        (aside / "f").write_text("")
    with (
        pytest.raises(UsageError, match=r"out exists\. Choose another --out or pass --force"),
        replacing_directory(out, force=False),
    ):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="not a folder"),
        replacing_directory(tmp_path / "file", force=True),
    ):
        pass


def test_a_marker_protects_other_folders_from_force(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("")
    with (
        pytest.raises(UsageError, match=r"no manifest\.json"),
        replacing_directory(home, force=True, marker="manifest.json"),
    ):
        pass
    assert names(home) == ["thesis.tex"]
    (home / "manifest.json").write_text("")
    with replacing_directory(home, force=True, marker="manifest.json"):
        pass
    assert names(home) == []


def test_hashes_and_canonical_json(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
    assert canonical_json({"b": 1.5, "a": "é"}) == b'{"a":"\\u00e9","b":1.5}'
    assert json.loads(canonical_json({"b": 1.5, "a": "é"})) == {"a": "é", "b": 1.5}
