"""edge-fleet: makes and runs the fleet server, and is its operators' command line. Exit codes: 0 ok, 1 failed, 2 usage, 3 refused by the server."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from agent.contract import names
from fleet_server import display
from fleet_server.client import Client, Profile, ServerRefused, default_profile, segment
from fleet_server.errors import FleetError, Unavailable

P = ParamSpec("P")
R = TypeVar("R")

EXIT_FAILED, EXIT_REFUSED = 1, 3
WATCH_S = 1.0
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)")
UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Group(click.Group):
    """Commands in the order they are written, examples of the help kept as they are."""

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
        except (FleetError, OSError, ValueError) as error:
            click.echo(f"edge-fleet: {error}", err=True)
            sys.exit(EXIT_FAILED)
        except BrokenPipeError:
            sys.exit(EXIT_FAILED)

    return wrapped


@contextlib.contextmanager
def connected(ctx: click.Context) -> Iterator[Client]:
    """A client with the profile that was chosen."""
    client = Client(Profile.read(ctx.find_root().params["profile"] or default_profile()))
    try:
        yield client
    finally:
        client.close()


def with_json(function: Callable[P, R]) -> Callable[P, R]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(function)


def show(data: Any, as_json: bool, table: Callable[[Any], None]) -> None:
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        table(data)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--profile", type=click.Path(path_type=Path), help="Where the server and your token stand [env: EDGE_FLEET_PROFILE]."
)
@click.version_option(package_name="edge-inference-agent")
def main(profile: Path | None) -> None:
    r"""Runs a fleet of edge inference devices: signed releases, staged rollouts, roll-back.

    \b
    edge-fleet init /srv/fleet --fleet demo --host fleet.example.com
    edge-fleet serve /srv/fleet
    edge-fleet token create --group canary        # the string a device enrols with
    edge-fleet publish RELEASE.yaml --key releases.key
    edge-fleet rollout start digits:4 --group canary
    """
    del profile  # read from the context by `connected`


# -- the server itself ---------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--fleet", default="fleet", show_default=True, help="The fleet's name; devices remember it.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME_OR_IP",
    help="How devices and operators reach this machine. Repeatable; the first one is what devices are told. Default: this machine's name.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the offline keys are written [default: FOLDER/keys-offline].",
)
@click.option("--passphrase/--no-passphrase", default=False, help="Ask for a passphrase and encrypt the offline keys with it.")
@click.option("--operator-port", type=click.IntRange(1, 65535), default=8443, show_default=True)
@click.option("--device-port", type=click.IntRange(1, 65535), default=8444, show_default=True)
@click.option("--broker-port", type=click.IntRange(1, 65535), default=8883, show_default=True)
@click.option(
    "--loopback-port", type=click.IntRange(1, 65535), help="Plain HTTP for this machine only: a local browser, a reverse proxy."
)
@click.pass_context
@reports_errors
def init(
    ctx: click.Context, folder: Path, fleet: str, hosts: tuple[str, ...], keys: Path | None, *, passphrase: bool, operator_port: int,
    device_port: int, broker_port: int, loopback_port: int | None,
) -> None:  # fmt: skip
    r"""Makes the data folder of a new fleet: CA, keys, signed metadata, database, first admin token.

    \b
    edge-fleet init /srv/fleet --fleet demo --host fleet.example.com --host 192.0.2.10
    """
    from fleet_server import setup
    from fleet_server.config import BrokerSettings, FleetConfig, Folder

    config = FleetConfig(
        fleet=fleet, hosts=hosts or (socket.getfqdn(),), operator_port=operator_port, device_port=device_port,
        loopback_port=loopback_port, broker=BrokerSettings(port=broker_port),
    )  # fmt: skip
    secret = click.prompt("Passphrase for the offline keys", hide_input=True, confirmation_prompt=True) if passphrase else None
    made = setup.init(
        Folder(folder), config, offline_keys=keys or folder / "keys-offline",
        profile=ctx.find_root().params["profile"] or default_profile(), passphrase=secret,
    )  # fmt: skip
    click.echo(display.made(made, folder))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
@reports_errors
def serve(folder: Path, log_level: str) -> None:
    r"""Runs the fleet server: operators' and devices' listeners, broker, dashboard. Ends cleanly on SIGTERM or Ctrl-C.

    \b
    edge-fleet serve /srv/fleet
    """
    from fleet_server import app
    from fleet_server.config import Folder
    from fleet_server.releases.repository import RepositoryDamaged
    from fleet_server.storage.database import DatabaseError

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.root.level))
    logging.getLogger("tuf").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        app.serve(Folder(folder.absolute()))
    except (RepositoryDamaged, DatabaseError) as error:
        raise Unavailable(str(error)) from error


@main.command("renew-root")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--root-key", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The offline root key.")
@click.option(
    "--releases-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Renew the releases role too; publishing does that by itself.",
)
@reports_errors
def renew_root(folder: Path, root_key: Path, releases_key: Path | None) -> None:
    r"""Signs root and targets for another year. Once a year, with the server stopped and the offline keys at hand.

    \b
    edge-fleet renew-root /srv/fleet --root-key /media/usb/root.key
    """
    from fleet_server import app
    from fleet_server.config import Folder, load

    where = Folder(folder.absolute())
    with app.locked(where):
        fleet = app.Fleet(where, load(where))
        try:
            renewed = fleet.repository.renew_offline(_signer(root_key), _signer(releases_key) if releases_key else None)
        finally:
            fleet.close()
    click.echo(f"signed for another year: {', '.join(renewed)}")


def _signer(key: Path) -> Any:
    """The signer in a key file, asking for its passphrase when it has one."""
    from fleet_server.releases import keys as signing

    secret = click.prompt(f"Passphrase of {key}", hide_input=True, err=True) if signing.is_encrypted(key) else None
    return signing.load(key, passphrase=secret)


# -- releases ------------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("release_yaml", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--key", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The offline releases key.")
@click.option("--yes", is_flag=True, help="Do not ask before signing.")
@with_json
@click.pass_context
@reports_errors
def publish(ctx: click.Context, release_yaml: Path, key: Path, *, yes: bool, as_json: bool) -> None:
    r"""Signs a release on this machine and uploads it. The key never leaves this machine.

    \b
    edge-fleet publish digits/RELEASE.yaml --key /media/usb/releases.key
    """
    from fleet_server.releases import builder

    signer = _signer(key)
    built = builder.build(release_yaml)
    if not as_json:
        display.manifest(built.manifest)
    if not yes and not click.confirm(f"Sign and publish {built.manifest.ref}?", err=True):
        raise click.Abort
    with connected(ctx) as client:
        display.upload(client, built, quiet=as_json)
        published = _sign_and_send(client, built.manifest, signer)
    show(published, as_json, lambda data: click.echo(f"published {data['release']}, signed with {', '.join(data['signers'])}"))


def _sign_and_send(client: Client, manifest: Any, signer: Any) -> Any:
    """Once more when somebody else published in between."""
    from fleet_server.releases import publisher

    for attempt in (1, 2):
        now = client.get("/publishing")
        role = publisher.verified(now["root"].encode(), now["targets"].encode(), now["releases"].encode())
        data, metadata = publisher.add(role, manifest, signer, time.time())
        try:
            return client.post("/releases", {"manifest": data.decode(), "metadata": metadata.decode()})
        except ServerRefused as error:
            if error.code != "stale_metadata" or attempt == 2:
                raise
    raise AssertionError("unreachable")


@main.command()
@click.option("--model", help="Only this model.")
@with_json
@click.pass_context
@reports_errors
def releases(ctx: click.Context, model: str | None, *, as_json: bool) -> None:
    r"""Lists published releases.

    \b
    edge-fleet releases --model digits
    """
    with connected(ctx) as client:
        show(client.get("/releases", model=model), as_json, display.releases)


@main.command()
@click.argument("release")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
@reports_errors
def withdraw(ctx: click.Context, release: str, *, yes: bool) -> None:
    r"""Forbids a release for good: no device may run it; those that do go back to the one before.

    \b
    edge-fleet withdraw digits:4
    """
    ref = names.ReleaseRef.parse(release)
    if not yes and not click.confirm(f"Withdraw {ref} for good?", err=True):
        raise click.Abort
    with connected(ctx) as client:
        client.post(f"/releases/{segment(ref.model)}/{ref.version}/withdraw")
    click.echo(f"{ref} is withdrawn")


# -- rollouts ------------------------------------------------------------------------------------------------------------------


@main.group(cls=Group)
def rollout() -> None:
    """Staged changes of what the fleet runs."""


@rollout.command("start")
@click.argument("release")
@click.option("--group", "groups", multiple=True, help="First wave: devices in this group. Repeatable.")
@click.option("--percent", type=click.FloatRange(0, 100, min_open=True), help="First wave: this share of the devices.")
@click.option("--hold", is_flag=True, help="Wait for `rollout promote` between waves.")
@click.option(
    "--max-failures", type=click.IntRange(0), default=0, show_default=True, help="Devices that may refuse it or roll back."
)
@with_json
@click.pass_context
@reports_errors
def rollout_start(
    ctx: click.Context,
    release: str,
    groups: tuple[str, ...],
    percent: float | None,
    *,
    hold: bool,
    max_failures: int,
    as_json: bool,
) -> None:
    r"""Begins a rollout: the first wave is what you name, then everyone. Naming nothing means everyone at once.

    \b
    edge-fleet rollout start digits:4 --group canary --hold
    edge-fleet rollout start digits:4 --percent 10 --max-failures 1
    """
    body = {"release": release, "groups": list(groups), "percent": percent, "hold": hold, "max_failures": max_failures}
    with connected(ctx) as client:
        show(client.post("/rollouts", body), as_json, display.rollout)


@rollout.command("status")
@click.argument("rollout_id", required=False)
@click.option("--watch", is_flag=True, help="Follow it until it is over. Exit code 1 when it is aborted.")
@with_json
@click.pass_context
@reports_errors
def rollout_status(ctx: click.Context, rollout_id: str | None, *, watch: bool, as_json: bool) -> None:
    r"""Shows one rollout, or without an id the newest one.

    \b
    edge-fleet rollout status --watch
    edge-fleet rollout status r3-9f1c --json
    """
    with connected(ctx) as client:
        chosen = rollout_id or _newest(client)
        last = None
        while True:
            data = client.get(f"/rollouts/{segment(chosen)}")
            if data != last:
                show(data, as_json, display.rollout)
                last = data
            if not watch or data["state"] in {"completed", "aborted"}:
                break
            time.sleep(WATCH_S)
    if watch and data["state"] == "aborted":
        sys.exit(EXIT_FAILED)


def _newest(client: Client) -> str:
    found = client.get("/rollouts", limit=1)
    if not found:
        raise FleetError("there was no rollout yet; begin one with `edge-fleet rollout start MODEL:VERSION`")
    return str(found[0]["id"])


@rollout.command("list")
@click.option("--model", help="Only this model.")
@with_json
@click.pass_context
@reports_errors
def rollout_list(ctx: click.Context, model: str | None, *, as_json: bool) -> None:
    r"""Lists rollouts, newest first.

    \b
    edge-fleet rollout list
    """
    with connected(ctx) as client:
        show(client.get("/rollouts", model=model), as_json, display.rollouts)


def _rollout_verb(verb: str, text: str) -> None:
    @rollout.command(verb, help=f"{text}\n\n\b\nedge-fleet rollout {verb} r3-9f1c")
    @click.argument("rollout_id")
    @with_json
    @click.pass_context
    @reports_errors
    def command(ctx: click.Context, rollout_id: str, *, as_json: bool) -> None:
        with connected(ctx) as client:
            show(client.post(f"/rollouts/{segment(rollout_id)}/{verb}"), as_json, display.rollout)


_rollout_verb("promote", "Begins the next wave of a rollout that waits for it.")
_rollout_verb("pause", "Begins no further wave; devices already reached go on.")
_rollout_verb("resume", "Lets a paused rollout go on.")
_rollout_verb("abort", "Ends a rollout; every device goes back to the release before.")


@main.command()
@click.argument("model")
@click.option("--to", "version", type=click.IntRange(1), help="The version to go back to [default: the one before].")
@with_json
@click.pass_context
@reports_errors
def rollback(ctx: click.Context, model: str, version: int | None, *, as_json: bool) -> None:
    r"""Takes every device back to an earlier release at once.

    \b
    edge-fleet rollback digits
    edge-fleet rollback digits --to 2
    """
    with connected(ctx) as client:
        done = client.post(f"/models/{segment(model)}/rollback", {"to": version})
    show(done, as_json, lambda data: click.echo(f"{data['model']} goes back from version {data['left']} to {data['release']}"))


# -- devices -------------------------------------------------------------------------------------------------------------------


@main.group(cls=Group, invoke_without_command=True)
@click.option("--group", help="Only devices in this group.")
@click.option("--model", help="Only devices that report this model.")
@with_json
@click.pass_context
@reports_errors
def devices(ctx: click.Context, group: str | None, model: str | None, *, as_json: bool) -> None:
    r"""Lists devices and what each runs.

    \b
    edge-fleet devices --group canary
    edge-fleet devices show dev-1
    """
    if ctx.invoked_subcommand is None:
        with connected(ctx) as client:
            show(_all_devices(client, group, model), as_json, display.devices)


def _all_devices(client: Client, group: str | None, model: str | None) -> list[Any]:
    found: list[Any] = []
    while page := client.get("/devices", group=group, model=model, limit=1000, after=found[-1]["id"] if found else None):
        found += page
        if len(page) < 1000:
            break
    return found


@devices.command("show")
@click.argument("device")
@with_json
@click.pass_context
@reports_errors
def devices_show(ctx: click.Context, device: str, *, as_json: bool) -> None:
    r"""Shows one device with its models and last answers.

    \b
    edge-fleet devices show dev-1
    """
    with connected(ctx) as client:
        show(client.get(f"/devices/{segment(device)}"), as_json, display.device)


@devices.command("group")
@click.argument("device")
@click.argument("groups", nargs=-1)
@with_json
@click.pass_context
@reports_errors
def devices_group(ctx: click.Context, device: str, groups: tuple[str, ...], *, as_json: bool) -> None:
    r"""Puts a device in exactly these groups; without any, in none.

    \b
    edge-fleet devices group dev-1 canary warsaw
    """
    with connected(ctx) as client:
        data = client.put(f"/devices/{segment(device)}/groups", {"groups": list(groups)})
    show(data, as_json, lambda d: click.echo(f"{d['id']} is in {', '.join(d['groups']) or 'no group'}"))


@devices.command("revoke")
@click.argument("device")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
@reports_errors
def devices_revoke(ctx: click.Context, device: str, *, yes: bool) -> None:
    r"""Shuts a device out: stolen, broken, sold. It goes on serving what it has.

    \b
    edge-fleet devices revoke dev-1
    """
    if not yes and not click.confirm(f"Shut {device} out of the fleet?", err=True):
        raise click.Abort
    with connected(ctx) as client:
        client.post(f"/devices/{segment(device)}/revoke")
    click.echo(f"{device} is shut out")


@devices.command("delete")
@click.argument("device")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
@reports_errors
def devices_delete(ctx: click.Context, device: str, *, yes: bool) -> None:
    r"""Shuts a device out and forgets it; its id can be enrolled again.

    \b
    edge-fleet devices delete dev-1
    """
    if not yes and not click.confirm(f"Delete {device}?", err=True):
        raise click.Abort
    with connected(ctx) as client:
        client.delete(f"/devices/{segment(device)}")
    click.echo(f"{device} is deleted")


@main.group(cls=Group)
def token() -> None:
    """Enrolment tokens: what lets devices join."""


def _duration(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    found = DURATION.fullmatch(value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a duration; write for example 30m, 24h or 7d")
    return float(found[1]) * UNIT_S[found[2]]


@token.command("create")
@click.option("--device", help="Only this device id may join with it.")
@click.option("--group", "groups", multiple=True, help="Put devices that join with it in this group. Repeatable.")
@click.option("--uses", type=click.IntRange(1), default=1, show_default=True, help="How many devices may join with it.")
@click.option("--ttl", default="24h", show_default=True, callback=_duration, help="How long it is good for: 30m, 24h, 7d.")
@with_json
@click.pass_context
@reports_errors
def token_create(
    ctx: click.Context, device: str | None, groups: tuple[str, ...], uses: int, ttl: float, *, as_json: bool
) -> None:
    r"""Prints the string a device enrols with, alone on stdout. It is shown this once.

    \b
    edge-fleet token create --group canary | ssh dev-1 edge-agent enroll -
    """
    with connected(ctx) as client:
        made = client.post("/enrolment-tokens", {"device": device, "groups": list(groups), "uses": uses, "ttl_s": ttl})
    show(made, as_json, lambda data: click.echo(data["string"]))


@token.command("list")
@with_json
@click.pass_context
@reports_errors
def token_list(ctx: click.Context, *, as_json: bool) -> None:
    r"""Lists enrolment tokens.

    \b
    edge-fleet token list
    """
    with connected(ctx) as client:
        show(client.get("/enrolment-tokens"), as_json, display.tokens)


@token.command("revoke")
@click.argument("token_id")
@click.pass_context
@reports_errors
def token_revoke(ctx: click.Context, token_id: str) -> None:
    r"""Makes an enrolment token useless.

    \b
    edge-fleet token revoke 1f2e3d4c
    """
    with connected(ctx) as client:
        client.delete(f"/enrolment-tokens/{segment(token_id)}")
    click.echo(f"token {token_id} is revoked")


# -- the rest ------------------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--follow", is_flag=True, help="Go on as they happen.")
@click.option("--device", help="Only of this device.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@with_json
@click.pass_context
@reports_errors
def events(ctx: click.Context, *, follow: bool, device: str | None, limit: int, as_json: bool) -> None:
    r"""Shows what happened, oldest first.

    \b
    edge-fleet events --follow
    """
    with connected(ctx) as client:
        found = client.get("/events", limit=limit, device=device)
        if not follow:
            show(found, as_json, display.events)
            return
        seen = found[-1]["seq"] if found else 0
        for event in found:
            _print_event(event, as_json)
        for kind, event in client.stream("/events/stream", after=seen):
            if kind == "event" and device in {None, event["device"]}:
                _print_event(event, as_json)


def _print_event(event: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(event) if as_json else display.event_line(event))


@main.group(cls=Group)
def access() -> None:
    """Access tokens of people and programs (admin)."""


@access.command("create")
@click.option("--role", type=click.Choice(["viewer", "publisher", "operator", "admin"]), required=True)
@click.argument("name")
@with_json
@click.pass_context
@reports_errors
def access_create(ctx: click.Context, role: str, name: str, *, as_json: bool) -> None:
    r"""Prints a new access token, alone on stdout. It is shown this once.

    \b
    edge-fleet access create --role viewer wall-display
    """
    with connected(ctx) as client:
        made = client.post("/access-tokens", {"name": name, "role": role})
    show(made, as_json, lambda data: click.echo(data["token"]))


@access.command("list")
@with_json
@click.pass_context
@reports_errors
def access_list(ctx: click.Context, *, as_json: bool) -> None:
    r"""Lists access tokens.

    \b
    edge-fleet access list
    """
    with connected(ctx) as client:
        show(client.get("/access-tokens"), as_json, display.access_tokens)


@access.command("revoke")
@click.argument("token_id")
@click.pass_context
@reports_errors
def access_revoke(ctx: click.Context, token_id: str) -> None:
    r"""Makes an access token useless and ends its browser sessions.

    \b
    edge-fleet access revoke 1f2e3d4c
    """
    with connected(ctx) as client:
        client.delete(f"/access-tokens/{segment(token_id)}")
    click.echo(f"access token {token_id} is revoked")


@main.command()
@with_json
@click.pass_context
@reports_errors
def audit(ctx: click.Context, *, as_json: bool) -> None:
    r"""Shows who changed what, newest first.

    \b
    edge-fleet audit
    """
    with connected(ctx) as client:
        show(client.get("/audit"), as_json, display.audit)


@main.command()
@with_json
@click.pass_context
@reports_errors
def status(ctx: click.Context, *, as_json: bool) -> None:
    r"""Shows how the server is.

    \b
    edge-fleet status
    """
    with connected(ctx) as client:
        show(client.get("/status"), as_json, display.status)


@main.command()
def openapi() -> None:
    r"""Prints the OpenAPI description of the REST API.

    \b
    edge-fleet openapi > openapi.json
    """
    from fleet_server.api.openapi import document

    click.echo(json.dumps(document(), indent=2, sort_keys=True))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    r"""Prints a completion script.

    \b
    edge-fleet completion bash > /etc/bash_completion.d/edge-fleet
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "edge-fleet", "_EDGE_FLEET_COMPLETE").source())


if __name__ == "__main__":
    main()
