"""`edge-agent`: everything a device does, from the command line.

Exit status: 0 done, 1 it failed (the reason is on stderr), 2 the command was not understood.
Commands that belong to the fleet link live in `agent.sync.cli` and are imported only when one of them is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click

from agent.host import logs

if TYPE_CHECKING:
    from agent.client import Client
    from agent.serving.host import ModelHost
    from agent.serving.loading import Source

SYNC_MODULE = "agent.sync.cli"
SYNC_COMMANDS: Mapping[str, str] = {
    "doctor": "Check this device: store, identity, engines, clock, reachability.",
    "enroll": "Join a fleet with an enrolment string.",
    "hold": "Keep a model on the release it runs now.",
    "rollback": "Go back to a model's previous release.",
    "sync": "Follow the fleet: updates, trials, reports.",
    "trial": "Try one release (started by sync or systemd).",
    "updates": "Show each model's update, answers and refused releases.",
}
HIDDEN_SYNC_COMMANDS = frozenset({"trial"})
DEFAULT_SOCKET = "/run/edge-agent/agent.sock"


class LazyGroup(click.Group):
    """Knows the names and one-line helps of the commands in SYNC_MODULE without importing it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *SYNC_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is not None or cmd_name not in SYNC_COMMANDS:
            return command
        from importlib import import_module

        return cast("click.Command", getattr(import_module(SYNC_MODULE), cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Like click's, but without importing a command to say what it does."""
        rows = []
        for name in self.list_commands(ctx):
            own = super().get_command(ctx, name)
            if name not in HIDDEN_SYNC_COMMANDS and (own is None or not own.hidden):
                rows.append((name, SYNC_COMMANDS[name] if own is None else own.get_short_help_str(limit=90)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
First steps:
  edge-agent run model.onnx
  edge-agent predict model --input x.npy
Completion of commands and options:
  eval "$(edge-agent completion bash)"
""",
)
@click.version_option(package_name="edge-inference-agent", prog_name="edge-agent")
def cli() -> None:
    """Serves models on a Unix socket of this machine, and keeps them up to date from a fleet server."""


def main() -> None:
    cli(prog_name="edge-agent")


def fail(message: object) -> NoReturn:
    """Ends the command with status 1."""
    click.echo(f"edge-agent: {message}", err=True)
    sys.exit(1)


# -- serving -----------------------------------------------------------------------------------------------------------------


@cli.command()
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
    from agent.serving.sockets import SocketError
    from agent.store import StoreError

    try:
        sys.exit(serve_store(load(config)))
    except (ConfigError, StoreError, SocketError) as error:
        fail(error)


def default_run_socket() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "edge-agent.sock" if runtime else Path(f"/tmp/edge-agent-{os.getuid()}.sock")  # noqa: S108 - mode 0600


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="[NAME=]FILE|FOLDER...")
@click.option(
    "--socket", "socket_path", type=click.Path(path_type=Path), help="Where to listen  [default: in $XDG_RUNTIME_DIR]"
)
@click.option("--threads", default=3, show_default=True, type=click.IntRange(1, 64), help="Threads that answer requests.")
@click.option("--engine-threads", default=1, show_default=True, type=click.IntRange(0, 64), help="Threads of one run.")
@click.option("--verbose", is_flag=True, help="Log what is loaded.")
def run(files: tuple[str, ...], socket_path: Path | None, threads: int, engine_threads: int, *, verbose: bool) -> None:
    """Serve model files, without a fleet.

    Each file is served under its name without suffix, as version 1. A folder stands for every model file in it.

    \b
    Examples:
      edge-agent run digits.onnx
      edge-agent run models/ --socket /tmp/models.sock
      edge-agent run small=mobilenet_025.tflite large=mobilenet_075.tflite
    """
    _prepare(verbose=verbose)
    from agent.config import ServeSettings
    from agent.serving.app import serve_files
    from agent.serving.sockets import SocketError

    path = (socket_path or default_run_socket()).absolute()
    settings = ServeSettings(socket=path, socket_mode=0o600, threads=threads, engine_threads=engine_threads)
    sources = _sources(files)
    try:
        sys.exit(serve_files(sources, settings, lambda host: _announce(host, path)))
    except SocketError as error:
        fail(error)


def _prepare(*, verbose: bool) -> None:
    # NumPy's linear algebra is not used here; its threads would each keep a buffer.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    logs.set_up(logging.INFO if verbose else logging.WARNING)


def _sources(files: tuple[str, ...]) -> list[Source]:
    """What to load. Ends with status 2 when names clash or cannot be model names."""
    from agent.contract.names import check_model
    from agent.serving.loading import Source
    from agent.store import hash_file

    found: dict[str, Path] = {}
    for name, path in [pair for text in files for pair in _named(text)]:
        if name in found:
            raise click.UsageError(f"{found[name]} and {path} are both called {name!r}: name one, such as other={path}")
        try:
            check_model(name)
        except ValueError as error:
            raise click.UsageError(f"{path}: {error}; name it, such as model={path}") from error
        found[name] = path
    return [Source(name, 1, path, hash_file(path)) for name, path in found.items()]


def _named(text: str) -> list[tuple[str, Path]]:
    from runtimes import registry
    from runtimes.contract import ModelInvalid

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
        raise click.UsageError(f"there is no model file in {str(path)!r}")
    return models


def _announce(host: ModelHost, path: Path) -> None:
    example = None
    click.echo(f"Serving on {path}\n")
    for served in host:
        for version in served.versions.values():
            if version.state != "READY":
                click.echo(f"  {served.name}  NOT SERVED: {version.reason}")
                continue
            example = example or version
            click.echo(
                f"  {served.name}  {version.runtime} on {version.placement.actual}, loaded in {version.load_s * 1e3:.0f} ms"
            )
            for role, specs in (("in ", version.inputs), ("out", version.outputs)):
                for spec in specs:
                    click.echo(f"      {role} {spec.name}  {spec.datatype} {list(spec.shape)}")
    if example is not None:
        click.echo("\nTry it:\n" + _example(example.name, example.inputs, path))
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


# -- asking a server -----------------------------------------------------------------------------------------------------------

socket_option = click.option(
    "--socket", "socket_path", type=click.Path(path_type=Path), envvar="EDGE_AGENT_SOCKET", show_envvar=True,
    help=f"The server's socket  [default: {DEFAULT_SOCKET}, or that of `edge-agent run`]",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def _client(socket_path: Path | None) -> Client:
    from agent.client import Client

    if socket_path is None:
        socket_path = next((p for p in (Path(DEFAULT_SOCKET), default_run_socket()) if p.exists()), Path(DEFAULT_SOCKET))
    return Client(socket_path)


@cli.command()
@click.argument("model")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="[NAME=]FILE",
    help="A .npy file, or a .npz with one array per input.",
)
@click.option("--version", "version", help="A version or label (stable, candidate, previous)  [default: the active one]")
@click.option("--top", type=click.IntRange(1), metavar="K", help="Show only the K largest values of each row.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the results to this .npz file.")
@click.option("--timeout", default=30.0, show_default=True, metavar="SECONDS")
@socket_option
@json_option
def predict(
    model: str,
    inputs: tuple[str, ...],
    version: str | None,
    top: int | None,
    output: Path | None,
    timeout: float,
    socket_path: Path | None,
    *,
    as_json: bool,
) -> None:
    """Ask a model for a prediction.

    \b
    Examples:
      edge-agent predict digits --input image.npy --top 3
      edge-agent predict silero --input input=chunk.npy --input state=state.npy --input sr=sr.npy
      edge-agent predict digits --input inputs.npz --output results.npz
    """
    import numpy as np

    from agent.client import ClientError

    with _client(socket_path) as client:
        try:
            feeds = _feeds(inputs)
            results = client.infer(model, feeds.pop("") if set(feeds) == {""} else feeds, version=version, timeout_s=timeout)
        except ClientError as error:
            fail(error)
    if output is not None:
        with output.open("wb") as file:
            np.savez(file, **results)  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps({name: _plain(array, top) for name, array in results.items()}))
        return
    for name, array in results.items():
        click.echo(f"{name}  {array.dtype} {list(array.shape)}")
        _print_array(array, top)


def _feeds(inputs: tuple[str, ...]) -> dict[str, Any]:
    """Input name → array; the name is empty for a single unnamed file."""
    feeds: dict[str, Any] = {}
    for text in inputs:
        name, equals, rest = text.partition("=")
        path = Path(rest) if equals and not Path(text).exists() else Path(text)
        name = name if equals and not Path(text).exists() else ""
        for key, array in _read_arrays(path, name).items():
            if key in feeds or ("" in feeds and key):
                raise click.UsageError(
                    f"input {key or str(path)!r} is given twice, or some inputs have no name: use NAME={path}"
                )
            feeds[key] = array
    return feeds


def _read_arrays(path: Path, name: str) -> dict[str, Any]:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
        if not hasattr(found, "files"):
            return {name: found}
        with found:
            arrays = {key: found[key] for key in found.files}
    except FileNotFoundError:
        raise click.UsageError(f"{str(path)!r} does not exist") from None
    except (OSError, ValueError, EOFError) as error:
        fail(f"{str(path)!r} is not a NumPy file without pickled objects: {error}")
    if not name:
        return arrays
    if name in arrays:
        return {name: arrays[name]}
    if len(arrays) == 1:
        return {name: next(iter(arrays.values()))}
    raise click.UsageError(f"{str(path)!r} has the arrays {', '.join(arrays)}: none is called {name!r}")


def _largest(row: Any, top: int) -> list[tuple[int, Any]]:
    order = row.argsort(kind="stable")[::-1][:top]
    return [(int(index), row[index].item()) for index in order]


def _rows(array: Any) -> Any:
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def _plain(array: Any, top: int | None) -> Any:
    if array.dtype.kind == "O":
        return [element.decode(errors="replace") for element in array.flat]
    if top is None:
        return array.tolist()
    return [[{"index": index, "value": value} for index, value in _largest(row, top)] for row in _rows(array)]


def _print_array(array: Any, top: int | None) -> None:
    import numpy as np

    if array.dtype.kind == "O":
        for element in array.flat:
            click.echo(f"  {element.decode(errors='replace')}")
        return
    if top is None:
        text = np.array2string(array, threshold=200, precision=6, suppress_small=True, max_line_width=110)
        click.echo("\n".join("  " + line for line in text.splitlines()))
        return
    for number, row in enumerate(_rows(array)):
        for index, value in _largest(row, top):
            click.echo(f"  [{number}] {index:>5}  {value:.6g}")


@cli.command()
@socket_option
@json_option
def models(socket_path: Path | None, *, as_json: bool) -> None:
    """List the models that the server knows.

    \b
    Example:
      edge-agent models --json
    """
    from agent.client import ClientError

    with _client(socket_path) as client:
        try:
            found = client.models()
        except ClientError as error:
            fail(error)
    if as_json:
        click.echo(json.dumps(found))
        return
    _table(("model", "version", "state"), [[m["name"], m["version"], m["state"]] for m in found])
    _reasons((m["name"], m["version"], m.get("reason", "")) for m in found)


@cli.command()
@socket_option
@json_option
def status(socket_path: Path | None, *, as_json: bool) -> None:
    """Show what the server runs, on what, and how it does.

    \b
    Example:
      edge-agent status
    """
    from agent.client import ClientError

    with _client(socket_path) as client:
        try:
            found = client.status()
        except ClientError as error:
            fail(error)
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"edge-agent {found['agent_version']}, pid {found['pid']}, socket {client.socket_path}")
    rows = [_status_row(name, model, v) for name, model in found["models"].items() for v in model["versions"].values()]
    _table(("model", "version", "role", "state", "on", "requests", "failed", "mean ms", "MB"), rows)
    _reasons(
        (name, v["version"], v["reason"] or v["placement"]["fallback"])
        for name, model in found["models"].items()
        for v in model["versions"].values()
    )


def _status_row(name: str, model: Mapping[str, Any], version: Mapping[str, Any]) -> list[str]:
    number = version["version"]
    role = "active" if model["active"] == number else "previous" if model["previous"] == number else ""
    stats = version["stats"]
    count = stats["latency"]["count"]
    return [
        name,
        str(number),
        role,
        version["state"],
        version["placement"]["actual"],
        str(stats["requests"]),
        str(sum(stats["failed"].values())),
        f"{stats['latency']['sum_ms'] / count:.3f}" if count else "",
        f"{version['memory_bytes'] / 1e6:.1f}",
    ]


def _reasons(rows: Iterable[tuple[str, Any, str | None]]) -> None:
    for name, version, reason in rows:
        if reason:
            click.echo(f"\n{name}:{version}  {reason}")


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    Example:
      eval "$(edge-agent completion bash)"
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "edge-agent", "_EDGE_AGENT_COMPLETE").source())


if __name__ == "__main__":
    main()
