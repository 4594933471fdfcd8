"""Bad data, recipes, bundles, disks and installs: one line with its remedy, and nothing half done.

Each mistake is made through the commands it can reach; the rooms' own tests go deeper.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import KNOWN, Moon, Result, environment
from tests.cli.killed import killed_at

RECIPE = ["digits-cnn-rigl90-moon", "--device", "cpu"]
PHOTOS = "photos=sklearn:photos"
DAMAGE = {
    "truncated": ("is truncated", lambda data: data[: len(data) // 2]),
    "text": ("is not an image", lambda data: b"this is no image\n"),
    "empty": ("is empty (0 bytes)", lambda data: b""),
}


def refused(result: Result, *texts: str, code: int = 1) -> str:
    """The one line of a command that failed as it should; epochs before it do not count."""
    lines = [line for line in result.err.splitlines() if not line.startswith("moon: epoch ")]
    assert result.code == code, result.err
    assert len(lines) == 1, result.err
    assert lines[0].startswith("moon: error: ")
    assert lines[0].count(". ") >= 1, "a cause and a remedy"
    for text in texts:
        assert text in lines[0]
    return lines[0]


def readers(moon: Moon, bundle: Path, out: Path, source: object) -> Iterator[Result]:
    """The commands that read a SOURCE, which must leave ``out`` and the bundle as they are."""
    before = contents(bundle)
    settings = [f"data.train={source}", "data.val=8", "epochs=1"]
    yield moon("train", *RECIPE, "--set", *settings, "--out", out)
    yield moon("eval", bundle, "--id", source, "--far", PHOTOS, "--out", out)
    yield moon("calibrate", bundle, "--data", source)
    assert contents(bundle) == before
    assert not out.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arrays(path: Path, shape: tuple[int, ...] = (8, 8, 1), **labels: int) -> str:
    """An .npz of 64 images of classes 0 to 7, but for ``labels``: ``i17=42``, or ``every=3``."""
    images = np.random.default_rng(0).integers(0, 256, (64, *shape), dtype=np.uint8)
    wanted = np.arange(64) % 8
    for name, label in labels.items():
        wanted[slice(None) if name == "every" else int(name[1:])] = label
    np.savez(path, train_images=images, train_labels=wanted)
    return f"{path}#train"


@pytest.mark.parametrize("kind", ["missing", "empty", "no images"])
def test_missing_or_empty_data_folder(moon: Moon, bundle: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    if kind != "missing":
        (folder / "ant").mkdir(parents=True)
    if kind == "no images":
        (folder / "ant" / "notes.txt").write_text("none yet")
    text = "there is no file or folder" if kind == "missing" else "no images in"
    for result in readers(moon, bundle, tmp_path / "out", folder):
        refused(result, f"{text} {folder}")
    words = ["--id", KNOWN, "--far", f"x={folder}", "--out", tmp_path / "out"]
    refused(moon("eval", bundle, *words), f"{text} {folder}")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_truncated_or_non_image_file_in_the_data(
    moon: Moon, bundle: Path, digits_folder: Path, tmp_path: Path, damage: str
) -> None:
    text, change = DAMAGE[damage]
    for label in "01234567":
        shutil.copytree(digits_folder / label, tmp_path / "data" / label)
    victim = sorted((tmp_path / "data" / "3").iterdir())[5]
    victim.write_bytes(change(victim.read_bytes()))
    for result in readers(moon, bundle, tmp_path / "out", tmp_path / "data"):
        refused(result, f"{victim} {text}")
    words = ["--id", KNOWN, "--near", f"x={tmp_path / 'data'}", "--out", tmp_path / "out"]
    refused(moon("eval", bundle, *words), f"{victim} {text}")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_truncated_or_non_image_file_to_predict(
    moon: Moon, exported: Path, images: list[Path], tmp_path: Path, damage: str
) -> None:
    text, change = DAMAGE[damage]
    victim = tmp_path / "victim.png"
    victim.write_bytes(change(images[0].read_bytes()))
    refused(moon("predict", exported, victim), f"1 of 1 image could not be read: {victim} {text}")
    both = moon("predict", exported, victim, tmp_path / "none.png", images[0], "--json")
    line = refused(both, "2 of 3 images could not be read; the first:", f"{victim} {text}")
    assert line.endswith("The others are decided.")
    assert [("error" in item) for item in both.json["predictions"]] == [True, True, False]


@pytest.mark.parametrize("shape", [(8, 8, 3), (16, 16, 1), (8, 8)])
def test_a_wrong_size_or_channel_count(
    moon: Moon, bundle: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    source = arrays(tmp_path / "x.npz", shape)
    results = list(readers(moon, bundle, tmp_path / "out", source)) if len(shape) == 3 else []
    for result in results:
        refused(result, "must have the shape [8, 8, 1]", f"got {list(shape)}")
    floats = np.zeros((64, 8, 8, 1), np.float32)
    np.savez(tmp_path / "f.npz", train_images=floats, train_labels=np.arange(64) % 8)
    for result in readers(moon, bundle, tmp_path / "out", f"{tmp_path / 'f.npz'}#train"):
        refused(result, "train_images is float32", "must be uint8")


def test_labels_out_of_range(moon: Moon, bundle: Path, tmp_path: Path) -> None:
    beyond = readers(moon, bundle, tmp_path / "out", arrays(tmp_path / "b.npz", i17=42))
    refused(next(beyond), "b.npz#train[17] has the label 42", "without a gap")
    for result in beyond:
        refused(result, "b.npz#train[17] has the label 42", "the model has 8 classes")
    for result in readers(moon, bundle, tmp_path / "out", arrays(tmp_path / "n.npz", i9=-7)):
        refused(result, "item 9 of", "has the label -7, but that is no class")
    unknown = arrays(tmp_path / "u.npz", i5=-1)
    words = ["--set", f"data.train={unknown}", "--out", tmp_path / "out"]
    refused(moon("train", *RECIPE, *words), "u.npz#train[5] has no known label", "{label>=0}")
    # By name: the eights and nines are no in-distribution images of this model.
    text = ("106 of 539 items", "classes the bundle does not know (8, 9)", "{label in 0..7}")
    refused(moon("calibrate", bundle, "--data", "sklearn:digits#test"), *text)
    words = ["--id", "sklearn:digits#test", "--out", tmp_path / "out"]
    refused(moon("eval", bundle, *words), *text)


@pytest.mark.parametrize("label", [0, 3])
def test_one_class_only(moon: Moon, digits_folder: Path, tmp_path: Path, label: int) -> None:
    shutil.copytree(digits_folder / str(label), tmp_path / "data" / str(label))
    for source in (tmp_path / "data", arrays(tmp_path / "one.npz", every=label)):
        words = ["--set", f"data.train={source}", "--out", tmp_path / "out"]
        refused(moon("train", *RECIPE, *words), f"one class only, {label}", "at least two classes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("sparsty=0.9", "unknown recipe key sparsty", "Did you mean sparsity"),
        ("moon.w_finl=1", "unknown recipe key moon.w_finl", "Did you mean moon.w_final"),
        ("zzz=1", "unknown recipe key zzz", "Known keys: "),
        *((f"sparsity={s}", f"sparsity is {float(s)}", "within [0, 1)")
          for s in ("1", "1.5", "-0.1", "nan", "inf")),
    ],
)  # fmt: skip
def test_an_unknown_recipe_key_and_sparsity_outside_its_range(
    moon: Moon, tmp_path: Path, text: str, cause: str, remedy: str
) -> None:
    out = tmp_path / "out"
    refused(moon("train", *RECIPE, "--set", text, "--out", out), cause, remedy, code=2)
    key, value = text.rsplit("=")[0].split(".")[-1], text.rsplit("=")[1]
    head, moon_table = moon("recipes", RECIPE[0]).out.split("[moon]")
    head = "\n".join(line for line in head.splitlines() if not line.startswith(f"{key} ="))
    wrong = f"{key} = {value}\n"
    tables = f"[moon]\n{wrong}" if "." in text.split("=")[0] else "[moon]"
    first = wrong if tables == "[moon]" else ""
    (tmp_path / "r.toml").write_text(f"{first}{head}\n{tables}{moon_table}")
    refused(moon("train", tmp_path / "r.toml", "--out", out), cause, remedy, code=2)
    assert not out.exists()


def test_nan_loss_names_the_step_and_keeps_the_last_good_state(moon: Moon, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *RECIPE, "--set", "epochs=2", "moon.w_final=1e30"]
    line = refused(moon(*words, "--out", run), "the loss became", "(epoch 2)", "at step ")
    assert "Set a lower lr than 0.1" in line
    assert f"{run} keeps epoch 1" in line
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert line.split("moon: error: ")[1].split(". ")[0] in (run / "log.txt").read_text()
    again = moon(*words, "--out", run, "--resume")
    assert refused(again) == line
    assert "epoch 1/2" not in again.err
    refused(moon("export", run, "--out", tmp_path / "b"), "has not finished", "--resume")
    first = moon("train", *RECIPE, "--set", "lr=1e30", "epochs=1", "--out", tmp_path / "first")
    refused(first, "the loss became nan at step 2 (epoch 1)", "Set a lower lr than 1e+30")
    lower = moon("train", *RECIPE, "--set", "lr=0.1", "epochs=1", "--out", tmp_path / "first")
    assert lower.code == 0


def test_a_killed_train_looks_unfinished_and_goes_on(moon: Moon, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *RECIPE, "--set", "epochs=12", "--out", str(run)]
    command = [sys.executable, "-m", "moon", *words]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert child.stderr is not None
    assert any("epoch 2/12" in line for line in child.stderr)
    child.kill()
    child.stderr.close()
    assert child.wait() == -signal.SIGKILL
    assert not (run / "checkpoint.json").exists()
    refused(moon("export", run, "--out", tmp_path / "b"), f"{run} has not finished", "--resume")
    refused(moon("inspect", run), "has not finished", "--resume", code=2)
    refused(moon(*words), "already holds a run. Go on with it by --resume", code=2)
    resumed = moon(*words, "--resume")
    assert resumed.code == 0
    assert "epoch 1/12" not in resumed.err
    assert "epoch 12/12" in resumed.err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_export_leaves_no_bundle_or_a_whole_one(
    moon: Moon, run: Path, tmp_path: Path
) -> None:
    script = "from tests.cli.killed import main; main()"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(run), str(tmp_path)]
    done = subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    assert statuses == dict.fromkeys(killed_at(tmp_path), -signal.SIGKILL)
    whole = {spot: out.exists() for spot, out in killed_at(tmp_path).items()}
    assert not any(whole[spot] for spot in whole if not spot.startswith("renamed"))
    assert any(whole.values())
    for out in killed_at(tmp_path).values():
        if out.exists():
            assert moon("verify", out).code == 0
    out = killed_at(tmp_path)["write 3"]
    assert moon("export", run, "--out", out).code == 0
    assert moon("verify", out).code == 0


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """A disk that takes no file above ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_leaves_nothing_half_written(
    moon: Moon, run: Path, bundle: Path, tmp_path: Path
) -> None:
    before, out = contents(bundle), tmp_path / "out"
    words = ["train", *RECIPE, "--set", "epochs=1", "--out", out]
    texts = ("could not write", "File too large", "another disk")
    with file_limit(9000):
        refused(moon(*words), f"could not write {out / 'last' / 'state.pt'}: ", *texts)
        refused(moon("export", run, "--out", tmp_path / "b"), f"write {tmp_path / 'b'}: ", *texts)
        refused(moon("calibrate", bundle, "--data", KNOWN), f"could not write {bundle}: ", *texts)
        report = ["--id", KNOWN, "--out", tmp_path / "report"]
        where = f"could not write {tmp_path / 'report' / 'observed'}/"
        refused(moon("eval", bundle, *report), where, *texts)
    assert contents(bundle) == before
    assert {path.name for path in tmp_path.iterdir()} == {bundle.name, "out", "report"}
    assert {path.name for path in out.iterdir()} == {"last", "log.txt", "recipe.toml"}
    assert not list((out / "last").iterdir())
    assert not list((tmp_path / "report" / "observed").iterdir())
    assert len(list((tmp_path / "report").iterdir())) == 1
    assert moon(*words, "--resume").code == 0
