"""`edge-fleet publish`, `releases`, `withdraw`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet_server import display
from fleet_server.cli.common import Command, connected, reports_errors, segment, show, signer, with_json
from fleet_server.errors import ServerRefused

if TYPE_CHECKING:
    from fleet_server.client import Client


@click.command(cls=Command)
@click.argument("release_yaml", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--key", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The offline releases key.")
@click.option("--yes", is_flag=True, help="Do not ask before signing.")
@with_json
@click.pass_context
@reports_errors
def publish(ctx: click.Context, release_yaml: Path, key: Path, *, yes: bool, as_json: bool) -> None:
    """Signs a release on this machine and uploads it. The key never leaves this machine.

    edge-fleet publish digits/RELEASE.yaml --key /media/usb/releases.key
    """
    from fleet_server.releases import builder

    signing = signer(key)
    built = builder.build(release_yaml)
    if not as_json:
        display.manifest(built.manifest)
    if not yes and not click.confirm(f"Sign and publish {built.manifest.ref}?", err=True):
        raise click.Abort
    with connected(ctx) as client:
        display.upload(client, built, quiet=as_json)
        published = _sign_and_send(client, built.manifest, signing)
    show(published, as_json, lambda data: click.echo(f"published {data['release']}, signed with {', '.join(data['signers'])}"))


def _sign_and_send(client: Client, manifest: Any, signing: Any) -> Any:
    """Once more when somebody else published in between."""
    from fleet_server.releases import publisher

    for attempt in (1, 2):
        now = client.get("/publishing")
        role = publisher.verified(now["root"].encode(), now["targets"].encode(), now["releases"].encode())
        data, metadata = publisher.add(role, manifest, signing, time.time())
        try:
            return client.post("/releases", {"manifest": data.decode(), "metadata": metadata.decode()})
        except ServerRefused as error:
            if error.code != "stale_metadata" or attempt == 2:
                raise
    raise AssertionError("unreachable")


@click.command(cls=Command)
@click.option("--model", help="Only this model.")
@with_json
@click.pass_context
@reports_errors
def releases(ctx: click.Context, model: str | None, *, as_json: bool) -> None:
    """Lists published releases.

    edge-fleet releases --model digits
    """
    with connected(ctx) as client:
        show(client.get("/releases", model=model), as_json, display.releases)


@click.command(cls=Command)
@click.argument("release")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
@reports_errors
def withdraw(ctx: click.Context, release: str, *, yes: bool) -> None:
    """Forbids a release for good: no device may run it; those that do go back to the one before.

    edge-fleet withdraw digits:4
    """
    from agent.contract import names

    ref = names.ReleaseRef.parse(release)
    if not yes and not click.confirm(f"Withdraw {ref} for good?", err=True):
        raise click.Abort
    with connected(ctx) as client:
        client.post(f"/releases/{segment(ref.model)}/{ref.version}/withdraw")
    click.echo(f"{ref} is withdrawn")
