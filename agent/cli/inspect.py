"""`edge-agent inspect`: what a model file is, before anybody serves it."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.common import fail, json_option

if TYPE_CHECKING:
    from runtimes.contract import Description, TensorSpec


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(0, 64), help="Threads of the measured run.")
@click.option(
    "--library",
    "libraries",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Operators that the model needs and the engine has not; may be repeated.",
)
@click.option(
    "--timeout",
    "timeout_s",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="How long loading the file and its runs may take.",
)
@click.option("--in-this-process", is_flag=True, hidden=True)
@json_option
def inspect(
    file: Path, threads: int, libraries: tuple[Path, ...], timeout_s: float, *, in_this_process: bool, as_json: bool
) -> None:
    """Show what a model file holds and what it takes to serve it.

    Inputs, outputs and their quantization, operators and weights wherever the file or its other files have them, with what a
    request could end or hang its process, which provider of this machine's engine takes how many operators, and what loading
    and one run on zeros took. The file is loaded in a process of its own: one that crashes or hangs the engine harms nothing,
    and what is known without it is shown.

    \b
    Examples:
      edge-agent inspect digits.onnx
      edge-agent inspect mobilenet.tflite --json | jq .operators
    """
    if in_this_process:
        _answer(file, threads, libraries)
        return
    found, problem = _ask_child(file, threads, libraries, timeout_s)
    if problem and not found.get("operators") and not found.get("weights_bytes"):
        fail(problem)  # nothing in it was understood
    found.pop("step", None)
    document = {"file": file.name, **found, **({"problem": problem} if problem else {})}
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _show(document)
    if problem:
        fail(problem)


def _ask_child(file: Path, threads: int, libraries: tuple[Path, ...], timeout_s: float) -> tuple[dict[str, Any], str]:
    """What it found out as far as it came, and in words what ended it before; empty when nothing did."""
    words = [word for library in libraries for word in ("--library", str(library))]
    command = [sys.executable, "-m", "agent.cli", "inspect", str(file), "--in-this-process", "--threads", str(threads), *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        found = _told(error.stdout or b"")
        return (
            found,
            f"{file.name}: {_step(found)} was not done within {timeout_s:g} s; do not serve it",
        )
    found = _told(done.stdout)
    if done.returncode == 0:
        return found, ""
    if done.returncode < 0:
        number = -done.returncode
        name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
        return found, f"{file.name}: {_step(found)} kills the process ({name}); do not serve it"
    text = done.stderr.decode(errors="replace").strip().splitlines()
    return found, text[-1].removeprefix("edge-agent: ") if text else f"{file.name} cannot be loaded"


def _step(found: dict[str, Any]) -> str:
    return {"running": "a run on zeros", "describing": "describing it"}.get(found.get("step", ""), "loading it")


def _told(lines: bytes) -> dict[str, Any]:
    """Everything in the whole lines of JSON; whatever an engine prints is none."""
    found: dict[str, Any] = {}
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict):
                found.update(said)
    return found


# -- in the child ----------------------------------------------------------------------------------------------------------


def _answer(file: Path, threads: int, libraries: tuple[Path, ...]) -> None:
    """Prints what was found as lines of JSON, each as soon as it is known: the next step may be the last."""
    from agent.host import memory
    from runtimes import hazards, onnx_external, registry
    from runtimes.contract import Describing, Description, LoadOptions, RuntimeFailure

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        runtime = registry.for_file(file)
        engine = runtime.version()
        data = onnx_external.all_beside(file) if runtime.name == "onnx" else {}
        sizes = {location: path.stat().st_size for location, path in data.items()}
        about = runtime.outline(file) if isinstance(runtime, Describing) else Description()
        _say(
            **_inside(about), runtime=runtime.name, engine=engine, size_bytes=file.stat().st_size + sum(sizes.values()),
            other_files=sizes, hazards=list(hazards.find(runtime.name, file)), step="loading",
        )  # fmt: skip
        before, started = memory.resident_bytes(), time.perf_counter()
        options = LoadOptions(threads=threads, libraries=libraries)
        model = runtime.load(file, options)
        load_s = time.perf_counter() - started
        _say(
            inputs=[_tensor(spec) for spec in model.inputs],
            outputs=[_tensor(spec) for spec in model.outputs],
            signatures=_signatures(model),
            load_ms=round(load_s * 1e3, 3),
            placement=model.placement.actual,
            note=model.placement.fallback,
            step="running",
        )
        run_s, trouble = _run_s(model)
        _say(
            run_on_zeros_ms=None if run_s is None else round(run_s * 1e3, 3),
            run_problem=trouble,
            memory_bytes=memory.peak_bytes() - before,
            step="describing",
        )
        model.close()
        if isinstance(runtime, Describing):
            _say(**_inside(runtime.describe(file, options)))
    except (RuntimeFailure, MemoryError, OSError) as error:
        fail(error)


def _say(**found: Any) -> None:
    click.echo("\n" + json.dumps(found))  # on a line of its own, whatever an engine printed
    sys.stdout.flush()


def _inside(found: Description) -> dict[str, Any]:
    return {
        "format": found.format,
        "operators": dict(sorted(found.operators.items(), key=lambda item: (-item[1], item[0]))),
        "weights_bytes": found.weights_bytes,
        "providers": dict(found.providers),
    }


def _run_s(model: Any) -> tuple[float | None, str | None]:
    """Seconds of a warm run on zeros; None when it cannot be run on them, and why."""
    from runtimes.check import zeros
    from runtimes.contract import RuntimeFailure

    feeds = zeros(model.inputs)
    if feeds is None:
        return None, "zeros would be too large"
    took = 0.0
    try:
        for _ in range(2):
            started = time.perf_counter()
            model.run(feeds)
            took = time.perf_counter() - started
    except RuntimeFailure as error:
        return None, str(error)
    return took, None


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
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"[bold]{escape(document['file'])}[/]  {_size(document['size_bytes'])}, {escape(document['format'] or document['runtime'])}"
    )
    if "inputs" in document:
        tensors = Table(box=box.SIMPLE_HEAD)
        for heading in ("", "name", "datatype", "shape", "quantization"):
            tensors.add_column(heading, overflow="fold")
        for role in ("inputs", "outputs"):
            for tensor in document[role]:
                kind = "optional input" if tensor.get("optional") else role[:-1]
                quantization = _quantization(tensor.get("quantization"))
                tensors.add_row(kind, escape(tensor["name"]), tensor["datatype"], _shape(tensor), quantization)
        console.print(tensors)
    for line in _lines(document):
        console.print(f"  {escape(line)}")


def _lines(document: dict[str, Any]) -> Iterator[str]:
    for number, (name, signature) in enumerate(document.get("signatures", {}).items()):
        takes, gives = (
            ", ".join(f"{t['name']} {t['datatype']} {_shape(t)}" for t in signature[r]) for r in ("inputs", "outputs")
        )
        yield f"signature  {name}{' (default)' if number == 0 else ''}: {takes or 'nothing'} → {gives}"
    operators = document["operators"]
    if operators:
        listed = ", ".join(f"{name} {count}" if count > 1 else name for name, count in operators.items())
        yield f"operators  {sum(operators.values())}: {listed}"
    if document["weights_bytes"] is not None:
        yield f"weights    {_size(document['weights_bytes'])}"
    for location, size_bytes in document["other_files"].items():
        yield f"with       {location}, {_size(size_bytes)}"
    for hazard in document["hazards"]:
        yield f"isolated   {hazard}"
    for provider, count in document["providers"].items():
        yield f"provider   {provider} takes {count or 'no'} operator{'s' * (count != 1)}"
    if document.get("note"):
        yield f"note       {document['note']}"
    if "load_ms" in document:
        yield f"loading    {document['load_ms']:.1f} ms with {document['engine']}"
    if "memory_bytes" in document:
        run, trouble = document["run_on_zeros_ms"], document["run_problem"]
        yield f"one run    {f'{run:.3f} ms on zeros' if run is not None else f'not possible on zeros ({trouble}): ask it with real inputs'}"
        yield f"memory     {_size(document['memory_bytes'])} at most, for loading and one run"


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
