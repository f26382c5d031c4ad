"""Applies changes of who is trusted: what the offline keys signed becomes what the repository says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]
from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]

from fleet_server.errors import Refused
from fleet_server.releases import key_change, key_rules
from fleet_server.releases.delegations import ASSIGNMENTS, RELEASES
from fleet_server.releases.key_change import Change, Opened
from fleet_server.releases.key_draft import Draft
from fleet_server.releases.online_keys import ONLINE
from fleet_server.releases.repository import Repository

UNDER_WAY = "change-under-way.json"


class KeyChanges:
    """Drafts and applies changes of one repository. A change that was begun is kept among the documents, for the next start."""

    def __init__(self, repository: Repository, clock: Callable[[], float]) -> None:
        self._repository, self._clock = repository, clock

    def draft(self) -> Draft:
        """What is in force, to be changed and signed offline."""
        repository = self._repository
        with repository.lock:
            return Draft(repository.root_role(), repository.targets_role(), repository.all_publishers(), self._clock())

    def propose_online_keys(self, roles: list[str]) -> dict[str, Key]:
        """New keys of the server's own, used once a root names them."""
        with self._repository.lock:
            return self._repository.online.keys.propose(roles)

    def apply(self, change: Change) -> Opened:
        """Makes a signed change of keys trusted, and signs everything online anew.  Raises: see key_rules.check; Refused."""
        repository = self._repository
        with repository.lock:
            trusted = (repository.root_role(), repository.targets_role(), repository.all_publishers())
            opened = key_rules.check(change, *trusted, self._clock())
            for role, keyids in _online_keyids(opened.next_root, opened.next_targets).items():
                if not repository.online.keys.holds(role, keyids):
                    raise Refused(
                        f"the server holds no key that this change names for {role}: it was made elsewhere, or a later proposal "
                        "replaced it; propose the change anew",
                        code="unknown_online_key",
                    )
            repository.documents.write(UNDER_WAY, key_change.write(change))
            self._carry_out(opened)
            return opened

    def finish(self) -> bool:
        """Carries out a change that an interrupted server had begun. Whether there was one."""
        with self._repository.lock:
            data = self._repository.documents.read(UNDER_WAY)
            if data is None:
                return False
            self._carry_out(Opened(key_change.read(data)))
            return True

    def renew_offline(self, root: Signer, releases: Signer | None) -> list[str]:
        """Signs root and targets for another year, with its own key the role `releases` too; what it renewed.  Raises: see
        `apply`.
        """
        renewed = ["root", "targets", *([RELEASES] if releases else [])]
        draft = self.draft()
        for role in renewed:
            draft.renew(role)
        self._sign_and_apply(draft, [signer for signer in (root, releases) if signer is not None])
        return renewed

    def replace_online_keys(self, signers: Sequence[Signer]) -> list[str]:
        """New keys for everything that the server signs; what changed, in sentences.  Raises: see `apply`."""
        draft = self.draft()
        draft.use_online(self.propose_online_keys(list(ONLINE)))
        return self._sign_and_apply(draft, signers).differences()

    def _sign_and_apply(self, draft: Draft, signers: Sequence[Signer]) -> Opened:
        opened = Opened(draft.change())
        for signer in signers:
            opened.sign(signer)
        return self.apply(opened.closed())

    def _carry_out(self, opened: Opened) -> None:
        """Every step can be done again. A device that asks between two of them is told to try later by a signature that does
        not fit.
        """
        with self._repository.documents.together():
            self._sign(opened)
        self._repository.online.keys.keep()
        self._repository.documents.remove(UNDER_WAY, durably=True)

    def _sign(self, opened: Opened) -> None:
        metadata, online = self._repository.metadata, self._repository.online
        changed: dict[str, int] = {}
        documents = {**opened.roles, **({"targets": opened.targets} if opened.targets is not None else {})}
        for name, role in documents.items():
            metadata.write_role(name, role)
            changed[f"{name}.json"] = role.signed.version
        online.keys.adopt(_online_keyids(opened.next_root, opened.next_targets))
        document = online.assignment_bytes()
        version = online.write_assignment(metadata.version(ASSIGNMENTS) + 1, document)
        if opened.root is not None:
            metadata.write_role("root", opened.root)
        online.advance({**changed, f"{ASSIGNMENTS}.json": version})


def _online_keyids(root: Root, targets: Targets) -> dict[str, list[str]]:
    """The keys that may sign what the server signs."""
    assignments = targets.get_delegated_role(ASSIGNMENTS)
    return {role: assignments.keyids if role == ASSIGNMENTS else root.roles[role].keyids for role in ONLINE}
