"""The three keys that the server itself signs with, and those that shall follow them.

<role>.key        in use
next/<role>.key   made for a change of keys that the offline keys have not signed yet; the latest proposal counts, earlier ones
are void
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from securesystemslib.signer import CryptoSigner, Key  # type: ignore[attr-defined]

from agent.common import files
from fleet_server.errors import FleetError, Refused, Unavailable
from fleet_server.releases import keys

ONLINE = ("assignments", "snapshot", "timestamp")


class OnlineKeys:
    """The signers in use."""

    def __init__(self, folder: Path, signers: dict[str, CryptoSigner]) -> None:
        self._folder, self._signers = folder, signers

    @property
    def assignments(self) -> CryptoSigner:
        return self._signer("assignments")

    @property
    def snapshot(self) -> CryptoSigner:
        return self._signer("snapshot")

    @property
    def timestamp(self) -> CryptoSigner:
        return self._signer("timestamp")

    @classmethod
    def create(cls, folder: Path) -> OnlineKeys:
        """New keys in new files.  Raises: Invalid when one is there already."""
        return cls(folder, {role: keys.generate(folder / f"{role}.key") for role in ONLINE})

    @classmethod
    def read(cls, folder: Path) -> OnlineKeys:
        """Raises: NotFound, Invalid."""
        return cls(folder, {role: keys.load(folder / f"{role}.key") for role in ONLINE})

    def propose(self, roles: Iterable[str]) -> dict[str, Key]:
        """Public keys of signers that are made now and used once a root names them."""
        files.make_directory(self._folder / "next", mode=0o700)
        made: dict[str, Key] = {}
        for role in roles:
            (self._folder / "next" / f"{role}.key").unlink(missing_ok=True)
            made[role] = keys.generate(self._folder / "next" / f"{role}.key").public_key
        return made

    def holds(self, role: str, keyids: Iterable[str]) -> bool:
        """Whether the server can sign `role` with one of these keys, now or after `adopt`."""
        return self._find(role, keyids) is not None

    def adopt(self, wanted: dict[str, list[str]]) -> None:
        """Signs from now on with the keys that are `wanted` by role. On disk nothing changes yet.

        Raises: Refused when the server does not hold one of them.
        """
        found = {role: self._find(role, keyids) for role, keyids in wanted.items()}
        missing = sorted(role for role, signer in found.items() if signer is None)
        if missing:
            raise Refused(
                f"the server does not hold a key that this change names for {', '.join(missing)}: "
                "it was made elsewhere, or a later proposal replaced it; propose the change anew",
                code="unknown_online_key",
            )
        self._signers = {role: signer for role, signer in found.items() if signer is not None}

    def keep(self) -> None:
        """Makes the keys in use the ones on disk, and forgets what they replaced.  Raises: OSError."""
        for role in ONLINE:
            path = self._folder / "next" / f"{role}.key"
            if path.is_file() and keys.load(path).public_key == self._signers[role].public_key:
                path.replace(self._folder / f"{role}.key")
        files.sync_directory(self._folder)

    def _signer(self, role: str) -> CryptoSigner:
        return self._signers[role]

    def _find(self, role: str, keyids: Iterable[str]) -> CryptoSigner | None:
        accepted = set(keyids)
        for path in (self._folder / f"{role}.key", self._folder / "next" / f"{role}.key"):
            try:
                signer = keys.load(path)
            except FleetError:
                continue
            if signer.public_key.keyid in accepted:
                return signer
        return None


class NoKeys(OnlineKeys):
    """Of a process that signs nothing.  Raises: Unavailable whenever one is wanted."""

    def __init__(self) -> None:
        super().__init__(Path(), {})

    def propose(self, roles: Iterable[str]) -> dict[str, Key]:
        raise _absent(", ".join(roles))

    def _signer(self, role: str) -> CryptoSigner:
        raise _absent(role)


def _absent(role: str) -> Unavailable:
    return Unavailable(f"this process has no key for {role}: `edge-fleet decide` signs", code="no_key")
