"""`edge-agent inspect`: what a model file is, before anybody serves it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.asking import json_option
from agent.cli.common import fail

if TYPE_CHECKING:
    from runtimes.contract import TensorSpec

TIMEOUT_S = 300.0


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(0, 64), help="Threads of the measured run.")
@click.option("--in-this-process", is_flag=True, hidden=True)
@json_option
def inspect(file: Path, threads: int, *, in_this_process: bool, as_json: bool) -> None:
    """Show what a model file holds and what it takes to serve it.

    Inputs, outputs and their quantization, operators, which provider of this machine's engine takes how many of them, and what
    loading and one run on zeros took. The file is loaded in a process of its own: one that crashes the engine harms nothing.

    \b
    Examples:
      edge-agent inspect digits.onnx
      edge-agent inspect mobilenet.tflite --json | jq .operators
    """
    if in_this_process:
        _answer(file, threads)
        return
    document = {"file": file.name, "size_bytes": file.stat().st_size, **_ask_child(file, threads)}
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _show(document)


def _ask_child(file: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "agent.cli", "inspect", str(file), "--in-this-process", "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        fail(f"{file.name}: loading it and one run took longer than {TIMEOUT_S:.0f} s")
    if done.returncode < 0:
        fail(f"{file.name}: loading it kills the process ({signal.Signals(-done.returncode).name}); do not serve it")
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        fail(text[-1].removeprefix("edge-agent: ") if text else f"{file.name} cannot be loaded")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


# -- in the child ----------------------------------------------------------------------------------------------------------


def _answer(file: Path, threads: int) -> None:
    """Prints what was found as one line of JSON."""
    from agent.host import memory
    from runtimes import describing, registry
    from runtimes.contract import LoadOptions, RuntimeFailure

    try:
        runtime = registry.for_file(file)
        engine = runtime.version()
        before, started = memory.resident_bytes(), time.perf_counter()
        model = runtime.load(file, LoadOptions(threads=threads))
        load_s, run_s = time.perf_counter() - started, _run_s(model)
        document = {
            "runtime": runtime.name,
            "engine": engine,
            "inputs": [_tensor(spec) for spec in model.inputs],
            "outputs": [_tensor(spec) for spec in model.outputs],
            "signatures": _signatures(model),
            "load_ms": round(load_s * 1e3, 3),
            "run_on_zeros_ms": None if run_s is None else round(run_s * 1e3, 3),
            "memory_bytes": memory.peak_bytes() - before,
            "placement": model.placement.actual,
        }
        model.close()
        found = describing.describe(runtime, file)
    except (RuntimeFailure, MemoryError) as error:
        fail(error)
    inside = {
        "format": found.format,
        "operators": dict(sorted(found.operators.items(), key=lambda item: (-item[1], item[0]))),
        "weights_bytes": found.weights_bytes,
        "providers": dict(found.providers),
    }
    click.echo(json.dumps({**document, **inside}))


def _run_s(model: Any) -> float | None:
    """Seconds of a warm run on zeros; None when the model cannot be run on them."""
    from runtimes.check import zeros
    from runtimes.contract import RuntimeFailure

    feeds = zeros(model.inputs)
    if feeds is None:
        return None
    took = 0.0
    try:
        for _ in range(2):
            started = time.perf_counter()
            model.run(feeds)
            took = time.perf_counter() - started
    except RuntimeFailure:
        return None
    return took


def _signatures(model: Any) -> dict[str, Any]:
    """Under their names for the tensors, the default one first."""
    from runtimes.naming import Interfaces

    return {
        name: {"inputs": [_tensor(s) for s in found.said_inputs], "outputs": [_tensor(s) for s in found.said_outputs]}
        for name, found in Interfaces.of(model).signatures.items()
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    document: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
    if spec.optional:
        document["optional"] = True
    if spec.any_rank:
        document["unknown_rank"] = True
    if spec.quantization is not None:
        quantization = spec.quantization
        document["quantization"] = {
            "scales": quantization.scales,
            "zero_points": quantization.zero_points,
            "axis": quantization.axis,
        }
    return document


# -- on the terminal -------------------------------------------------------------------------------------------------------


def _show(document: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{document['file']}[/]  {_size(document['size_bytes'])}, {document['format'] or document['runtime']}")
    tensors = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "name", "datatype", "shape", "quantization"):
        tensors.add_column(heading, overflow="fold")
    for role in ("inputs", "outputs"):
        for tensor in document[role]:
            kind = "optional input" if tensor.get("optional") else role[:-1]
            tensors.add_row(kind, tensor["name"], tensor["datatype"], _shape(tensor), _quantization(tensor.get("quantization")))
    console.print(tensors)
    for number, (name, signature) in enumerate(document["signatures"].items()):
        takes, gives = (
            ", ".join(f"{t['name']} {t['datatype']} {_shape(t)}" for t in signature[r]) for r in ("inputs", "outputs")
        )
        console.print(f"  signature  {name}{' (default)' if number == 0 else ''}: {takes or 'nothing'} → {gives}")
    operators = document["operators"]
    if operators:
        listed = ", ".join(f"{name} {count}" if count > 1 else name for name, count in operators.items())
        console.print(f"  operators  {sum(operators.values())}: {listed}")
    if document["weights_bytes"] is not None:
        console.print(f"  weights    {_size(document['weights_bytes'])}")
    for provider, count in document["providers"].items():
        console.print(f"  provider   {provider} takes {count or 'no'} operator{'s' * (count != 1)}")
    run = document["run_on_zeros_ms"]
    console.print(f"  loading    {document['load_ms']:.1f} ms with {document['engine']}")
    console.print(
        f"  one run    {f'{run:.3f} ms on zeros' if run is not None else 'not possible on zeros: ask it with real inputs'}"
    )
    console.print(f"  memory     {_size(document['memory_bytes'])} at most, for loading and one run")


def _shape(tensor: dict[str, Any]) -> str:
    if tensor.get("unknown_rank"):
        return "any shape"
    return " × ".join("any" if size < 0 else str(size) for size in tensor["shape"]) or "scalar"


def _quantization(quantization: dict[str, Any] | None) -> str:
    if quantization is None:
        return ""
    scales, zeros = quantization["scales"], quantization["zero_points"]
    if len(scales) == 1:
        return f"scale {scales[0]:.6g}, zero point {zeros[0]}"
    return f"{len(scales)} scales along axis {quantization['axis']}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
