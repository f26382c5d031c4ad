"""What every command shares: help, errors as exit codes, the connection to the server, output for people or programs.

Heavy modules (HTTP client, tables, signing) are imported where they are used, so that `--help` and completion answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import quote

import click

from fleet_server.errors import FleetError, ServerRefused

if TYPE_CHECKING:
    from fleet_server.client import Client

P = ParamSpec("P")
R = TypeVar("R")

EXIT_FAILED, EXIT_REFUSED = 1, 3
SECRET_ENVIRONMENT = "EDGE_FLEET_KEY_SECRET"  # noqa: S105 - the name of the variable
"""The passphrase of a key file or the PIN of a hardware module, where nobody can be asked."""
EXAMPLE = "edge-fleet "
AS_WRITTEN = "\b\n"  # click folds a paragraph unless this stands before it


def _keeping_examples(text: str | None) -> str | None:
    """A help text whose paragraphs of commands stay as they are written."""
    if text is None:
        return None
    parts = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(AS_WRITTEN + part if part.startswith(EXAMPLE) else part for part in parts)


class Command(click.Command):
    """A command whose help shows its examples line by line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = _keeping_examples(self.help)


class Group(click.Group):
    """Commands in the order they are written, examples of the help kept as they are."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = _keeping_examples(self.help)

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)


def reports_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Every failure a command can meet becomes one line on stderr and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ServerRefused as error:
            click.echo(f"edge-fleet: refused by the server: {error} [{error.code}]", err=True)
            sys.exit(EXIT_REFUSED)
        except BrokenPipeError:
            raise  # whoever read went away; click ends quietly
        except (FleetError, OSError, ValueError) as error:
            click.echo(f"edge-fleet: {error}", err=True)
            sys.exit(EXIT_FAILED)

    return wrapped


@contextlib.contextmanager
def connected(ctx: click.Context) -> Iterator[Client]:
    """A client with the profile that was chosen."""
    from fleet_server.client import Client, Profile

    client = Client(Profile.read(profile_path(ctx)))
    try:
        yield client
    finally:
        client.close()


def profile_path(ctx: click.Context) -> Path:
    """The profile named on the command line, or where it stands otherwise."""
    from fleet_server.client import default_profile

    chosen: Path | None = ctx.find_root().params["profile"]
    return chosen or default_profile()


def with_json(function: Callable[P, R]) -> Callable[P, R]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(function)


def show(data: Any, as_json: bool, table: Callable[[Any], None]) -> None:
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        table(data)


def signer(key: Path) -> Any:
    """The signer in a key file, asking for its passphrase when it has one."""
    from fleet_server.releases import keys

    return keys.load(key, passphrase=secret_of(str(key)))


def signer_among(key: str, candidates: Iterable[Any]) -> Any:
    """The signer in a key file, or behind a URI: then the one whose public key is among `candidates`."""
    from fleet_server.releases import keys

    if keys.is_uri(key):
        return keys.open_uri(key, candidates, lambda what: _ask(f"{what} of {key}"))
    return signer(Path(key))


def secret_of(key: str) -> str | None:
    """The passphrase of a key file that has one."""
    from fleet_server.releases import keys

    if keys.is_uri(key) or not keys.is_encrypted(Path(key)):
        return None
    return _ask(f"Passphrase of {key}")


def _ask(what: str) -> str:
    """A secret from the environment (for programs), else from whoever sits there."""
    given = os.environ.get(SECRET_ENVIRONMENT)
    return given if given is not None else str(click.prompt(what, hide_input=True, err=True))


def segment(text: str) -> str:
    """`text` as one part of a path."""
    return quote(text, safe="")
