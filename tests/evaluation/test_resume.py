"""An evaluation that was stopped goes on from the sets that were done, and from nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moon.data.items import Source
from moon.evaluation.evaluate import evaluate
from moon.runtime.predictor import Predictor
from tests.bundles import images, make_bundle

N = 60


class KilledError(Exception):
    pass


def arrays(seed, n=N):
    return Source(spec=f"drawn{seed}", items=list(images(n, seed=seed)))


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They are tested elsewhere, and cost most of the time here."""
    monkeypatch.setattr("moon.evaluation.pictures.write_pictures", lambda *args: [])


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "tiny", reject=0.2)


@pytest.fixture
def counted(monkeypatch):
    """How many images were run; ``most`` stops it like a kill."""
    state = {"run": 0, "most": None}
    plain = Predictor.raw

    def raw(self, pixels):
        if state["most"] is not None and state["run"] >= state["most"]:
            raise KilledError
        state["run"] += len(pixels)
        return plain(self, pixels)

    monkeypatch.setattr(Predictor, "raw", raw)
    return state


def run(bundle, out, **options):
    sets = {"id": arrays(1), "near": {"n": arrays(2)}, "far": {"f": arrays(3)}}
    settings = {"corruptions": 0, "resamples": 20, "batch_size": 20, **sets, **options}
    plain = evaluate(bundle, out=out, **settings).to_json()
    return {key: value for key, value in plain.items() if key not in ("created", "sets")}


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_report(bundle, tmp_path, counted):
    whole = run(bundle, tmp_path / "whole")
    assert counted["run"] == 3 * N
    counted.update(run=0, most=2 * N + 20)
    with pytest.raises(KilledError):
        run(bundle, tmp_path / "out")
    assert len(list((tmp_path / "out" / "observed").iterdir())) == 2
    assert not (tmp_path / "out" / "report.json").exists()
    counted.update(run=0, most=None)
    ticks = []
    resumed = run(bundle, tmp_path / "out", progress=lambda done, total, what: ticks.append(done))
    assert counted["run"] == N
    assert resumed == whole
    assert ticks[-1] == 3 * N
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["gate"] == json.loads(json.dumps(whole["gate"]))


def test_a_large_set_goes_on_from_its_last_part(bundle, tmp_path, counted, monkeypatch):
    whole = run(bundle, tmp_path / "whole")
    monkeypatch.setattr("moon.evaluation.evaluate.PART", 25)
    counted.update(run=0, most=45)
    with pytest.raises(KilledError):
        run(bundle, tmp_path / "out")
    assert len(list((tmp_path / "out" / "observed").iterdir())) == 1
    counted.update(run=0, most=None)
    assert run(bundle, tmp_path / "out") == whole
    assert counted["run"] == 3 * N - 25


def test_what_is_stored_serves_only_the_very_same_question(bundle, tmp_path, counted):
    out = tmp_path / "out"

    def runs(**options):
        counted["run"] = 0
        run(options.pop("bundle", bundle), out, **options)
        return counted["run"]

    assert runs() == 3 * N
    assert runs() == 0
    assert runs(far={"f": arrays(4)}) == N
    assert runs(far={"another name": arrays(3)}) == 0
    assert runs(scores=["ebo"]) == 3 * N
    assert runs(jpeg=50) == 3 * N
    assert runs(limit=30) == 3 * 30
    again = make_bundle(tmp_path / "tiny", reject=0.3, force=True)
    assert runs(bundle=again) == 3 * N


def test_a_damaged_store_is_made_again(bundle, tmp_path, counted):
    out = tmp_path / "out"
    whole = run(bundle, out)
    first, second, third = sorted((out / "observed").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(b"")
    with np.load(third) as stored:
        short = {name: stored[name][:5] for name in stored.files}
    np.savez(third, **short)
    counted["run"] = 0
    assert run(bundle, out) == whole
    assert counted["run"] == 3 * N


def test_without_a_folder_nothing_is_kept(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    run(bundle, None)
    assert sorted(tmp_path.iterdir()) == before
