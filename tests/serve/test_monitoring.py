"""The dashboard and the alert rules: valid, of figures that exist, and saying what is promised."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from moon.drift import DETECTOR_ALARM, E_VALUE_ALARM
from moon.runtime.predictor import Predictor
from tests.serve.test_watch import PNG, figures, talk

ASSETS = files("moon.serve").joinpath("assets")
RULES = yaml.safe_load(ASSETS.joinpath("alerts.yml").read_text("utf-8"))["groups"][0]["rules"]
BOARD: dict[str, Any] = json.loads(ASSETS.joinpath("grafana.json").read_text("utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
# Where Debian's package prometheus puts it, and its own archives do not.
PROMTOOL = shutil.which("promtool")

# Prometheus's own unit tests of rules: traffic that drifts, and traffic that does not.
UNIT_TESTS = {
    "rule_files": ["alerts.yml"],
    "evaluation_interval": "1m",
    "tests": [
        {
            "interval": "1m",
            "input_series": [
                {"series": f'moon_drift_e_value{{job="m", instance="{i}"}}', "values": values}
                for i, values in (("a", "1 1 1500 3000 +Inf"), ("b", "1 1 1 1 0.5"))
            ]
            + [
                {"series": f'moon_drift_detector{{job="m", instance="{i}"}}', "values": "0 6e5x4"}
                for i in "ab"
            ]
            + [
                {
                    "series": 'moon_requests_total{job="m", route="/predict", status="200"}',
                    "values": "0+60x20",
                },
                {
                    "series": 'moon_requests_total{job="m", route="/predict", status="503"}',
                    "values": "0+6x20",
                },
            ],
            "alert_rule_test": [
                {"eval_time": when, "alertname": "MoonDrift", "exp_alerts": alerts}
                for when, alerts in (
                    ("2m", []),  # one of two instances alone is not enough
                    ("3m", [{"exp_labels": {"job": "m", "severity": "critical"}}]),
                    ("4m", [{"exp_labels": {"job": "m", "severity": "critical"}}]),
                )
            ]
            + [
                {"eval_time": "0m", "alertname": "MoonDriftLately", "exp_alerts": []},
                {
                    "eval_time": "2m",
                    "alertname": "MoonDriftLately",
                    "exp_alerts": [{"exp_labels": {"job": "m", "severity": "warning"}}],
                },
                {"eval_time": "15m", "alertname": "MoonFailing", "exp_alerts": []},
                {
                    "eval_time": "15m",
                    "alertname": "MoonOverloaded",
                    "exp_alerts": [{"exp_labels": {"job": "m", "severity": "warning"}}],
                },
            ],
        }
    ],
}


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bmoon_\w+", expression))


@pytest.fixture(scope="module")
def exported(predictor: Predictor, pictures: list[bytes]) -> set[str]:
    """Names of all samples of a service that has answered."""

    async def wanted(client: httpx.AsyncClient) -> str:
        assert (await client.post("/predict", content=pictures[0], headers=PNG)).is_success
        return (await client.get("/metrics")).text

    return {name for name, _ in figures(talk(predictor, wanted))}


def test_they_ask_for_figures_that_exist(exported: set[str]) -> None:
    rules = [rule["expr"] for rule in RULES]
    for expression in (*rules, *EXPRESSIONS):
        assert metrics_in(expression), expression
        assert metrics_in(expression) <= exported, expression
    shown = set().union(*map(metrics_in, EXPRESSIONS))
    ours = {name for name in exported if not name.endswith("_created")}
    # Of a histogram some series are enough, and counts of images are in the decisions.
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours}
    drawn = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert families - drawn <= {"moon_drift_images", "moon_drift_rejected"}


def test_the_alarms_are_those_that_are_promised() -> None:
    levels = {rule["alert"]: rule["expr"].rpartition(">= ")[2] for rule in RULES if "alert" in rule}
    assert float(levels["MoonDrift"]) == E_VALUE_ALARM
    assert float(levels["MoonDriftLately"]) == DETECTOR_ALARM
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "description"}


def test_the_board_is_laid_out() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    places = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & places, panel["title"]
        assert at["x"] + at["w"] <= 24
        places |= cells
    for panel in PANELS:
        assert panel["title"] and panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == [
            chr(ord("A") + i) for i in range(len(panel["targets"]))
        ]
        assert all('job=~"$job"' in target["expr"] for target in panel["targets"])
    assert {one["name"] for one in BOARD["templating"]["list"]} == {"datasource", "job"}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_prometheus_understands_them(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(ASSETS.joinpath("alerts.yml").read_text("utf-8"))
    # Grafana fills in its variables before Prometheus sees them.
    filled = [one.replace("$__rate_interval", "5m").replace("$job", ".*") for one in EXPRESSIONS]
    board = [{"record": f"panel:{i}", "expr": expr} for i, expr in enumerate(filled)]
    group = {"groups": [{"name": "board", "rules": board}]}
    (tmp_path / "board.yml").write_text(yaml.safe_dump(group))
    tests = json.loads(json.dumps(UNIT_TESTS))
    for one in tests["tests"][0]["alert_rule_test"]:
        for alert in one["exp_alerts"]:
            rule = next(rule for rule in RULES if rule.get("alert") == one["alertname"])
            alert["exp_annotations"] = _annotations(rule, one)
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    for words in (["check", "rules", "alerts.yml", "board.yml"], ["test", "rules", "tests.yml"]):
        found = subprocess.run(
            [str(PROMTOOL), *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout + found.stderr


def _annotations(rule: dict[str, Any], test: dict[str, Any]) -> dict[str, str]:
    """With what promtool finds at that moment put in."""
    value = {
        ("MoonDrift", "3m"): "1.5k",
        ("MoonDrift", "4m"): "+Inf",
        ("MoonDriftLately", "2m"): "1.2M",
        ("MoonOverloaded", "15m"): "9.091%",
    }[test["alertname"], test["eval_time"]]
    filled = {}
    for name, text in rule["annotations"].items():
        text = text.replace("{{ $labels.job }}", "m")
        filled[name] = re.sub(r"\{\{ \$value \| \w+ \}\}", value, text)
    return filled


def test_a_service_is_understood_by_prometheus(predictor: Predictor, pictures: list[bytes]) -> None:
    if PROMTOOL is None:
        pytest.skip("promtool is not installed")

    async def wanted(client: httpx.AsyncClient) -> str:
        await client.post("/predict", content=pictures[0], headers=PNG)
        return (await client.get("/metrics")).text

    text = talk(predictor, wanted)
    found = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
