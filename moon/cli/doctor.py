"""``moon doctor``: what is installed, what can run here, and how to get the rest."""

from __future__ import annotations

__all__ = ["diagnose", "doctor"]

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from rich.markup import escape

from moon import __version__
from moon.cli.console import output, print_json, working
from moon.cli.options import AsJson, Debug
from moon.cli.text import grid
from moon.errors import DISTRIBUTION

# Package, the extra that brings it ("" for the plain install), and what it is for.
_PACKAGES = (
    ("numpy", "", "everything"),
    ("pillow", "", "reading images"),
    ("onnxruntime", "", "running bundles"),
    ("onnx", "", "packing and checking graphs"),
    ("pyarrow", "", "moon score, Parquet sources"),
    ("jinja2", "", "reports of moon eval"),
    ("matplotlib", "", "moon bench --picture"),
    ("llvmlite", "engine", "--backend sparse"),
    ("torch", "train", "moon train, moon export of a run"),
    ("torchvision", "train", "models and data sets by name"),
    ("onnxscript", "train", "moon export of a run"),
    ("safetensors", "train", "checkpoints"),
    ("scikit-learn", "train", "moon demo"),
    ("bentoml", "serve", "moon serve"),
    ("python-multipart", "serve", "moon serve"),
    ("tensorrt-rtx-cu13", "trt-rtx", "engines for RTX GPUs, built on any machine"),
    ("tensorrt", "trt", "engines for any NVIDIA GPU, built on it"),
    ("zstandard", "trt-rtx", "engines stored compressed"),
)


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what is installed, which backends can run here, and what to install for the rest."""
    with working("Looking around"):
        found = diagnose()
    if as_json:
        print_json(found)
        return
    console = output()
    host = found["host"]
    console.print(f"moon {found['moon']} on Python {host['python']}, {host['system']}")
    console.print(f"{host['cpu']}, {host['cores']} usable cores; GPU: {host['gpu'] or 'none'}\n")
    packages = grid("package", "version", "extra", "for")
    for row in found["packages"]:
        version = row["version"] or "[yellow]missing[/]"
        packages.add_row(row["name"], version, row["extra"] or "-", row["for"])
    console.print(packages)
    console.print()
    backends = grid("backend", "runs here", "")
    for name, state in found["backends"].items():
        verdict = "[green]yes[/]" if state["ok"] else "[yellow]no[/]"
        reason = " ".join(part for part in (state["reason"], state["install"]) if part)
        backends.add_row(name, verdict, escape(reason))
    console.print(backends)
    if found["tensorrt"]["gpus"]:
        console.print()
    for gpu in found["tensorrt"]["gpus"]:
        console.print(f"{gpu['name']}: {gpu['fits']}", soft_wrap=True, markup=False)
    if found["missing_extras"]:
        console.print()
    for extra in found["missing_extras"]:
        line = f"For {extra['for']}: {extra['install']}"
        console.print(line, soft_wrap=True, markup=False)


def diagnose() -> dict[str, Any]:
    """Everything the command shows, as one JSON document."""
    from moon.runtime.backend import backends
    from moon.runtime.cores import usable_cores
    from moon.runtime.providers import providers

    packages = [
        {"name": name, "version": _version(name), "extra": extra or None, "for": use}
        for name, extra, use in _PACKAGES
    ]
    states = {
        name: {"ok": state.ok, "reason": state.reason or None, "install": state.install or None}
        for name, state in {**backends(), **providers()}.items()
    }
    return {
        "moon": __version__,
        "host": {
            "python": platform.python_version(),
            "executable": sys.executable,
            "system": platform.platform(terse=True),
            "machine": platform.machine(),
            "cpu": _cpu(),
            "cores": usable_cores(),
            "gpu": _gpu(),
        },
        "packages": packages,
        "backends": states,
        "tensorrt": _tensorrt(),
        "missing_extras": _missing(packages),
    }


def _tensorrt() -> dict[str, Any]:
    """Versions of both packages, null where missing, and which of them each GPU here needs."""
    from moon.runtime.trt.gpu import gpus
    from moon.runtime.trt.package import PACKAGES, fitting, installed, which_fits

    return {
        "packages": {name: installed(name) for name in PACKAGES},
        "gpus": [
            {
                "name": gpu.name,
                "target": f"sm_{gpu.sm}",
                "packages": list(fitting(gpu.sm)),
                "fits": which_fits([gpu.sm]),
            }
            for gpu in gpus()
        ],
    }


def _missing(packages: list[dict[str, Any]]) -> list[dict[str, str]]:
    extras: dict[str, list[str]] = {}
    for package in packages:
        if package["extra"] and package["version"] is None:
            uses = extras.setdefault(package["extra"], [])
            uses += [package["for"]] if package["for"] not in uses else []
    return [
        {
            "extra": extra,
            "for": ", ".join(uses),
            "install": f"pip install '{DISTRIBUTION}[{extra}]'",
        }
        for extra, uses in extras.items()
    ]


def _version(package: str) -> str | None:
    module = {"tensorrt": "tensorrt", "tensorrt-rtx-cu13": "tensorrt_rtx"}.get(package)
    if module is not None:  # either comes under several names, and on a Jetson without pip
        from moon.runtime.trt.package import installed

        version = installed(module)  # type: ignore[arg-type]
        return "unknown" if version == "" else version
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model") and value.strip():
                    return value.strip()
    except OSError:
        pass  # not Linux; the generic name below will do
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return "; ".join(lines) if answer.returncode == 0 and lines else None
