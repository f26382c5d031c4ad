"""`edge-agent sync | enroll | trial | doctor | updates | hold | rollback | tuf`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from agent.host import logs

if TYPE_CHECKING:
    from agent.config import AgentConfig
    from agent.sync.doctor import Finding

_config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="agent.yaml (default: /etc/edge-agent/agent.yaml).",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_MARKS = {"ok": "✓", "warning": "!", "failed": "✗", "skipped": "-"}


def _fail(message: str) -> NoReturn:
    click.echo(f"edge-agent: {message}", err=True)
    sys.exit(1)


def _load(config_path: Path | None) -> AgentConfig:
    from agent import config

    try:
        return config.load(config_path)
    except config.ConfigError as error:
        _fail(str(error))


@click.command()
@_config_option
@click.option("--verbose", is_flag=True, help="Log more.")
def sync(config_path: Path | None, *, verbose: bool) -> None:
    """Follow the fleet: verify, download, try, activate and watch releases. Ends on SIGTERM."""
    config = _load(config_path)
    logs.set_up(logging.DEBUG if verbose else logging.INFO)
    from agent.store import StoreError
    from agent.sync import app
    from agent.sync.identity import IdentityError
    from agent.sync.problems import Problem

    try:
        app.main(config)
    except (StoreError, IdentityError, Problem) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"the store {config.store} cannot be used: {error}")


@click.command()
@click.argument("string")
@click.option("--device", help="The id to ask for; without it the fleet server chooses.")
@click.option("--force", is_flag=True, help="Replace the identity this device has.")
@_config_option
def enroll(string: str, device: str | None, config_path: Path | None, *, force: bool) -> None:
    """Join a fleet with the STRING its operator gave you (edge://TOKEN@HOST:PORT/?ca=...); - reads it from standard input.

    \b
    Examples:
      edge-agent enroll 'edge://…'
      edge-fleet token create | ssh camera-1 edge-agent enroll -
    """
    if string == "-":
        string = sys.stdin.readline().strip()
    config = _load(config_path)
    from agent.host import hardware
    from agent.host.clock import SystemClock
    from agent.sync import enrol
    from agent.sync.identity import IdentityError

    try:
        who = enrol.enrol(string, config.sync.identity, SystemClock(), device=device, hardware=hardware.probe(), force=force)
    except (enrol.EnrolmentFailed, IdentityError, ValueError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"the identity cannot be written to {config.sync.identity}: {error}")
    click.echo(f"enrolled as {who.device!r} in fleet {who.address.fleet!r}; identity in {who.folder}")
    click.echo("next: systemctl restart edge-agent-sync (or run `edge-agent sync`)")


@click.command(hidden=True)
def trial() -> None:
    """Try one release: a request on stdin, a verdict on stdout. Started by sync, or by systemd with a socket."""
    from agent.sync import trial_child

    sys.exit(trial_child.main())


@click.command()
@_config_option
@_json_option
def doctor(config_path: Path | None, *, as_json: bool) -> None:
    """Check everything an update needs. Exit status 1 when something is missing."""
    from agent.sync.doctor import examine

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


@click.command()
@_config_option
@_json_option
@click.option("--forget", metavar="MODEL:VERSION", help="Let this device try a release again that it refused.")
def updates(config_path: Path | None, forget: str | None, *, as_json: bool) -> None:
    """Show where each model's update stands, its answers, and the releases this device refuses."""
    config = _load(config_path)
    from agent.contract.names import ReleaseRef
    from agent.store import Store
    from agent.sync import overview

    store = Store(config.store)
    try:
        if forget is not None:
            ref = ReleaseRef.parse(forget)
            done = overview.forget(store, ref)
            click.echo(f"{ref} may be tried again" if done else f"{ref} was not refused here")
            return
        models = overview.read(store)
    except (ValueError, OSError) as error:
        _fail(str(error))
    if as_json:
        click.echo(json.dumps(models, indent=2))
    else:
        click.echo(overview.text(models), nl=False)


@click.command()
@click.argument("model")
@click.option("--lift", is_flag=True, help="Let the model follow the fleet again.")
@_config_option
def hold(model: str, config_path: Path | None, *, lift: bool) -> None:
    """Keep a model on the release that serves now, whatever the fleet wants. Only a withdrawal is stronger."""
    config = _load(config_path)
    from agent.store import Store, StoreError
    from agent.sync import overview
    from agent.sync.holds import Holds

    store = Store(config.store)
    try:
        store.check_format()
        if lift:
            done = Holds(store.private / "holds").lift(model)
            click.echo(f"{model} follows the fleet again" if done else f"{model} was not held")
        else:
            click.echo(f"{model} is held on release {overview.hold(store, model)}; `edge-agent hold --lift {model}` ends it")
    except (StoreError, ValueError, OSError) as error:
        _fail(str(error))


@click.command()
@click.argument("model")
@click.option("--to", "version", type=int, help="The release to go back to  [default: the last other one committed here].")
@_config_option
def rollback(model: str, version: int | None, config_path: Path | None) -> None:
    """Go back to a release that was committed on this device, and stay on it. Works without any network."""
    config = _load(config_path)
    from agent.store import Store, StoreError
    from agent.sync import overview

    store = Store(config.store)
    try:
        store.check_format()
        version = overview.go_back(store, model, version)
    except (StoreError, ValueError, OSError) as error:
        _fail(str(error))
    click.echo(f"{model} goes back to release {version} within seconds, and stays there until `edge-agent hold --lift {model}`")


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
    from agent.sync import tuf as repository

    with _told():
        repository.init(options["metadata_dir"], trusted_root)


@tuf.command("refresh")
@click.pass_obj
def tuf_refresh(options: dict[str, Any]) -> None:
    """Bring the metadata up to date."""
    from agent.sync import tuf as repository

    _demand(options, "metadata_url")
    with _told():
        repository.refresh(options["metadata_dir"], options["metadata_url"])


@tuf.command("download")
@click.pass_obj
def tuf_download(options: dict[str, Any]) -> None:
    """Bring the metadata up to date, then fetch the named targets. One that is there already is not fetched again."""
    from agent.sync import tuf as repository

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
        _fail(f"{problem.reason.value}: {problem}")
    except OSError as error:
        _fail(str(error))


COMMANDS = (sync, enroll, trial, doctor, updates, hold, rollback, tuf)
"""For `edge-agent`'s group."""
