"""What a command is: its help, its errors as exit codes, its connection to the server, its output for people or programs.

Heavy modules (HTTP client, tables, signing) are imported where they are used, so that `--help` and completion answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
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

EXIT_FAILED, EXIT_REFUSED, EXIT_TOO_LATE, EXIT_ASKS = 1, 3, 4, 5
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
EXAMPLE = "edge-fleet "
AS_WRITTEN = "\b\n"  # click folds a paragraph unless this stands before it

RENAMED_COMMANDS = {
    "devices": "device list",
    "releases": "release list",
    "rollout lift": "exclusion end",
    "rollout stopped": "exclusion list",
}
RENAMED_OPTIONS = {"--hold": "--confirm", "--together": "--team"}
"""Commands and options that were called otherwise → what they are called now."""


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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises: click.UsageError that says what an option is called now."""
        known = {option for parameter in self.params for option in parameter.opts}
        former = next((name for name in args if name in RENAMED_OPTIONS and name not in known), None)
        if former is not None:
            raise click.UsageError(f"{former} is called {RENAMED_OPTIONS[former]} now", ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """Commands in the order they are written, examples of the help kept as they are."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = _keeping_examples(self.help)

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises: click.UsageError that says what a command is called now."""
        above: list[str] = []
        where: click.Context | None = ctx
        while where is not None and where.parent is not None:
            above.insert(0, str(where.info_name))
            where = where.parent
        former = " ".join([*above, args[0]])
        if args[0] not in self.commands and former in RENAMED_COMMANDS:
            now = RENAMED_COMMANDS[former]
            group = self.commands.get(now.partition(" ")[0])
            if isinstance(group, click.Group) and len(args) > 1 and args[1] in group.commands:  # `devices show` and its like
                former, now = f"{former} {args[1]}", f"{group.name} {args[1]}"
            raise click.UsageError(f"`{EXAMPLE}{former}` is called `{EXAMPLE}{now}` now", ctx)
        return super().resolve_command(ctx, args)


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


def with_scope(function: Callable[P, R]) -> Callable[P, R]:
    return click.option(
        "--scope",
        "scopes",
        multiple=True,
        metavar="KIND:VALUES",
        help="Whom it is for, in place of everyone: group:canary,beta, label:site=berlin, class:aarch64/-/- or device:a,b. Repeatable: a "
        "device must meet all of them, and meets one by any of its values.",
    )(function)


def with_json(function: Callable[P, R]) -> Callable[P, R]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(function)


def with_plan(function: Callable[P, R]) -> Callable[P, R]:
    return click.option("--plan", is_flag=True, help="Show what it would do to which devices, and change nothing.")(function)


def show(data: Any, as_json: bool, table: Callable[[Any], None]) -> None:
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        table(data)


def agreed(question: str, *, yes: bool) -> None:
    """Returns when `yes` was said on the command line or is said now.  Raises: click.Abort; Invalid when there is nobody to
    ask.
    """
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


def labels_in(texts: Iterable[str]) -> dict[str, str]:
    """`site=berlin` → its name and its value.  Raises: click.UsageError."""
    pairs = {text: text.partition("=") for text in texts}
    if wrong := [text for text, (_, equals, _) in pairs.items() if not equals]:
        raise click.UsageError(f"{wrong[0]!r} is not NAME=VALUE, such as site=berlin")
    return {name: value for name, _, value in pairs.values()}


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
