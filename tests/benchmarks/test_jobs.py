"""benchmarks/jobs.py and pool.py: side by side, one failure alone, nothing lost when stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from moon.trainer.recipes import find_recipe

WORKER = """\
import json, os, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
seed = job["recipe"]["seed"]
print("epoch 1/2", flush=True)
Path(sys.argv[1]).with_name("pid").write_text(str(os.getpid()))
if seed == 1:
    sys.exit("no such luck.")
time.sleep(0.5 if seed < 9 else 60)
"""


@pytest.fixture
def jobs(scripts):
    scripts["fingerprint"].fingerprint.cache_clear()
    return scripts["jobs"]


@pytest.fixture
def pool(scripts, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(scripts["pool"], "WORKER", tmp_path / "worker.py")
    return scripts["pool"]


def job(jobs, out, seed, **options):
    recipe = find_recipe("digits-cnn-dense").override([f"seed={seed}"])
    return jobs.Job(name=f"run-seed{seed}", recipe=recipe, out=out, train_as="x", **options)


def test_one_failure_stops_no_other(jobs, pool, tmp_path):
    said = []
    failures = pool.Pool(2, said.append).run([job(jobs, tmp_path, seed) for seed in range(4)])
    assert failures == {"run-seed1": "no such luck."}
    assert sum(line.endswith(": done") for line in said) == 3
    assert "[2/4] run-seed1: FAILED: no such luck." in said
    assert any(line == "[1/4] run-seed0: epoch 1/2" for line in said)


def test_they_run_side_by_side(jobs, pool, tmp_path):
    began = time.monotonic()
    pool.Pool(4, lambda text: None).run([job(jobs, tmp_path, seed) for seed in (2, 3, 4, 5)])
    assert time.monotonic() - began < 1.8


def test_stopping_ends_the_workers(jobs, pool, tmp_path):
    pids = [tmp_path / f"run-seed{seed}" / "pid" for seed in (10, 11)]

    def stop():
        while not all(path.exists() and path.read_text() for path in pids):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(pool.StoppedError):
        pool.Pool(2, lambda text: None).run([job(jobs, tmp_path, s) for s in (10, 11, 12)])
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert not (tmp_path / "run-seed12" / "pid").exists()


def test_a_worker_does_not_outlive_its_parent(scripts, monkeypatch):
    """It ends when its stdin does, and not before."""
    pieces = [b"", b"something"]
    monkeypatch.setattr(os, "read", lambda handle, count: pieces.pop())
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="130"):
        scripts["worker"]._end_with_parent()
    assert not pieces


def test_the_result_key_is_the_same_wherever_files_lie(jobs, tmp_path):
    def key(place, **options):
        sets = jobs.TestSets(known=f"{place}/c.npz#test", portable={"id": "c.npz#test"}, **options)
        recipe = find_recipe("digits-cnn-dense").override([f"data.train={place}/c.npz#train"])
        return jobs.Job(name="a", recipe=recipe, out=tmp_path, train_as="c", sets=sets).result_path

    assert key("/one") == key("/two")
    assert key("/one") != key("/one", limit=5)
    assert key("/one") != key("/one", far={"svhn": "svhn"})


def test_a_result_of_other_weights_is_stale(jobs, tmp_path):
    one = job(jobs, tmp_path, 0, train=False, packed=tmp_path, sets=jobs.TestSets(known="x"))
    assert one.todo == "not trained"
    weights = Path(one.pack)
    weights.write_bytes(b"one")
    assert one.todo == "measure"
    jobs.write_json(one.result_path, {"identity": jobs.identity(weights)})
    assert one.todo == ""
    weights.write_bytes(b"two")
    assert one.todo == "measure"
    # Without the weights, what was measured is still worth showing.
    weights.unlink()
    assert one.result() is not None


def test_a_result_of_other_test_images_is_stale(jobs, scripts, tmp_path):
    images = tmp_path / "c.npz"
    images.write_bytes(b"one")
    sets = jobs.TestSets(known=f"{images}#test", far={"photos": "sklearn:photos"})
    one = job(jobs, tmp_path, 0, train=False, packed=tmp_path, sets=sets)
    Path(one.pack).write_bytes(b"weights")
    facts = {"identity": jobs.identity(one.pack), "contents": sets.contents()}
    jobs.write_json(one.result_path, facts)
    assert one.todo == ""
    images.write_bytes(b"two")
    scripts["fingerprint"].fingerprint.cache_clear()
    assert one.todo == "measure"


def test_a_run_of_other_training_images_is_refused(jobs, scripts, tmp_path):
    images = tmp_path / "c.npz"
    images.write_bytes(b"one")
    recipe = find_recipe("digits-cnn-dense").override([f"data.train={images}#train"])
    one = jobs.Job(name="a", recipe=recipe, out=tmp_path, train_as="c")
    assert not jobs.json.loads(one.write().read_text())["changed"]
    jobs.write_json(one.run / "checkpoint.json", {"recipe": recipe.to_dict()})
    assert one.todo == ""
    images.write_bytes(b"two")
    scripts["fingerprint"].fingerprint.cache_clear()
    assert one.todo == "train"
    written = jobs.json.loads(one.write().read_text())
    assert written["changed"]
    with pytest.raises(jobs.MoonError, match="begun with other training images"):
        scripts["worker"].do(written)


def test_a_fingerprint_follows_content_alone(scripts, tmp_path):
    fingerprint = scripts["fingerprint"].fingerprint
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        (folder / "cats").mkdir(parents=True)
        (folder / "cats" / "1.png").write_bytes(b"cat" if folder.name != "c" else b"dog")
        os.utime(folder / "cats" / "1.png", (1, len(folder.name)))
    first, second, other = (fingerprint(str(folder)) for folder in folders)
    assert first == second != other
    assert fingerprint(f"{folders[0]}[0:5]") not in (first, fingerprint(f"{folders[0]}[0:6]"))
    (tmp_path / "list.txt").write_text("1.png 0")
    pairs = [fingerprint(f"{tmp_path}/list.txt@{folder}/cats") for folder in folders]
    assert pairs[0] == pairs[1] != pairs[2]
    roots = [fingerprint(f"torchvision:CIFAR10@{folder}#test") for folder in folders]
    assert roots[0] == roots[2] == fingerprint("torchvision:CIFAR10#test")
    assert roots[0] != fingerprint("torchvision:CIFAR10#train")


def test_a_compact_file_that_is_not_the_runs_is_packed_again(jobs, tmp_path):
    packed = tmp_path / "checkpoints"
    one = job(jobs, tmp_path, 0, packed=packed)
    facts = {"recipe": one.recipe.to_dict(), "file": {"sha256": "weights"}}
    jobs.write_json(one.run / "checkpoint.json", facts)
    packed.mkdir()
    Path(one.pack).write_bytes(b"of another run")
    assert one.todo == "pack"
    there = {"run": "weights", "file": jobs.identity(one.pack)}
    jobs.write_json(one.out / one.name / jobs.PACKED, there)
    assert one.todo == ""
    Path(one.pack).write_bytes(b"damaged")
    assert one.todo == "pack"
