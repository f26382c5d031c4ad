"""`edge-agent predict`: arrays from files in, arrays out."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import click

from agent.cli.common import client_at, fail, json_option, socket_option

STDIN = "-"
MAX_SHOWN = 80  # of a file's name


@click.command()
@click.argument("model")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]FILE",
    help="A .npy file, or a .npz with one array per input; `-` is standard input. A model without inputs needs none.",
)
@click.option("--version", "version", help="A version or label (stable, candidate, previous)  [default: the active one]")
@click.option("--signature", default="", help="One of the model's file; names are then that one's  [default: none]")
@click.option("--top", type=click.IntRange(1), metavar="K", help="Show only the K largest values of each row.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the results to this .npz file.")
@click.option("--timeout", default=30.0, show_default=True, metavar="SECONDS")
@socket_option
@json_option
def predict(
    model: str,
    inputs: tuple[str, ...],
    version: str | None,
    signature: str,
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

    What is a file as it stands is taken as one, without a name. Otherwise the name ends at the last "=" behind which a file is
    named.
    """
    import numpy as np

    from agent.client import ClientError

    with client_at(socket_path) as client:
        try:
            feeds = read_feeds(inputs)
            given = feeds.pop("") if set(feeds) == {""} else feeds
            results = client.infer(model, given, version=version, timeout_s=timeout, signature=signature)
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


def read_feeds(inputs: tuple[str, ...]) -> dict[str, Any]:
    """Input name → array; the name is empty for a single unnamed file."""
    feeds: dict[str, Any] = {}
    for text in inputs:
        name, path = named_file(text)
        for key, array in _read_arrays(path, name).items():
            if key in feeds or ("" in feeds and key):
                raise click.UsageError(f"input {key or path!r} is given twice, or some inputs have no name: use NAME={path}")
            feeds[key] = array
    return feeds


def named_file(text: str) -> tuple[str, str]:
    """The name, empty for none, and the file of `[NAME=]FILE`, both of which may have an "=" in them."""
    if "=" not in text or _is_file(text):
        return "", text
    cuts = [at for at, letter in enumerate(text) if letter == "="]
    at = next((at for at in reversed(cuts) if _is_file(text[at + 1 :])), cuts[-1])
    return text[:at], text[at + 1 :]


def _is_file(text: str) -> bool:
    try:
        return text == STDIN or Path(text).exists()
    except (OSError, ValueError):  # longer than any name may be, or with a null in it
        return False


def _read_arrays(path: str, name: str) -> dict[str, Any]:
    import numpy as np

    shown = "standard input" if path == STDIN else repr(path if len(path) <= MAX_SHOWN else f"{path[:MAX_SHOWN]}…")
    if not path:
        raise click.UsageError(f"no file is named behind {name + '='!r}: use NAME=FILE")
    try:
        found = np.load(io.BytesIO(sys.stdin.buffer.read()) if path == STDIN else path, allow_pickle=False)
        if not hasattr(found, "files"):
            return {name: found}
        with found:
            arrays = {key: found[key] for key in found.files}
    except FileNotFoundError:
        raise click.UsageError(f"{shown} does not exist") from None
    except IsADirectoryError:
        raise click.UsageError(f"{shown} is a folder: name a .npy or .npz file") from None
    except zipfile.BadZipFile as error:
        fail(f"{shown} is not a NumPy file: {error}")
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.EACCES):
            raise click.UsageError(f"{shown} cannot be opened: {os.strerror(error.errno)}") from None
        fail(f"{shown} is not a NumPy file without pickled objects: {error}")
    if not name:
        return arrays
    if name in arrays:
        return {name: arrays[name]}
    if len(arrays) == 1:
        return {name: next(iter(arrays.values()))}
    raise click.UsageError(f"{shown} has the arrays {', '.join(arrays)}: none is called {name!r}")


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
