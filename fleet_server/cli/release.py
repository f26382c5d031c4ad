"""`edge-fleet release …`, `publish`, `withdraw`, `reinstate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from fleet_server.cli import progress, rollout_tables, tables
from fleet_server.cli.command import Command, Group, agreed, connected, reports_errors, segment, show, with_json, with_plan
from fleet_server.cli.signing import publishing
from fleet_server.errors import Conflict, ServerRefused

if TYPE_CHECKING:
    from agent.contract.manifest import ReleaseManifest
    from fleet_server.client import Client
    from fleet_server.releases.builder import Built

HTTP_NOT_FOUND = 404

_key_option = click.option(
    "--key", "keys", multiple=True, required=True, metavar="KEY",
    help="The publisher's offline key: a file, or a URI of securesystemslib. Repeat it where several must sign.",
)  # fmt: skip


@click.command(cls=Command)
@click.argument("release_yaml", type=click.Path(path_type=Path, dir_okay=False))
@_key_option
@click.option("--yes", is_flag=True, help="Do not ask before signing.")
@with_json
@click.pass_context
@reports_errors
def publish(ctx: click.Context, release_yaml: Path, keys: tuple[str, ...], *, yes: bool, as_json: bool) -> None:
    """Signs a release on this machine and uploads it. The key never leaves this machine, or its hardware module.

    The very release again is a success that changes nothing; another one under a number that was published is refused.

    edge-fleet publish digits/RELEASE.yaml --key /media/usb/releases.key
    edge-fleet publish lab/RELEASE.yaml --key 'hsm:2?label=fleet'
    """
    from fleet_server.releases import builder

    built = builder.build(release_yaml)
    if not as_json:
        tables.manifest(built.manifest)
    with connected(ctx) as client:
        known = _same(client, built.manifest)
        if known is not None and known.get("deleted"):
            _upload(client, built, quiet=as_json)
            back = client.post(f"/releases/{segment(built.manifest.model)}/{built.manifest.version}/undelete")
            show(back, as_json, lambda data: click.echo(f"{data['release']} has its files again"))
            return
        if known is not None:
            show(known, as_json, lambda data: click.echo(f"{data['release']} is published already, and the same"))
            return
        agreed(f"Sign and publish {built.manifest.ref}?", yes=yes)
        _, _, signers = publishing(client, keys, model=built.manifest.model)
        _upload(client, built, quiet=as_json)
        published = _sign_and_send(client, built.manifest, signers)
    show(published, as_json, lambda data: click.echo(f"published {data['release']}, signed with {', '.join(data['signers'])}"))


def _upload(client: Client, built: Built, *, quiet: bool) -> None:
    """Sends the files that the server does not have."""
    distinct = {built.manifest.files[name].sha256: (name, path) for name, path in built.paths.items()}
    with progress.bars(quiet=quiet) as bars:
        for sha256, (name, path) in distinct.items():
            bar = bars.add_task(tables.safe(name), total=path.stat().st_size)
            client.upload(sha256, path, lambda done, bar=bar: bars.update(bar, completed=done))  # type: ignore[misc]


def _same(client: Client, manifest: ReleaseManifest) -> Any | None:
    """What is published under this name, when it is the same but for who built it and when; else None."""
    from agent.contract.codec import convert
    from agent.contract.manifest import ReleaseManifest

    try:
        known = client.get(f"/releases/{segment(manifest.model)}/{manifest.version}")
    except ServerRefused as error:
        if error.status != HTTP_NOT_FOUND:
            raise
        return None
    published = convert(known.pop("manifest"), ReleaseManifest)
    here = msgspec.structs.replace(
        manifest.provenance, created=published.provenance.created, publisher=published.provenance.publisher
    )
    return {**known, "already_published": True} if msgspec.structs.replace(manifest, provenance=here) == published else None


def _sign_and_send(client: Client, manifest: Any, signers: list[Any]) -> Any:
    """Once more when somebody else published in between."""
    from fleet_server.releases import publisher

    for attempt in (1, 2):
        _, role, _ = publishing(client, (), model=manifest.model)
        try:
            data, metadata = publisher.add(role, manifest, signers, time.time())
        except Conflict:
            if (known := _same(client, manifest)) is not None:
                return known  # another pipeline was quicker with the very same
            raise
        try:
            return client.post("/releases", {"manifest": data.decode(), "metadata": metadata.decode()})
        except ServerRefused as error:
            if error.code != "stale_metadata" or attempt == 2:
                raise
    raise AssertionError("unreachable")


@click.group(cls=Group)
def release() -> None:
    """Published releases."""


@release.command("list")
@click.option("--model", help="Only this model.")
@with_json
@click.pass_context
@reports_errors
def release_list(ctx: click.Context, model: str | None, *, as_json: bool) -> None:
    """Lists published releases.

    edge-fleet release list --model digits
    """
    with connected(ctx) as client:
        show(client.get("/releases", model=model), as_json, tables.releases)


@release.command("show")
@click.argument("ref", metavar="RELEASE")
@with_json
@click.pass_context
@reports_errors
def release_show(ctx: click.Context, ref: str, *, as_json: bool) -> None:
    """Shows one release: its variants, who signed it, where it comes from; with --json its whole manifest.

    edge-fleet release show digits:4
    """
    from agent.contract import names

    parsed = names.ReleaseRef.parse(ref)
    with connected(ctx) as client:
        show(client.get(f"/releases/{segment(parsed.model)}/{parsed.version}"), as_json, tables.release)


@release.command("delete")
@click.argument("ref", metavar="RELEASE")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_json
@click.pass_context
@reports_errors
def release_delete(ctx: click.Context, ref: str, *, yes: bool, as_json: bool) -> None:
    """Deletes the files of a release from the server. Refused while it is assigned, in a rollout, served by a device, or what a
    rollback goes back to. To have them back, publish the same release again.

    edge-fleet release delete digits:1
    """
    from agent.contract import names

    parsed = names.ReleaseRef.parse(ref)
    agreed(f"Delete the files of {parsed} from the server?", yes=yes)
    with connected(ctx) as client:
        done = client.delete(f"/releases/{segment(parsed.model)}/{parsed.version}")
    show(done, as_json, lambda _: click.echo(f"the files of {parsed} are deleted"))


@click.command(cls=Command)
@click.argument("ref", metavar="RELEASE")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_plan
@with_json
@click.pass_context
@reports_errors
def withdraw(ctx: click.Context, ref: str, *, yes: bool, plan: bool, as_json: bool) -> None:
    """Forbids a release: no device may run it; those that do go back to the one before. Devices remember it for good,
    unless the release's publisher reinstates it. Where it asks, it shows first what it would do.

    edge-fleet withdraw digits:4 --plan
    edge-fleet withdraw digits:4
    """
    from agent.contract import names

    parsed = names.ReleaseRef.parse(ref)
    where, said = f"/releases/{segment(parsed.model)}/{parsed.version}/withdraw", f"{parsed} is withdrawn"
    with connected(ctx) as client:
        if plan:
            show(client.post(f"{where}/plan"), as_json, rollout_tables.change)
            return
        try:
            if not yes:
                rollout_tables.change(client.post(f"{where}/plan"), err=True)
            agreed(f"Withdraw {parsed} from every device?", yes=yes)
            done = client.post(where)
        except ServerRefused as error:
            if error.code != "withdrawn":
                raise
            done, said = {"release": str(parsed), "withdrawn": True}, f"{parsed} was withdrawn already"
    show(done, as_json, lambda _: click.echo(said))


@click.command(cls=Command)
@click.argument("ref", metavar="RELEASE")
@_key_option
@click.option("--yes", is_flag=True, help="Do not ask before signing.")
@with_json
@click.pass_context
@reports_errors
def reinstate(ctx: click.Context, ref: str, keys: tuple[str, ...], *, yes: bool, as_json: bool) -> None:
    """Ends the withdrawal of a release, with its publisher's offline key: devices believe nobody else. Rolls nothing out.

    edge-fleet reinstate digits:4 --key /media/usb/releases.key
    """
    from agent.contract import names
    from fleet_server.errors import NotFound
    from fleet_server.releases import publisher

    parsed = names.ReleaseRef.parse(ref)
    with connected(ctx) as client:
        now, role, signers = publishing(client, keys, model=parsed.model)
        if role is None:
            raise NotFound(f"release {parsed} was never published")
        agreed(f"Sign that {parsed} may be run again?", yes=yes)
        metadata = publisher.reinstate(role, parsed, signers, time.time())
        done = client.post(f"/publishers/{segment(now['publisher'])}/metadata", {"metadata": metadata.decode()})
    show(done, as_json, lambda _: click.echo(f"{parsed} may be rolled out again"))
