"""Signing from the command line: keys and their secrets, and what a publisher's key signs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet_server.errors import Invalid

if TYPE_CHECKING:
    from fleet_server.client import Client

SECRET_ENVIRONMENT = "EDGE_FLEET_KEY_SECRET"  # noqa: S105 - the name of the variable
"""The passphrase of a key file or the PIN of a hardware module, where nobody can be asked."""
SECRET_FILE_ENVIRONMENT = "EDGE_FLEET_KEY_SECRET_FILE"  # noqa: S105 - the name of the variable
"""A file whose first line is the passphrase or the PIN; `-` for standard input."""


def signer(key: Path) -> Any:
    """The signer in a key file, whose passphrase is asked for when it has one."""
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
    """A secret from the environment or a file (for programs), else from whoever sits there.  Raises: Invalid when empty."""
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


def publishing(
    client: Client, signing: tuple[str, ...], *, model: str | None = None, publisher: str | None = None
) -> tuple[dict[str, Any], Any, list[Any]]:
    """What the server holds, the publisher's verified role, and the signers. Keys behind URIs are among those that count."""
    from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]

    from fleet_server.releases import publisher as publishers

    now = client.get("/publishing", model=model, publisher=publisher)
    releases = now["releases"].encode() if now["releases"] is not None else None
    role = publishers.verified(now["root"].encode(), now["targets"].encode(), releases, now["publisher"])
    delegator = Metadata[Targets].from_bytes(now["targets"].encode()).signed
    candidates = [delegator.get_key(keyid) for keyid in delegator.get_delegated_role(now["publisher"]).keyids]
    return now, role, [signer_among(key, candidates) for key in signing]
