"""`edge-fleet keys …` and `publisher …`: who is trusted. Proposed here, signed where the offline keys are, applied here."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet_server.cli import tables
from fleet_server.cli.command import Group, agreed, connected, reports_errors, segment, show, with_json
from fleet_server.cli.signing import new_secret, publishing, secret_of, signer_among
from fleet_server.errors import Conflict, Invalid

if TYPE_CHECKING:
    from fleet_server.client import Client
    from fleet_server.releases.key_change import Opened

_key_option = click.option(
    "--key",
    "keys",
    multiple=True,
    required=True,
    metavar="KEY",
    help="A key file, or a URI such as hsm:2?label=fleet. Repeatable.",
)
_out_option = click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where the change is written, to be signed."
)
_add_option = click.option(
    "--add", multiple=True, metavar="KEY", help="A public key that is trusted from now on: a file, or a URI. Repeatable."
)
_threshold_option = click.option("--threshold", type=click.IntRange(1, 16), help="How many of the role's keys must sign.")


@click.group(cls=Group)
def keys() -> None:
    """Who is trusted: keys, thresholds, renewal, replacement.

    A change is a file that travels: proposed where the server is, signed where the offline keys are, applied where the server
    is.

    edge-fleet keys rotate online --out change.json
    edge-fleet keys sign change.json --key /media/usb/root.key
    edge-fleet keys apply change.json
    """


@keys.command("status")
@click.option("--check", is_flag=True, help="Exit status 1 when something has ended or ends soon.")
@with_json
@click.pass_context
@reports_errors
def keys_status(ctx: click.Context, *, check: bool, as_json: bool) -> None:
    """Shows every role: its keys, threshold, version, and when what it signed ends.

    edge-fleet keys status
    edge-fleet keys status --check --json
    """
    with connected(ctx) as client:
        found = client.get("/keys")
    show(found, as_json, tables.keys)
    if check and any(role["state"] in {"expired", "ends soon"} for role in found["roles"]):
        sys.exit(1)


@keys.command("make")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--passphrase/--no-passphrase",
    default=False,
    help="Encrypt the key with a passphrase: $EDGE_FLEET_KEY_SECRET, the first line of the file $EDGE_FLEET_KEY_SECRET_FILE (-: standard input), or asked for.",
)
@reports_errors
def keys_make(path: Path, *, passphrase: bool) -> None:
    """Makes a new signing key in PATH and its public half in PATH.pub. Do this where the key shall stay.

    edge-fleet keys make /media/usb/root-2.key --passphrase
    """
    from fleet_server.releases import keys as files

    secret = new_secret(f"Passphrase of {path}") if passphrase else None
    made = files.generate(path, passphrase=secret).public_key
    path.with_name(f"{path.name}.pub").write_text(_key_text(made))
    click.echo(f"{made.keyid[:12]} in {path}; public half in {path}.pub")


@keys.command("public")
@click.argument("key")
@reports_errors
def keys_public(key: str) -> None:
    """Prints the public half of a key: of a file, of a hardware module, of a key service.

    edge-fleet keys public /media/usb/root.key > root.pub
    edge-fleet keys public 'hsm:2?label=fleet' > alice.pub
    """
    click.echo(_key_text(_public(key)), nl=False)


@keys.command("renew")
@click.argument("role")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="root, targets: where the change is written, to be signed."
)
@click.option(
    "--key", "signing", multiple=True, metavar="KEY", help="A publisher: the key to sign with, here and now. Repeatable."
)
@click.pass_context
@reports_errors
def keys_renew(ctx: click.Context, role: str, out: Path | None, signing: tuple[str, ...]) -> None:
    """Signs what is in force for another year: root, targets, or a publisher. Online roles are renewed by the server.

    edge-fleet keys renew root --out change.json
    edge-fleet keys renew releases --key /media/usb/releases.key
    """
    if bool(out) == bool(signing):
        raise click.UsageError("name either --out (root, targets) or --key (a publisher)")
    with connected(ctx) as client:
        if out is not None:
            _propose(client, out, {"action": "renew", "role": role})
            return
        from fleet_server.releases import publisher

        now, trusted, signers = publishing(client, signing, publisher=role)
        done = client.post(
            f"/publishers/{segment(now['publisher'])}/metadata",
            {"metadata": publisher.renewed(trusted, signers, time.time()).decode()},
        )
    click.echo(f"{done['publisher']} is signed for another year (version {done['version']})")


@keys.command("rotate")
@click.argument("role")
@_add_option
@click.option(
    "--remove",
    multiple=True,
    metavar="KEYID",
    help="A key that is no longer trusted; the beginning of its id does. Repeatable.",
)
@_threshold_option
@_out_option
@click.pass_context
@reports_errors
def keys_rotate(
    ctx: click.Context, role: str, add: tuple[str, ...], remove: tuple[str, ...], threshold: int | None, out: Path
) -> None:
    """Replaces keys of a role: root, targets, a publisher; or assignments, snapshot, timestamp, or all three as `online`.

    For the online roles the server makes new keys itself. For the others say which come and go; old and new root keys both
    sign.

    edge-fleet keys rotate root --add root-2.pub --add root-3.pub --threshold 2 --out change.json
    edge-fleet keys rotate releases --add new.pub --remove 3f2a --out change.json
    edge-fleet keys rotate online --out change.json
    """
    with connected(ctx) as client:
        wish = {
            "action": "rotate",
            "role": role,
            "add": [_key_dict(key) for key in add],
            "remove": list(remove),
            "threshold": threshold,
        }
        _propose(client, out, wish)


@keys.command("sign")
@click.argument("change", type=click.Path(path_type=Path, dir_okay=False))
@_key_option
@click.option("--yes", is_flag=True, help="Do not ask before signing.")
@reports_errors
def keys_sign(change: Path, keys: tuple[str, ...], *, yes: bool) -> None:
    """Shows what a change does, signs it, and writes it back. Needs no network: do it where the offline key is.

    edge-fleet keys sign change.json --key /media/usb/root.key
    """
    from fleet_server.releases import key_change

    opened = _opened(change)
    _tell(opened)
    agreed("Sign this?", yes=yes)
    for key in keys:
        used = signer_among(key, opened.candidates().values())
        click.echo(f"signed {', '.join(opened.sign(used))} with {used.public_key.keyid[:12]}")
    change.write_bytes(key_change.write(opened.closed()))
    _tell_needs(opened)


@keys.command("show")
@click.argument("change", type=click.Path(path_type=Path, dir_okay=False))
@with_json
@reports_errors
def keys_show(change: Path, *, as_json: bool) -> None:
    """Shows what a change does and which signatures it still needs.

    edge-fleet keys show change.json
    """
    from fleet_server.releases import key_change

    opened = _opened(change)
    if as_json:
        needs = [key_change.say(need) for need in opened.needs()]
        click.echo(json.dumps({"differences": opened.differences(), "needs": needs}, indent=2))
        return
    _tell(opened)
    _tell_needs(opened)


@keys.command("apply")
@click.argument("change", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_context
@reports_errors
def keys_apply(ctx: click.Context, change: Path) -> None:
    """Makes a signed change trusted. Devices follow when they look the next time.

    edge-fleet keys apply change.json
    """
    with connected(ctx) as client:
        for line in client.post("/keys/apply", {"change": change.read_text()})["done"]:
            click.echo(line)


@keys.command("recover")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@_key_option
@reports_errors
def keys_recover(folder: Path, keys: tuple[str, ...]) -> None:
    """Replaces every online key at once, after they were stolen. With the server stopped and the offline keys at hand.

    Devices believe the new keys because a new root names them; version numbers that a thief signed no longer count, and what
    was withdrawn stays withdrawn.

    edge-fleet keys recover /srv/fleet --key /media/usb/root.key
    """
    from fleet_server import app
    from fleet_server.config import Folder, load

    where = Folder(folder.absolute())
    with app.locked(where):
        fleet = app.Fleet(where, load(where))
        try:
            fleet.key_changes.finish()
            candidates = [*fleet.repository.root_role().signed.keys.values()]
            for line in fleet.key_changes.replace_online_keys([signer_among(key, candidates) for key in keys]):
                click.echo(line)
        finally:
            fleet.close()
    click.echo("the online keys are new; start the server")


@click.group(cls=Group)
def publisher() -> None:
    """Who may sign which releases.

    edge-fleet publisher list
    edge-fleet publisher add lab --pattern 'lab-*' --key lab.pub --out change.json
    """


@publisher.command("list")
@with_json
@click.pass_context
@reports_errors
def publisher_list(ctx: click.Context, *, as_json: bool) -> None:
    """Lists publishers with the model names they may sign.

    edge-fleet publisher list
    """
    with connected(ctx) as client:
        found = [role for role in client.get("/keys")["roles"] if role["kind"] == "publisher"]
    show(found, as_json, tables.publishers)


@publisher.command("add")
@click.argument("name")
@click.option(
    "--pattern", "patterns", multiple=True, required=True, help="A model name, or the beginning of one and *. Repeatable."
)
@click.option("--key", "add", multiple=True, required=True, metavar="KEY", help="A public key: a file, or a URI. Repeatable.")
@_threshold_option
@_out_option
@click.pass_context
@reports_errors
def publisher_add(
    ctx: click.Context, name: str, patterns: tuple[str, ...], add: tuple[str, ...], threshold: int | None, out: Path
) -> None:
    """Lets a publisher sign releases of the models that the patterns match, and nobody else.

    edge-fleet publisher add lab --pattern 'lab-*' --key lab.pub --out change.json
    """
    with connected(ctx) as client:
        wish = {"action": "add-publisher", "role": name, "patterns": list(patterns), "add": [_key_dict(key) for key in add]}
        _propose(client, out, {**wish, "threshold": threshold})


@publisher.command("remove")
@click.argument("name")
@_out_option
@click.pass_context
@reports_errors
def publisher_remove(ctx: click.Context, name: str, out: Path) -> None:
    """No longer trusts a publisher. Devices keep what they run, and install nothing of it any more.

    edge-fleet publisher remove lab --out change.json
    """
    with connected(ctx) as client:
        _propose(client, out, {"action": "remove-publisher", "role": name})


def _propose(client: Client, out: Path, wish: dict[str, Any]) -> None:
    from fleet_server.releases import key_change

    if out.exists():
        raise Conflict(f"{out} exists already; name another file")
    text = client.post("/keys/changes", wish)["change"]
    out.write_text(text)
    opened = key_change.Opened(key_change.read(text.encode()))
    _tell(opened)
    _tell_needs(opened)
    click.echo(
        f"next, where the offline keys are: edge-fleet keys sign {out} --key KEY; then here: edge-fleet keys apply {out}"
    )


def _opened(path: Path) -> Opened:
    from fleet_server.releases import key_change

    if path.stat().st_size > key_change.MAX_CHANGE_BYTES:
        raise Invalid(f"{path} is too large to be a change of keys")
    return key_change.Opened(key_change.read(path.read_bytes()))


def _tell(opened: Opened) -> None:
    for line in opened.differences():
        click.echo(f"  {line}")


def _tell_needs(opened: Opened) -> None:
    from fleet_server.releases import key_change

    needs = opened.needs()
    for need in needs:
        click.echo(key_change.say(need))
    if not needs:
        click.echo("every signature is there")


def _public(name: str) -> Any:
    from fleet_server.releases import keys as files

    return files.public(name, passphrase=secret_of(name))


def _key_dict(name: str) -> dict[str, Any]:
    key = _public(name)
    return {"keyid": key.keyid, **key.to_dict()}


def _key_text(key: Any) -> str:
    return json.dumps({"keyid": key.keyid, **key.to_dict()}, indent=2) + "\n"
