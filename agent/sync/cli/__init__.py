"""`edge-agent sync | enrol | trial | doctor | tuf`, and those of `operator`. Nothing heavy is imported before a command
runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.host import logs
from agent.sync.cli.common import config_option, fail, json_option, load
from agent.sync.cli.importing import import_
from agent.sync.cli.operator import approve, hold, quarantine, rollback, unhold, updates, why

if TYPE_CHECKING:
    from agent.sync.operator.findings import Finding

_MARKS = {"ok": "✓", "warning": "!", "failed": "✗", "skipped": "-"}


@click.command()
@config_option
@click.option("--verbose", is_flag=True, help="Log more.")
def sync(config_path: Path | None, *, verbose: bool) -> None:
    """Follow the fleet: verify, download, try, activate and watch releases. Ends on SIGTERM."""
    config = load(config_path)
    logs.set_up(logging.DEBUG if verbose else logging.INFO)
    from agent.store import StoreError
    from agent.sync import app
    from agent.sync.identity import IdentityError
    from agent.sync.problems import Problem

    try:
        app.main(config)
    except (StoreError, IdentityError, Problem) as error:
        fail(str(error))
    except OSError as error:
        fail(f"the store {config.store} cannot be used: {error}")


@click.command()
@click.argument("string")
@click.option("--device", help="The id to ask for; without it the fleet server chooses.")
@click.option("--force", is_flag=True, help="Replace the identity this device has.")
@config_option
def enrol(string: str, device: str | None, config_path: Path | None, *, force: bool) -> None:
    """Join a fleet with the STRING its operator gave you (edge://TOKEN@HOST:PORT/?ca=...); - reads it from standard input.

    \b
    Examples:
      edge-agent enrol 'edge://…'
      edge-fleet token create | ssh camera-1 edge-agent enrol -
    """
    if string == "-":
        string = sys.stdin.readline().strip()
    config = load(config_path)
    from agent.host import hardware
    from agent.host.clock import SystemClock
    from agent.sync.fleet import enrol as enrolment
    from agent.sync.identity import IdentityError
    from agent.sync.proxy import Way

    try:
        who = enrolment.enrol(
            string,
            config.sync.identity,
            SystemClock(),
            device=device,
            hardware=hardware.probe(),
            force=force,
            way=Way.configured(config.sync),
        )
    except (enrolment.EnrolmentFailed, IdentityError, ValueError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"the identity cannot be written to {config.sync.identity}: {error}")
    click.echo(f"enrolled as {who.device!r} in fleet {who.address.fleet!r}; identity in {who.folder}")
    click.echo("next: systemctl restart edge-agent-sync (or run `edge-agent sync`)")


@click.command(hidden=True)
def trial() -> None:
    """Try one release: a request on stdin, a verdict on stdout. Started by sync, or by systemd with a socket."""
    from agent.sync.trials import child

    sys.exit(child.main())


@click.command()
@config_option
@json_option
def doctor(config_path: Path | None, *, as_json: bool) -> None:
    """Check everything an update needs. Exit status 1 when something is missing."""
    from agent.sync.operator.doctor import examine

    findings = list(examine(config_path))
    if as_json:
        click.echo(json.dumps([_as_dict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(f"{_MARKS[finding.level]} {finding.name}: {finding.message}")
            if finding.advice:
                click.echo(f"    → {finding.advice}")
    sys.exit(1 if any(finding.level == "failed" for finding in findings) else 0)


def _as_dict(finding: Finding) -> dict[str, Any]:
    import msgspec

    return dict(msgspec.structs.asdict(finding))


@click.group()
@click.option(
    "--metadata-dir", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where verified metadata is kept."
)
@click.option("--metadata-url", help="Where the repository's metadata is.")
@click.option("--target-name", "target_names", multiple=True, help="The target to download. Repeatable.")
@click.option("--target-dir", type=click.Path(path_type=Path, file_okay=False), help="Where downloaded targets go.")
@click.option("--target-base-url", help="Where the repository's targets are.")
@click.pass_context
def tuf(ctx: click.Context, /, **_options: object) -> None:
    """Verify any TUF repository the way this device verifies its fleet's.

    This is the command line that the public conformance suite for TUF clients drives. Options stand before the command.

    \b
    Examples:
      edge-agent tuf --metadata-dir m init root.json
      edge-agent tuf --metadata-dir m --metadata-url https://example.com/metadata refresh
      edge-agent tuf --metadata-dir m --metadata-url https://example.com/metadata \\
        --target-name a/b.txt --target-dir t --target-base-url https://example.com/targets download
    """
    ctx.obj = ctx.params


@tuf.command("init")
@click.argument("trusted_root", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_obj
def tuf_init(options: dict[str, Any], trusted_root: Path) -> None:
    """Trust the root in a file. Asks nobody."""
    from agent.sync.operator import tuf as repository

    with _told():
        repository.init(options["metadata_dir"], trusted_root)


@tuf.command("refresh")
@click.pass_obj
def tuf_refresh(options: dict[str, Any]) -> None:
    """Bring the metadata up to date."""
    from agent.sync.operator import tuf as repository

    _demand(options, "metadata_url")
    with _told():
        repository.refresh(options["metadata_dir"], options["metadata_url"])


@tuf.command("download")
@click.pass_obj
def tuf_download(options: dict[str, Any]) -> None:
    """Bring the metadata up to date, then fetch the named targets. One that is there already is not fetched again."""
    from agent.sync.operator import tuf as repository

    _demand(options, "metadata_url", "target_names", "target_dir", "target_base_url")
    with _told():
        repository.download(
            options["metadata_dir"],
            options["metadata_url"],
            options["target_base_url"],
            options["target_dir"],
            options["target_names"],
        )


def _demand(options: dict[str, Any], *names: str) -> None:
    for name in names:
        if not options[name]:
            option = "--" + name.removesuffix("s" if name == "target_names" else "").replace("_", "-")
            raise click.UsageError(f"{option} is needed for this command, and stands before it")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    from agent.sync.problems import Problem

    try:
        yield
    except Problem as problem:
        fail(f"{problem.reason.value}: {problem}")
    except OSError as error:
        fail(str(error))


COMMANDS = (sync, enrol, import_, trial, doctor, updates, why, approve, hold, unhold, rollback, quarantine, tuf)
"""The commands that `edge-agent` has from here."""
