"""What every command shares: help, errors as exit codes, the connection to the server, output for people or programs.

Heavy modules (HTTP client, tables, signing) are imported where they are used, so that `--help` and completion answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import quote

import click

from fleet_server.errors import FleetError, Invalid, ServerRefused

if TYPE_CHECKING:
    from fleet_server.client import Client

P = ParamSpec("P")
R = TypeVar("R")

EXIT_FAILED, EXIT_REFUSED, EXIT_TOO_LATE = 1, 3, 4
SECRET_ENVIRONMENT = "EDGE_FLEET_KEY_SECRET"  # noqa: S105 - the name of the variable
"""The passphrase of a key file or the PIN of a hardware module, where nobody can be asked."""
SECRET_FILE_ENVIRONMENT = "EDGE_FLEET_KEY_SECRET_FILE"  # noqa: S105 - as above
"""A file whose first line it is; `-` for standard input."""
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
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

    client = Client(Profile.chosen(ctx.find_root().params["profile"]))
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


def new_secret(what: str) -> str:
    """A passphrase to encrypt with: from where `_ask` takes one, or typed twice.  Raises: Invalid when it is empty."""
    return _ask(what, twice=True)


def _ask(what: str, *, twice: bool = False) -> str:
    """A secret from the environment or a file (for programs), else from whoever sits there.  Raises: Invalid when it is empty."""
    given = _given_secret()
    if given is None:
        given = str(click.prompt(what, hide_input=True, confirmation_prompt=twice, err=True))
    if not given:
        raise Invalid(f"{what}: an empty one protects nothing")
    return given


@functools.cache
def _given_secret() -> str | None:
    """Read once: standard input has it only once."""
    if (given := os.environ.get(SECRET_ENVIRONMENT)) is not None:
        return given
    file = os.environ.get(SECRET_FILE_ENVIRONMENT)
    if file is None:
        return None
    if file == "-":
        return sys.stdin.readline().rstrip("\r\n")
    return (Path(file).read_text().splitlines() or [""])[0]


def agreed(question: str, *, yes: bool) -> None:
    """Goes on when `yes` was said on the command line or is said now.  Raises: click.Abort; Invalid when there is nobody to ask."""
    if yes:
        return
    try:
        said = click.confirm(question, err=True)
    except click.Abort:  # the end of the input, or Ctrl-C
        if not sys.stdin.isatty():
            raise Invalid("nobody can be asked here; say --yes") from None
        raise
    if not said:
        raise click.Abort


def duration(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """`30m` → 1800.0, for an option's callback.  Raises: click.BadParameter."""
    if value is None:
        return None
    found = _DURATION.fullmatch(value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a duration; write for example 30s, 30m, 24h or 7d")
    return float(found[1]) * _UNIT_S[found[2]]


def segment(text: str) -> str:
    """`text` as one part of a path."""
    return quote(text, safe="")
