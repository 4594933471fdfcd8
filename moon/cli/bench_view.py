"""How results of ``moon bench`` look in a terminal."""

from __future__ import annotations

__all__ = ["show_bench", "show_comparison", "subjects"]

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from moon.cli.text import grid, milliseconds, on_cpu_line, percent, size

# As moon.runtime.bench_stats cuts histograms; importing that would take numpy.
_BODY_BINS = 40
_FIGURES = ("min", "mean", "p50", "p90", "p95", "p99", "max")
_BLOCKS = " ▁▂▃▄▅▆▇█"


def show_bench(console: Console, result: dict[str, Any]) -> None:
    """Print a result: latency of each subject, the speed-up, and what puts it in doubt."""
    _show_what(console, result)
    shown = subjects(result)
    names = [name for name, _ in shown]
    table = grid("ms", *map(escape, names), right=[escape(name) for name in names])
    for figure in _FIGURES:
        table.add_row(figure, *(_plain(one["latency_ms"][figure]) for _, one in shown))
    _add_parts(table, shown)
    table.add_section()
    if any(one["build_ms"] is not None for _, one in shown):
        table.add_row("build", *(_plain(one["build_ms"]) for _, one in shown))
    table.add_row("load", *(_plain(one["load_ms"]) for _, one in shown))
    for when in ("cold", "warm"):
        table.add_row(
            f"first, {when}", *(_plain(one["first_inference_ms"][when]) for _, one in shown)
        )
    table.add_section()
    table.add_row("images/s", *(f"{one['throughput']:,.0f}" for _, one in shown))
    if any(one["peak_bytes"] for _, one in shown):
        table.add_row(
            "peak memory",
            *(size(one["peak_bytes"]) if one["peak_bytes"] else "-" for _, one in shown),
        )
    if any(one["energy"] for _, one in shown):
        table.add_row("mJ/image", *(_millijoules(one["energy"]) for _, one in shown))
    table.add_row("drift", *(f"{one['drift']:+.1%}" for _, one in shown))
    table.add_row("min to p90", *(_spark(one["latency_histogram"]["counts"]) for _, one in shown))
    console.print(table)
    console.print()
    for name, one in shown:
        if one.get("speedup"):
            console.print(
                _speedup(escape(name), one["speedup"], escape(result["baseline"]["name"]))
            )
    for name, one in shown:
        if one["backend"].get("handed_over"):
            line = f"{name} hands over to ONNX Runtime: {one['backend']['handed_over']}"
            console.print(line, soft_wrap=True, markup=False)
        if line := on_cpu_line(one["backend"]):
            console.print(f"{name}: {line}", soft_wrap=True, markup=False)
    _show_gpu(console, result["gpu"])
    _show_validity(console, result)


def show_comparison(console: Console, result: dict[str, Any]) -> None:
    """Print two results side by side, and the verdict."""
    names = [escape(f"{side.upper()} {result[side]['model']['name']}") for side in ("a", "b")]
    table = grid("ms", *names, "A / B", right=(*names, "A / B"))
    for figure in _FIGURES:
        pair = result["latency_ms"][figure]
        table.add_row(figure, _plain(pair["a"]), _plain(pair["b"]), f"{pair['ratio']:.3g}")
    pair = result["throughput"]
    table.add_row("images/s", f"{pair['a']:,.0f}", f"{pair['b']:,.0f}", f"{pair['ratio']:.3g}")
    console.print(table)
    console.print()
    _show_verdict(console, "B", result)
    for other in result["others"]:
        _show_verdict(console, f"B's {escape(other['backend'])}", other)
    for line in result["changed"]:
        console.print(f"differs: {escape(line)}", soft_wrap=True)
    for line in result["notes"]:
        console.print(f"note: {escape(line)}", soft_wrap=True)
    if result["comparable"]:
        console.print("[green]comparable[/]: measured alike, on like machines, both valid")
        return
    reasons = [
        *result["differences"],
        *(f"{side.upper()} is not valid" for side in result["invalid"]),
    ]
    for reason in reasons:
        console.print(f"[yellow]not comparable[/]: {escape(reason)}", soft_wrap=True)


def _show_verdict(console: Console, name: str, versus: dict[str, Any]) -> None:
    by = " relative to the common baseline" if versus["speedup"]["by"] == "baseline" else ""
    console.print(f"{_speedup(name, versus['speedup'], 'A')}{by}")
    console.print(f"verdict: [bold]{name} {_VERDICTS[versus['verdict']]}[/]")


_VERDICTS = {
    "faster": "is faster",
    "slower": "is slower",
    "no difference shown": "shows no difference",
    "not comparable": "is not comparable",
}


def _show_what(console: Console, result: dict[str, Any]) -> None:
    model, config, host = result["model"], result["config"], result["host"]
    sparse = f"{percent(model['sparsity'])} sparse, model.onnx {size(model['bytes'])}"
    console.print(f"[bold]{escape(model['name'])}[/]  {sparse}")
    pinned = config["affinity"]
    where = "" if pinned is None else f", cores {','.join(map(str, pinned))}"
    rate = "" if config["rate"] is None else f" {config['rate']:,.1f} a second"
    console.print(
        f"scenario {config['scenario']}{rate}, images a query: {config['samples']}, "
        f"threads: {config['threads'] or 'all'}, {config['queries']:,} queries each, "
        f"interleaved in {config['rounds']} rounds and {config['loads']} loadings, "
        f"{escape(str(host['cpu']))}{where}\n"
    )


def _add_parts(table: Any, shown: Sequence[tuple[str, dict[str, Any]]]) -> None:
    if not any(one["parts_ms"] for _, one in shown):
        return
    table.add_section()
    for label, field in (
        ("copy in, p50", "host_to_device_ms"),
        ("compute, p50", "compute_ms"),
        ("copy out, p50", "device_to_host_ms"),
    ):
        table.add_row(label, *(_plain(one[field]) for _, one in shown))


def _show_gpu(console: Console, gpu: dict[str, Any] | None) -> None:
    if gpu is None:
        return
    parts = [gpu["name"] or "GPU"]
    clocks = (gpu["clocks_mhz"] or {}).get("sm")
    if clocks:
        parts.append(f"{clocks['min']} to {clocks['max']} MHz")
    if gpu["temperature_c"]:
        parts.append(f"{gpu['temperature_c']['max']:.0f} °C at most")
    if gpu["power_mode"]:
        parts.append(f"power mode {gpu['power_mode']}")
    console.print(escape(", ".join(parts)), soft_wrap=True)


def _millijoules(energy: dict[str, Any] | None) -> str:
    return "-" if energy is None else f"{energy['joules_per_image'] * 1e3:.3g}"


def subjects(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every subject of a result by name, the baseline last."""
    found = [(_name(result), result), *((_name(other), other) for other in result["others"])]
    if result["baseline"] is not None:
        name = result["baseline"]["name"]
        found.append((f"{name} (baseline)", result["baseline"]))
    return found


def _name(subject: dict[str, Any]) -> str:
    return str(subject["backend"]["spelled"])


def _plain(value: float | None) -> str:
    return "-" if value is None else milliseconds(value).removesuffix(" ms")


def _speedup(name: str, speedup: dict[str, Any], baseline: str) -> str:
    ratio, ci95 = speedup["ratio"], speedup["ci95"]
    # Close to 1, two digits would make every interval look like none.
    digits = 3 if abs(ratio - 1) < 0.05 else 2
    shown = "none of one loading"
    if ci95 is not None:
        shown = " to ".join(f"{end:.{digits}f}" for end in ci95)
    doubt = "; no difference shown" if speedup.get("verdict") == "no difference shown" else ""
    times = f"{name} is [bold]{ratio:.{digits}f}[/] times as fast as {baseline}"
    return f"{times}, 95% interval {shown}{doubt}"


def _spark(counts: Sequence[int]) -> str:
    """Counts up to the 90th percentile as a line of blocks, two bins a block."""
    joined = [sum(counts[i : i + 2]) for i in range(0, _BODY_BINS, 2)]
    top = max(joined) or 1
    return "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // top)] for count in joined)


def _show_validity(console: Console, result: dict[str, Any]) -> None:
    if result["valid"]:
        console.print("[green]valid[/]: enough queries, no drift, a quiet host")
    for warning in result["warnings"]:
        console.print(f"[yellow]not valid[/]: {escape(warning)}", soft_wrap=True)
    for note in result["notes"]:
        console.print(f"note: {escape(note)}", soft_wrap=True)
