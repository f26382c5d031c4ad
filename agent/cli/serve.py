"""`edge-agent serve` and `run`: the commands that answer predictions."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.common import default_run_socket, fail
from agent.host import logs

if TYPE_CHECKING:
    from agent.serving.models.host import ModelHost
    from agent.serving.models.loading import Source


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="agent.yaml  [default: /etc/edge-agent/agent.yaml if present]")
@click.option("--verbose", is_flag=True, help="Log what is loaded.")
def serve(config: Path | None, *, verbose: bool) -> None:
    """Serve the releases that the store selects.

    Reads the store and never writes it. Runs until SIGTERM; under systemd it takes the socket it is given, says READY when
    predictions are answered, and feeds the watchdog.

    \b
    Example:
      edge-agent serve --config /etc/edge-agent/agent.yaml
    """
    _prepare(verbose=verbose)
    from agent.config import ConfigError, load
    from agent.serving.app import serve_store
    from agent.serving.transport.sockets import SocketError
    from agent.store import StoreError

    try:
        sys.exit(serve_store(load(config)))
    except (ConfigError, StoreError, SocketError) as error:
        fail(error)


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="[NAME=]FILE|FOLDER...")
@click.option(
    "--socket", "socket_path", type=click.Path(path_type=Path), help="Where to listen  [default: in $XDG_RUNTIME_DIR]"
)
@click.option("--http", "http_listen", metavar="ADDRESS:PORT", help="A loopback port besides, such as 127.0.0.1:8000 (0: any).")
@click.option("--grpc-socket", type=click.Path(path_type=Path), help="A socket for gRPC besides.")
@click.option("--threads", default=3, show_default=True, type=click.IntRange(1, 64), help="Threads that answer requests.")
@click.option("--engine-threads", default=1, show_default=True, type=click.IntRange(0, 64), help="Threads of one run.")
@click.option(
    "--memory-budget",
    "budget",
    metavar="SIZE",
    help="What models may take together, such as 512M; the rest is loaded when asked for.",
)
@click.option(
    "--isolate",
    "isolated",
    multiple=True,
    metavar="NAME",
    help="Run this model's engine in a process of its own; may be repeated.",
)
@click.option(
    "--in-process",
    "accepted",
    multiple=True,
    metavar="NAME",
    help="Run it in this process although a request could end or hang its engine; * is every model; may be repeated.",
)
@click.option(
    "--library",
    "libraries",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Operators for ONNX models that need more than the engine has, such as onnxruntime-extensions' .so; may be repeated.",
)
@click.option(
    "--load-timeout",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="How long loading a file and its first run may take.",
)
@click.option("--verbose", is_flag=True, help="Log what is loaded.")
def run(
    files: tuple[str, ...],
    socket_path: Path | None,
    http_listen: str | None,
    grpc_socket: Path | None,
    threads: int,
    engine_threads: int,
    budget: str | None,
    isolated: tuple[str, ...],
    accepted: tuple[str, ...],
    libraries: tuple[Path, ...],
    load_timeout: float,
    *,
    verbose: bool,
) -> None:
    """Serve model files, without a fleet.

    Each file is served under its name without suffix, as version 1. A folder stands for every model file in it.

    \b
    Examples:
      edge-agent run digits.onnx
      edge-agent run models/ --socket /tmp/models.sock
      edge-agent run small=mobilenet_025.tflite large=mobilenet_075.tflite
    """
    _prepare(verbose=verbose)
    from agent.config import ConfigError, ServeSettings
    from agent.serving.app import serve_files
    from agent.serving.transport.sockets import SocketError

    path = (socket_path or default_run_socket()).absolute()
    settings = ServeSettings(
        socket=path,
        socket_mode=0o600,
        http_listen=http_listen or "",
        grpc_socket=grpc_socket.absolute() if grpc_socket else None,
        grpc_socket_mode=0o600,
        grpc_access="control",
        threads=threads,
        engine_threads=engine_threads,
        memory_budget_bytes=_bytes(budget or "0"),
        load_timeout_s=load_timeout,
    )
    sources = _sources(files, isolated, accepted, libraries)
    try:
        sys.exit(serve_files(sources, settings, lambda host, http: _announce(host, path, http)))
    except (ConfigError, SocketError) as error:
        fail(error)


def _bytes(text: str) -> int:
    """512M → 536870912. Ends with status 2 when it is no size."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    try:
        return int(float(number.rstrip("KMG")) * units.get(number[-1:], 1))
    except ValueError as error:
        raise click.UsageError(f"{text!r} is no size: write bytes, or such as 512M or 2G") from error


def _prepare(*, verbose: bool) -> None:
    # NumPy's linear algebra is not used here; its threads would each keep a buffer.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    logs.set_up(logging.INFO if verbose else logging.WARNING)


def _sources(
    files: tuple[str, ...], isolated: tuple[str, ...], accepted: tuple[str, ...], libraries: tuple[Path, ...]
) -> list[Source]:
    """What to load. Ends with status 2 when names clash, cannot be model names, or name no model."""
    from agent.contract.manifest import Serving
    from agent.contract.names import check_model
    from agent.serving.models.loading import Source, of_file

    found: dict[str, Path] = {}
    for name, path in [pair for text in files for pair in _named(text)]:
        if name in found:
            raise click.UsageError(f"{found[name]} and {path} are both called {name!r}: name one, such as other={path}")
        try:
            check_model(name)
        except ValueError as error:
            raise click.UsageError(f"{path}: {error}; name it, such as model={path}") from error
        found[name] = path
    for option, names in (("--isolate", isolated), ("--in-process", accepted)):
        for name in names:
            if name not in found and (option, name) != ("--in-process", "*"):
                raise click.UsageError(f"{option} {name}: no such model; there are {', '.join(found)}")
    for name in set(isolated).intersection(accepted):
        raise click.UsageError(
            f"{name!r} cannot have a process of its own and be in this one: leave out --isolate or --in-process"
        )
    serving = {name: Serving(isolation="in-process") for name in (found if "*" in accepted else accepted)}
    serving |= {name: Serving(isolation="process") for name in isolated}
    return [
        of_file(
            Source(
                name, 1, path, "", serving=serving.get(name, Serving()), libraries=libraries if path.suffix == ".onnx" else ()
            )
        )
        for name, path in found.items()
    ]


def _named(text: str) -> list[tuple[str, Path]]:
    from runtimes import registry
    from runtimes.contract import ModelInvalid
    from runtimes.file_kinds import what_folder

    name, equals, rest = text.partition("=")
    path = Path(text)
    if equals and not path.exists():
        path = Path(rest)
    else:
        name = ""
    if path.is_file():
        return [(name or path.stem, path)]
    if not path.is_dir():
        raise click.UsageError(f"{str(path)!r} does not exist")
    if name:
        raise click.UsageError(f"{str(path)!r} is a folder: a name is for one file")
    models = []
    for file in sorted(path.iterdir()):
        try:
            registry.for_file(file)
        except ModelInvalid:
            continue
        if file.is_file():
            models.append((file.stem, file))
    if not models:
        what = what_folder(path)
        raise click.UsageError(f"{str(path)!r} is {what}" if what else f"there is no model file in {str(path)!r}")
    return models


def _announce(host: ModelHost, path: Path, http: list[str]) -> None:
    example = None
    click.echo("".join([f"Serving on {path}\n", *(f"Serving on http://{address}\n" for address in http)]))
    for served in host:
        for version in served.versions.values():
            if version.state == "LOADING":
                click.echo(f"  {served.name}  is still being loaded")
                continue
            if not version.answers:
                click.echo(f"  {served.name}  NOT SERVED: {version.reason}")
                continue
            example = example or version
            click.echo(
                f"  {served.name}  {version.runtime} on {version.placement.actual}, loaded in {version.loaded.load_s * 1e3:.0f} ms"
                + (", unloaded until it is asked for" if version.away else "")
            )
            for role, specs in (("in ", version.inputs), ("out", version.outputs)):
                for spec in specs:
                    shape = "of any shape" if spec.any_rank else list(spec.shape)
                    click.echo(f"      {role} {spec.name}  {spec.datatype} {shape}{'  (optional)' if spec.optional else ''}")
            for name in version.interfaces.signatures:
                click.echo(f"      signature {name}")
    if example is not None:
        click.echo("\nTry it:\n" + _example(example.name, [spec for spec in example.inputs if not spec.optional], path))
    click.echo("\nCtrl-C ends it.")


def _example(name: str, inputs: Any, path: Path) -> str:
    """A curl line that really predicts (when the inputs are small) or describes, and the same with our own command."""
    from shlex import quote
    from urllib.parse import quote as url_quote

    url = f"http://localhost/v2/models/{url_quote(name, safe='')}"
    curl = f"  curl --unix-socket {quote(str(path))} {url}"
    shapes = [[1 if size < 0 else size for size in spec.shape] for spec in inputs]
    sizes = [_product(shape) for shape in shapes]
    if sum(sizes) <= 64 and all(spec.datatype not in ("BYTES", "FP16") for spec in inputs):
        tensors = [
            {"name": spec.name, "datatype": spec.datatype, "shape": shape, "data": [spec.datatype != "BOOL" and 0] * size}
            for spec, shape, size in zip(inputs, shapes, sizes, strict=True)
        ]
        curl += f"/infer -d {quote(json.dumps({'inputs': tensors}, separators=(',', ':')))}"
    files = ["x.npy"] if len(inputs) == 1 else [f"{spec.name}=x{n}.npy" for n, spec in enumerate(inputs)]
    given = " ".join(f"--input {quote(file)}" for file in files)
    return f"{curl}\n  edge-agent predict {quote(name)} {given} --socket {quote(str(path))}"


def _product(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
