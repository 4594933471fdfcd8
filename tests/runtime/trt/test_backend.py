"""The backend over a device that stands in for a GPU: nothing here runs on one.

What is computed is computed by ONNX Runtime; what is tested is everything around it: order of
copies, batches of all sizes, threads, graphs, memory, and the gate.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.errors import BackendError
from moon.runtime.backend import Backend, open_backend
from moon.runtime.predictor import Predictor
from moon.runtime.timed import Timed
from moon.runtime.trt.backend import Settings
from moon.runtime.trt.lane import Timings
from tests.bundles import images, make_bundle
from tests.runtime.trt.conftest import Open
from tests.runtime.trt.standin import RECORD, StandInApi, StandInDevice


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("trt") / "bundle")


def _batch(bundle: Bundle, n: int, seed: int = 5) -> np.ndarray:
    return bundle.preprocess.normalise(images(n, seed=seed))


def _same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("n", [1, 3, 8, 9, 30])
@pytest.mark.parametrize("profile", [(1, 4, 8), (1, 1, 1), (4, 4, 4), (2, 8, 64)])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_any_batch_gives_what_onnx_runtime_gives(
    bundle: Bundle, open_standin: Open, n: int, profile: tuple[int, int, int], with_inputs: bool
) -> None:
    backend = open_standin(bundle, profile=profile, with_inputs=with_inputs)
    expected = open_backend(bundle).run(_batch(bundle, n))
    for _ in range(3):  # plain, captured, launched
        _same(backend.run(_batch(bundle, n)), expected)
    backend.close()


def test_it_is_a_backend(bundle: Bundle, open_standin: Open) -> None:
    backend = open_standin(bundle)
    as_backend: Backend = backend
    assert isinstance(backend, Timed)
    assert as_backend.outputs == bundle.manifest.outputs
    info = backend.info()
    assert {"name", "version", "provider", "precision", "threads"} <= set(info)
    assert info["sparse_layers"] == {"eligible": 2, "picked": None, "why": "nobody looked"}
    assert info["profile"] == {"min": 1, "opt": 4, "max": 8}
    backend.close()


def test_no_images(bundle: Bundle, open_standin: Open) -> None:
    found = open_standin(bundle).run(_batch(bundle, 2)[:0])
    _same(found, open_backend(bundle).run(_batch(bundle, 2)[:0]))


def test_uint8_pixels(tmp_path: Path, open_standin: Open) -> None:
    bundle = make_bundle(tmp_path / "raw", dtype="uint8")
    pixels = images(5)
    backend = open_standin(bundle, profile=(1, 2, 3))
    _same(backend.run(pixels), open_backend(bundle).run(pixels))
    with pytest.raises(BackendError, match=r"takes uint8 \[N, 8, 8, 1\], not float32"):
        backend.run(pixels.astype(np.float32))


def test_views_of_other_arrays(bundle: Bundle, open_standin: Open) -> None:
    batch = _batch(bundle, 6)
    turned = batch[::-2, :, ::-1]
    _same(open_standin(bundle).run(turned), open_backend(bundle).run(turned.copy()))


@pytest.mark.parametrize("shape", [(2, 1, 8, 9), (2, 3, 8, 8), (8, 8)])
def test_wrong_shapes(bundle: Bundle, open_standin: Open, shape: tuple[int, ...]) -> None:
    with pytest.raises(BackendError, match=r"takes float32 \[N, 1, 8, 8\], not float32 \["):
        open_standin(bundle).run(np.zeros(shape, np.float32))


def test_order_on_the_stream(bundle: Bundle, device: StandInDevice, open_standin: Open) -> None:
    backend, outputs = open_standin(bundle), 6  # logits, label and four scores
    for expected in ("compute", "compute", "launch"):
        device.log.clear()
        backend.run(_batch(bundle, 2))
        done = [one for one in device.log if one in ("copy_in", "compute", "launch", "copy_out")]
        if "begin_capture" in device.log:
            assert done.pop(0) == "compute"  # noted down, not run
            expected = "launch"
        assert done == ["copy_in", expected, *["copy_out"] * outputs]
        assert device.log[-1] == "wait" and device.log.count("wait") == 1


def test_what_was_returned_stays(bundle: Bundle, open_standin: Open) -> None:
    backend = open_standin(bundle)
    first = backend.run(_batch(bundle, 3))
    kept = {name: value.copy() for name, value in first.items()}
    backend.run(_batch(bundle, 3, seed=9))
    _same(first, kept)


def test_a_graph_is_of_one_shape(bundle: Bundle, device: StandInDevice, open_standin: Open) -> None:
    """The stand-in refuses a graph that outlives its shape or addresses."""
    backend, ort = open_standin(bundle, profile=(1, 4, 64)), open_backend(bundle)
    for n in (2, 2, 2, 3, 3, 2, 2, 50, 50, 50, 2, 2):
        _same(backend.run(_batch(bundle, n)), ort.run(_batch(bundle, n)))
        assert len(device.graphs) <= 1
    assert device.log.count("launch") == 7


def test_graphs_can_be_off(bundle: Bundle, device: StandInDevice, open_standin: Open) -> None:
    backend = open_standin(bundle, settings=Settings(graphs=False))
    for _ in range(4):
        backend.run(_batch(bundle, 2))
    assert "begin_capture" not in device.log and backend.info()["cuda_graph"] is False


def test_what_cannot_be_captured_runs_all_the_same(
    bundle: Bundle, device: StandInDevice, open_standin: Open
) -> None:
    device.no_capture = True
    backend, ort = open_standin(bundle), open_backend(bundle)
    for _ in range(4):
        _same(backend.run(_batch(bundle, 2)), ort.run(_batch(bundle, 2)))
    assert device.log.count("begin_capture") == 1 and "launch" not in device.log


def test_sleeping_while_the_gpu_works(
    bundle: Bundle, device: StandInDevice, open_standin: Open
) -> None:
    backend = open_standin(bundle, settings=Settings(sleeping=True))
    _same(backend.run(_batch(bundle, 2)), open_backend(bundle).run(_batch(bundle, 2)))
    assert "wait_event" in device.log
    backend.close()
    assert device.leaks == {}


def test_timings_are_the_gpus(bundle: Bundle, device: StandInDevice, open_standin: Open) -> None:
    backend = open_standin(bundle, profile=(1, 2, 2))
    found, timings = backend.timed(_batch(bundle, 6))
    # Its clock moves by one at each mark, and there are three pieces.
    assert timings == Timings(3.0, 3.0, 3.0)
    _same(found, open_backend(bundle).run(_batch(bundle, 6)))


@pytest.mark.parametrize("contexts", [1, 3])
def test_threads_have_a_context_each(
    bundle: Bundle, device: StandInDevice, open_standin: Open, contexts: int
) -> None:
    backend = open_standin(bundle, settings=Settings(contexts=contexts))
    ort = open_backend(bundle)
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(20):
                batch = _batch(bundle, 1 + (seed + turn) % 11, seed=seed)
                _same(backend.run(batch), ort.run(batch))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= len(device.engine.contexts) <= contexts
    backend.close()
    assert device.leaks == {} and device.closed


def test_one_context_fewer_where_memory_is_short(
    bundle: Bundle, device: StandInDevice, open_standin: Open
) -> None:
    backend = open_standin(bundle)
    device.engine.most_contexts = 1
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with backend._pool.lane(0):
            inside.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(10)
    threading.Timer(0.05, leave.set).start()
    found = backend.run(_batch(bundle, 2))  # waits, rather than fail for want of a second one
    holder.join()
    _same(found, open_backend(bundle).run(_batch(bundle, 2)))
    assert backend.info()["contexts"] == {"most": 4, "made": 1}


@pytest.mark.parametrize("what", ["copy_in", "compute", "copy_out", "wait", "launch"])
def test_after_a_failure_another_context_serves(
    bundle: Bundle, device: StandInDevice, open_standin: Open, what: str
) -> None:
    backend = open_standin(bundle)
    batch = _batch(bundle, 3)
    for _ in range(2):
        backend.run(batch)
    device.fail_next = what
    if what == "compute":  # enqueued anew for another shape
        batch = _batch(bundle, 4)
    with pytest.raises(BackendError, match=r"failed: CUDA_ERROR_LAUNCH_FAILED"):
        backend.run(batch)
    _same(backend.run(batch), open_backend(bundle).run(batch))
    backend.close()
    assert device.leaks == {}


def test_too_little_memory_for_a_batch(
    bundle: Bundle, device: StandInDevice, open_standin: Open
) -> None:
    backend = open_standin(bundle, profile=(1, 4, 4096))
    device._left = 100_000
    with pytest.raises(BackendError, match="too little memory"):
        backend.run(_batch(bundle, 4096))
    _same(backend.run(_batch(bundle, 4)), open_backend(bundle).run(_batch(bundle, 4)))
    backend.close()
    assert device.leaks == {}


def test_closed_for_good(bundle: Bundle, device: StandInDevice, open_standin: Open) -> None:
    backend = open_standin(bundle)
    backend.run(_batch(bundle, 2))
    backend.close()
    backend.close()
    assert device.leaks == {} and device.closed
    with pytest.raises(BackendError, match=r"was closed\. Open the model again"):
        backend.run(_batch(bundle, 2))


def test_an_engine_that_is_refused_leaves_nothing_behind(
    bundle: Bundle, device: StandInDevice
) -> None:
    from moon.runtime.trt.opening import opened

    for api, words in (
        (StandInApi(None, "it was built by version 10.3"), "does not run here: it was built by"),
        (StandInApi(None), "engines/stand-in.engine cannot be loaded: no reason given"),
    ):
        again = StandInDevice()
        with pytest.raises(BackendError, match=words):
            opened(bundle, api, again, b"", RECORD, Settings(), key=bytes(32), facts={})
        assert again.closed and again.leaks == {}


def test_another_process_after_a_fork(
    bundle: Bundle, open_standin: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_standin(bundle)
    monkeypatch.setattr("moon.runtime.trt.backend.os.getpid", lambda: -1)
    with pytest.raises(BackendError, match="forked after it was opened"):
        backend.run(_batch(bundle, 2))
    backend.close()  # the parent's memory is left alone


def test_a_predictor_decides_alike(bundle: Bundle, open_standin: Open) -> None:
    pixels = images(20, seed=3)
    here = Predictor(bundle, open_standin(bundle)).decide(pixels)
    there = Predictor.open(bundle).decide(pixels)
    assert [one.accepted for one in here] == [one.accepted for one in there]
    assert [one.label for one in here] == [one.label for one in there]


_ENDING = """
import sys, threading, time
from moon.bundle import Bundle
from moon.runtime.trt.backend import Settings
from moon.runtime.trt.opening import opened
from tests.runtime.trt.standin import RECORD, StandInApi, StandInDevice, StandInEngine

bundle, device = Bundle.open(sys.argv[1]), StandInDevice()
closed = device.close
device.close = lambda: (closed(), print("closed", device.leaks))
engine = StandInEngine(device, bundle.model_bytes(), (1, 4, 8))
api, settings = StandInApi(engine), Settings()
backend = opened(bundle, api, device, b"", RECORD, settings, key=bytes(32), facts={})
batch = bundle.preprocess.normalise(bundle.golden()["pixels"])

def work():
    while True:
        backend.run(batch)

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""


def test_a_process_ends_while_threads_run(bundle: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENDING, str(bundle.path)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed {}\n", "")


def test_who_forgets_to_close_leaves_nothing(
    bundle: Bundle, device: StandInDevice, open_standin: Open
) -> None:
    open_standin(bundle).run(_batch(bundle, 2))
    gc.collect()
    assert device.leaks == {} and device.closed


def test_settings_are_checked() -> None:
    with pytest.raises(BackendError, match="1 or more contexts, not 0"):
        Settings(contexts=0)
