"""One engine in a process of its own, told what to do through a pipe by benchmarks/engine.py.

    python benchmarks/engine_worker.py ENGINE

It runs in that engine's own Python environment, so it needs numpy and the engine alone; moon is
imported for the engine `moon` and for no other. Orders come as lines of JSON on stdin, answers go
as lines of JSON to what stdout was; whatever the engine prints itself goes to stderr.

    {"do": "load", "model", "input", "output", "name", "index", "threads"}
        the model's path, .npy files to read the input from and write the logits to, the input's
        name, the logits' place among the outputs
    {"do": "run", "warm", "warm_s", "calls"}
        calls to warm up, as many or as many seconds of them, but two at least; then those that
        count: seconds of each, and of the very first
    {"do": "state"}
        memory, and CPU time so far
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time


def open_moon(path, order):
    from moon import __version__
    from moon.runtime.sparse.engine import SparseEngine

    def load():
        engine = SparseEngine(path, threads=order["threads"])

        def call(x):
            found = engine.run(x)
            return found if isinstance(found, list) else [found]

        return call, {"handed_over": getattr(engine, "handed_over", "")}

    return __version__, load


def open_onnxruntime(path, order):
    import onnxruntime

    def load():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = order["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return (lambda x: session.run(None, {order["name"]: x})), {}

    return onnxruntime.__version__, load


def open_openvino(path, order):
    import openvino

    def load():
        core = openvino.Core()
        model = core.read_model(path)
        model.reshape({order["name"]: order["shape"]})
        # It would choose bfloat16 where the CPU has it.
        settings = {
            "INFERENCE_NUM_THREADS": order["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = core.compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()
        count = len(compiled.outputs)

        def call(x):
            found = request.infer({order["name"]: x}, share_inputs=True, share_outputs=True)
            return [found[i] for i in range(count)]

        return call, {}

    return openvino.__version__.split("-")[0], load


def open_deepsparse(path, order):
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")
    # Bound, all its threads take the first cores, and so would those of two workers.
    os.environ.setdefault("NM_BIND_THREADS_TO_CORES", "0")
    import deepsparse

    def load():
        batch, cores = order["shape"][0], order["threads"]
        engine = deepsparse.compile_model(path, batch_size=batch, num_cores=cores)
        share = float(engine.fraction_of_supported_ops)
        return (lambda x: engine.run([x], val_inp=False)), {"supported_share": share}

    return deepsparse.__version__, load


ENGINES = {
    "moon": open_moon,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "deepsparse": open_deepsparse,
}


class Worker:
    """The engine, once a model is loaded, and the input that it is run on."""

    def __init__(self, engine):
        self.engine = engine
        self.call = self.input = None

    def load(self, order):
        import numpy

        self.input = numpy.load(order["input"])
        order["shape"] = list(self.input.shape)
        start = time.perf_counter()
        version, load = ENGINES[self.engine](order["model"], order)
        imported, before = time.perf_counter(), memory()
        self.call, facts = load()
        loaded = time.perf_counter()
        found = self.call(self.input)
        first = time.perf_counter()
        numpy.save(order["output"], numpy.asarray(found[order["index"]], dtype=numpy.float32))
        return {
            "version": version,
            "import_s": imported - start,
            "load_s": loaded - imported,
            "first_call_s": first - loaded,
            "before_bytes": before["resident_bytes"],
            **facts,
        }

    def run(self, order):
        wall, cpu = [], []
        gc.collect()
        gc.disable()
        try:
            until = time.perf_counter() + order["warm_s"]
            while len(wall) < order["warm"]:
                self._timed(wall, cpu)
                if len(wall) >= 2 and time.perf_counter() > until:
                    break
            warm = len(wall)
            for _ in range(order["calls"]):
                self._timed(wall, cpu)
        finally:
            gc.enable()
        return {
            "wall_s": wall[warm:],
            "cpu_s": cpu[warm:],
            "first_s": {"wall": wall[0], "cpu": cpu[0]},
        }

    def _timed(self, wall, cpu):
        busy, start = time.process_time(), time.perf_counter()
        self.call(self.input)
        end, used = time.perf_counter(), time.process_time()
        wall.append(end - start)
        cpu.append(used - busy)

    def state(self, order):
        return {**memory(), "cpu_s": time.process_time()}


def memory():
    """Resident bytes now and at most, None where the system does not tell.

    Not of getrusage: its peak goes on counting the process that started this one.
    """
    fields = {}
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        fields = dict(line.split(":", 1) for line in file if ":" in line)

    def of(name):
        return int(fields[name].split()[0]) * 1024 if name in fields else None

    return {"peak_bytes": of("VmHWM"), "resident_bytes": of("VmRSS")}


def main():
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Its own folder has names, such as serve and gate, that an engine may mean otherwise.
    sys.path.pop(0)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order["do"])(order)
        except ImportError as error:
            answer = {"error": f"it is not installed: {error}", "missing": True}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
