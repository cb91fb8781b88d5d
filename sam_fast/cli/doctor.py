"""`sam-fast doctor`: what this machine will run, and why."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from sam_fast.cli.console import out


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report versions, the CPU and GPUs, and which implementation each operation uses and why.

    Exit code 0 when all is as it should be, 1 when there is a problem.
    """
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if report["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Return the whole report as plain data."""
    import torch

    from sam_fast import native
    from sam_fast.runtime.precision import advice_for_cpu

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    report: dict[str, Any] = {
        "versions": _versions(),
        "cpu": {
            "model": _cpu_model(),
            "logical_cores": os.cpu_count(),
            "instruction_set": native.cpu_level() if native.is_available() else None,
            "instruction_set_limit": os.environ.get("SAM_FAST_CPU"),
            "threads": torch.get_num_threads(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "no_gpu_because": _why_no_gpu(),
        "native": {
            "available": native.is_available(),
            "unavailable_because": native.unavailable_reason,
            "built_with_cuda": bool(native.module().built_with_cuda) if native.is_available() else None,
        },
        "operations": _operations(sorted({device.split(":")[0] for device in devices})),
        "cpu_precision_advice": advice_for_cpu(),
        "auto_precision": {device: _auto_precision(device) for device in devices},
    }
    report["problems"] = _problems(report)
    return report


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("sam_fast", "torch", "numpy", "pillow", "safetensors", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.processor() or platform.machine())


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _why_no_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all devices"
    if not Path("/proc/driver/nvidia/version").exists():
        return "no NVIDIA driver is loaded"
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} cannot use the driver; see nvidia-smi"


def _operations(device_types: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """operation -> device type -> the backend that `auto` takes, and why not each of the others."""
    from sam_fast.ops.backend import OPERATIONS, unavailable_reason

    table: dict[str, dict[str, dict[str, Any]]] = {}
    everything = sorted({backend for row in OPERATIONS.values() for names in row.values() for backend in names})
    for operation, row in OPERATIONS.items():
        table[operation] = {}
        for device_type in device_types:
            reasons = {name: unavailable_reason(operation, name, device_type) for name in everything}
            candidates = [name for name in row.get(device_type, ("torch",)) if reasons[name] is None]
            table[operation][device_type] = {
                "backend": candidates[0] if candidates else None,
                "also": candidates[1:],
                "not": {name: reason for name, reason in reasons.items() if reason is not None},
            }
    return table


def _auto_precision(device: str) -> str:
    import torch

    from sam_fast.runtime import resolve_precision

    return str(resolve_precision("auto", torch.device(device))).removeprefix("torch.")


def _problems(report: dict[str, Any]) -> list[str]:
    problems = []
    if not report["native"]["available"]:
        problems.append(f"{report['native']['unavailable_because']}; reinstall sam_fast")
    for operation, row in report["operations"].items():
        problems += [f"{operation} cannot run on {device}" for device, entry in row.items() if entry["backend"] is None]
    return problems


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = out()
    facts = Table.grid(padding=(0, 2))
    for name, version in report["versions"].items():
        facts.add_row(name, escape(version or "not installed"))
    cpu = report["cpu"]
    limit = f", limited by SAM_FAST_CPU={cpu['instruction_set_limit']}" if cpu["instruction_set_limit"] else ""
    facts.add_row("CPU", escape(f"{cpu['model']}, {cpu['logical_cores']} logical cores"))
    facts.add_row("CPU kernels", f"{cpu['instruction_set'] or 'none'}{limit}, {cpu['threads']} threads")
    for i, gpu in enumerate(report["gpus"]):
        name = f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"
        facts.add_row(f"GPU {i}", escape(name))
    if report["no_gpu_because"]:
        facts.add_row("GPU", escape(f"none: {report['no_gpu_because']}"))
    built = report["native"]["built_with_cuda"]
    native = "with CUDA" if built else "CPU only" if built is not None else "missing"
    facts.add_row("native module", native)
    for device, precision in report["auto_precision"].items():
        facts.add_row(f"precision auto on {device}", precision)
    facts.add_row("on this CPU", report["cpu_precision_advice"])
    console.print(facts)

    table = Table(title="Operations", title_justify="left")
    for heading, wraps in (("operation", False), ("on", False), ("runs", False), ("or", False), ("not", True)):
        table.add_column(heading, no_wrap=not wraps)
    for operation, row in report["operations"].items():
        for device, entry in row.items():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in entry["not"].items())
            table.add_row(operation, device, entry["backend"] or "-", ", ".join(entry["also"]), escape(reasons))
    console.print(table, soft_wrap=False)
    for problem in report["problems"]:
        console.print(f"[bold red]problem:[/] {escape(problem)}")
    if not report["problems"]:
        console.print("[green]no problems[/]")
