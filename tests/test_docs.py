"""The pages' commands exist with those options, links lead somewhere, and figures are right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from moon.binomial import beta_interval, smallest_zero_tail
from moon.cli import main
from moon.gate_calibration import Promise, rate
from moon.risk_calibration import fewest_for_risk
from moon.scores import SCORE_TABLE, Training, fit_score, restore_score

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SCORES = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^moon (.*)$", SCORES, flags=re.MULTILINE)
# Those on MNIST take its files.
QUICK = [command for command in COMMANDS if "mnist" not in command]
# Features, known classes, ViM's principal dimensions, images in the banks of knn and nnguide.
MODELS = {"ResNet-18": (512, 10, 256), "ResNet-50": (2048, 1000, 1000)}
BANKS = {"knn": 1000, "nnguide": 500}


def table(page: str, *first: str) -> list[dict[str, str]]:
    """Rows, by column, of the first table whose header begins with these."""
    lines = iter(page.splitlines())
    for line in lines:
        header = cells(line)
        if line.startswith("|") and header[: len(first)] == list(first):
            next(lines)
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    return rows
                rows.append(dict(zip(header, cells(row), strict=True)))
            return rows
    raise AssertionError(f"no table begins with {first}")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def amount(text: str) -> float:
    number, _, unit = text.replace(",", "").partition(" ")
    return float(number) * {"": 1, "B": 1, "KB": 1e3, "MB": 1e6}[unit]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text):
        there = page if not target else page.parent / target
        assert there.exists(), target
        titles = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), flags=re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not anchor or anchor in slugs, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_take_what_is_shown(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in re.findall(r"^moon (.*)$", page.read_text("utf-8"), flags=re.MULTILINE):
        command = line.split()[0]
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        for option in re.findall(r"--[a-z][a-z-]*", line):
            assert option in shown, f"moon {command} has no {option}"


def test_every_score_is_explained_once() -> None:
    rows = table(SCORES, "score", "reads", "fitted to")
    assert sorted(row["score"].strip("`") for row in rows) == sorted(SCORE_TABLE)


def test_what_scores_read_and_need() -> None:
    for row in table(SCORES, "score", "reads", "fitted to"):
        entry = SCORE_TABLE[row["score"].strip("`")]
        assert row["reads"] == (entry.reads[0] if len(entry.reads) == 1 else "both")
        needs_images = {"features", "logits", "labels"} & set(entry.fits)
        assert ("images" in row["fitted to"]) == bool(needs_images)
        assert ("labels" in row["fitted to"]) == ("labels" in entry.fits)


def test_what_scores_weigh() -> None:
    """The formulas are those of real graphs, and the bytes those of the formulas."""
    small = {"D": 24, "K": 5, "d": 12, "B": 100}
    held = constants(small)
    for row in table(SCORES, "score", "reads", "fitted to"):
        name, formula = row["score"].strip("`"), row["constants"]
        # Beside the floats there may be some whole numbers, such as k.
        assert 0 <= held.get(name, 0) - 4 * floats(formula, small) <= 32, name
        for model, (width, classes, inner) in MODELS.items():
            sizes = {"D": width, "K": classes, "d": inner, "B": BANKS.get(name, 0)}
            expected = 4 * floats(formula, sizes)
            assert amount(row[model]) == pytest.approx(expected, rel=0.005), (name, model)


def constants(sizes: dict[str, int]) -> dict[str, int]:
    """Bytes a graph of such a model holds for each score alone."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from moon.export.head import CARRIED, add_head

    rng = np.random.default_rng(0)
    width, classes = sizes["D"], sizes["K"]
    labels = np.arange(600) % classes
    weight = rng.standard_normal((classes + 1, width), np.float32)
    features = rng.standard_normal((600, width), np.float32) + weight[labels]
    logits = features @ weight.T
    logits[:, -1] -= 50
    labels[::7] = 0  # so that a temperature is best
    training = Training(
        features=features, logits=logits, labels=labels, weight=weight, unknown_index=classes
    )
    body = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gemm", ["input", "weight"], ["logits"], transB=1)],
            "body",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", width])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes + 1])],
            [numpy_helper.from_array(weight, "weight")],
        ),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 18)],
    )
    options = {"knn": {"bank": "random", "size": sizes["B"], "k": 3}}
    options["nnguide"] = {"k": 3, "alpha": 0.1}
    found = {}
    for name in (name for name in SCORE_TABLE if name not in CARRIED):
        fitted = fit_score(name, training, **options.get(name, {}))
        if name == "nnguide":
            arrays = fitted.to_arrays()
            fitted = restore_score(name, {**arrays, "bank": arrays["bank"][: sizes["B"]]})
        graph: onnx.GraphProto = add_head(
            body, outputs=classes + 1, unknown_index=classes, fitted=[fitted]
        ).graph
        found[name] = sum(
            numpy_helper.to_array(tensor).nbytes
            for tensor in graph.initializer
            if tensor.name.startswith(f"head/{name}/")
        )
    return found


def floats(formula: str, sizes: dict[str, int]) -> int:
    """As `2 D^2 + K (D + 1)` counts, for these sizes."""
    if formula == "none":
        return 0
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula).replace("^", "**")
    return int(eval(product, {}, sizes))  # our own text


def test_the_smallest_numbers_of_images() -> None:
    rows = table(SCORES, "rate", "conformal", "pac", "risk")
    assert [row["rate"] for row in rows] == ["1%", "5%", "10%"]
    said = re.search(r"Fewer are tried, down to (\d+), (\d+) and (\d+)", SCORES)
    assert said is not None
    for row, least in zip(rows, map(int, said.groups()), strict=True):
        share = rate(f"{float(row['rate'].strip('%')) / 100:g}", "rate")
        tested = smallest_zero_tail(share, rate("0.05", "delta"))
        assert int(row["conformal"]) == Promise.of(share).fewest
        assert int(row["pac"]) == Promise.of(share, "0.05").fewest
        assert int(row["risk"]) == fewest_for_risk(share, rate("0.05", "delta"))
        assert least - least // 5 >= tested > (least - 1) - (least - 1) // 5


def test_the_intervals_of_what_is_rejected() -> None:
    for row in table(SCORES, "n", "asked 1%"):
        n = int(row.pop("n").replace(",", ""))
        for column, cell in row.items():
            share = float(column.removeprefix("asked ").strip("%")) / 100
            k = Promise.of(f"{share:g}").rank(n)
            low, high = beta_interval(k, n - k + 1)
            assert cell == f"{low:.2%} to {high:.2%}"


@pytest.mark.slow
def test_the_gate_commands_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = "train digits-cnn-rigl90-moon --out runs/digits --device cpu --set epochs=4"
    for command in (trained, *QUICK):
        words = shlex.split(command)
        assert main(words) == 0, f"moon {command}: {capsys.readouterr().err}"
        capsys.readouterr()
    assert (tmp_path / "report" / "report.html").is_file()
