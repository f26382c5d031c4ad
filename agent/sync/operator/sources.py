"""What `edge-agent doctor` says of everybody who may have a release's files: which of them are configured, and whether each can
be used now.

Nobody is asked whom agent.yaml does not name, and nobody for more than a byte. All are asked at once, and waited for no longer
than PATIENCE_S. None of them has to be there, so nothing here fails the device: the fleet server is checked elsewhere.
"""

from __future__ import annotations

import datetime as dt
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.config import AgentConfig, SyncSettings
from agent.contract import bundle, enrolment
from agent.contract.bundle import BundleError
from agent.contract.codec import ContractError
from agent.contract.names import SHA256, ReleaseRef
from agent.store import Selection, Store, StoreError
from agent.sync.fetching.budget import hours
from agent.sync.fetching.factory import NEIGHBOUR_CONNECT_S
from agent.sync.fetching.folders import MAX_BLOBS, MAX_BUNDLES, open_regular
from agent.sync.fetching.spool import Spool, Told
from agent.sync.gates import windows
from agent.sync.http import FleetHttp, HttpStatus
from agent.sync.identity import Identity
from agent.sync.operator.findings import Finding
from agent.sync.ports import Clock
from agent.sync.problems import Problem
from agent.sync.proxy import Way

PATIENCE_S = 8.0
"""How long an answer is waited for: longer than a mirror on the other side of the world takes. A share whose server is gone
never answers."""

NAMED = 3
"""Of a long list so many are named."""

NOBODYS = "0" * 64
"""No file has this hash: who is asked for it answers that it is not there."""

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what is listened on, and where that is reached from here

Check = Callable[[], Finding | None]
Known = tuple[str, str]
"""A release that serves here, and the hash of its file: whoever has the fleet's files has this one."""


def examine(config: AgentConfig, who: Identity | None, clock: Clock, *, unset: Callable[[], bool]) -> Iterator[Finding]:
    """A finding for each source that is configured, in the order in which they are asked for files. Changes nothing."""
    settings, store, way = config.sync, Store(config.store), Way.configured(config.sync)
    known = _known(store)
    checks: list[tuple[str, Check]] = [("imported bundles", lambda: _imported(Spool(store)))]
    checks += [(f"folder {one}", lambda one=one: _folder(one)) for one in settings.local_sources]  # type: ignore[misc]
    checks += [(f"neighbour {one}", lambda one=one: _neighbour(one, clock, known)) for one in settings.neighbours]  # type: ignore[misc]
    checks += [(f"mirror {url}", lambda url=url: _mirror(url, who, clock, unset, known, way)) for url in settings.mirrors]  # type: ignore[misc]
    if settings.neighbour_listen:
        checks.append(("lending to neighbours", lambda: _lending(settings.neighbour_listen)))
    yield from _at_once(checks)
    if settings.transfer_window:
        yield download_hours(settings, clock)


def over_the_broker(settings: SyncSettings, broker: Finding) -> Finding:
    """`broker`: what was found about it. The connection itself is not tried: a second one would take the first one's place."""
    name = "files over the broker"
    if not settings.mqtt_transfers:
        return Finding(name, "skipped", "off (sync.mqtt_transfers)")
    if broker.level != "ok":
        return Finding(name, "skipped", "needs the broker")
    return Finding(name, "ok", "while the fleet server cannot be reached otherwise")


def download_hours(settings: SyncSettings, clock: Clock) -> Finding:
    """Whether this is an hour in which files come over a network."""
    name, now = "download hours", dt.datetime.fromtimestamp(clock.wall()).astimezone()
    if windows.is_open(hours(settings.transfer_window), now):
        return Finding(name, "ok", f"{settings.transfer_window}, and it is {now:%H:%M}")
    return Finding(
        name,
        "warning",
        f"it is {now:%H:%M}: outside of {settings.transfer_window} nothing is fetched over a network",
        "wait, bring a bundle (edge-agent import), or change sync.transfer_window",
    )


def _at_once(checks: list[tuple[str, Check]]) -> Iterator[Finding]:
    """What all checks found, in order; they run at once."""
    end = time.monotonic() + PATIENCE_S
    for asked in [_Asked(name, check) for name, check in checks]:
        asked.thread.join(max(0.0, end - time.monotonic()))
        found = asked.found if not asked.thread.is_alive() else [_too_long(asked.name)]
        yield from found


class _Asked:
    """A check in a thread of its own, which ends with the process if it never does: a folder of a server that is gone cannot be
    left.
    """

    def __init__(self, name: str, check: Check) -> None:
        self.name = name
        self.found: list[Finding] = []
        self._check = check
        self.thread = threading.Thread(target=self._ask, name=name, daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        try:
            found = self._check()
        except (Problem, StoreError, ContractError, OSError, ValueError) as error:
            found = Finding(self.name, "warning", str(error), "mend it, or take it out of agent.yaml")
        if found is not None:
            self.found.append(found)


def _too_long(name: str) -> Finding:
    return Finding(
        name, "warning", f"no answer within {PATIENCE_S:.0f} s", "see whether it is switched on and reached from here"
    )


def _known(store: Store) -> Known | None:
    try:
        for model, selection in sorted(store.selections().items()):
            if isinstance(selection, Selection):
                manifest = store.manifest(ReleaseRef(model, selection.active.version))
                return str(manifest.ref), manifest.files[manifest.variant(selection.active.variant).file].sha256
    except (StoreError, KeyError, OSError):
        pass  # the store has a finding of its own
    return None


# -- on this machine ---------------------------------------------------------------------------------------------------------------


def _imported(spool: Spool) -> Finding | None:
    name = "imported bundles"
    try:
        ids, told = spool.ids(), _last_told(spool)
        waiting = [id_ for id_ in ids if not spool.accepted(id_)]
    except PermissionError as error:
        return Finding(
            name, "warning", str(error), "ask as the user of `edge-agent sync`: sudo -u edge-agent-sync edge-agent doctor"
        )
    if waiting:
        return Finding(
            name,
            "warning",
            f"{_count(len(waiting), 'bundle')} not read yet",
            "start `edge-agent sync`, which verifies them within seconds",
        )
    if told is not None and not told.accepted:
        advice = "make a new one on the fleet server (edge-fleet bundle) and import it"
        return Finding(name, "warning", f"the last one was refused: {told.message}", advice)
    if not ids:
        return None
    releases = sorted({release for id_ in ids for release in spool.about(id_).releases})
    return Finding(name, "ok", f"{_count(len(ids), 'bundle')} with {_some(releases) or 'no release'}")


def _last_told(spool: Spool) -> Told | None:
    try:
        last = max(os.scandir(spool.folder), key=lambda one: (one.name.endswith(".told"), one.stat().st_mtime_ns), default=None)
    except FileNotFoundError:
        return None
    return spool.told(last.name.removesuffix(".told")) if last is not None else None


def _folder(folder: Path) -> Finding:
    name = f"folder {folder}"
    try:
        paths = [path for path in folder.iterdir() if path.suffix in {bundle.SUFFIX, ".tar"}]
        blobs = _blobs(folder / "blobs")
    except (FileNotFoundError, NotADirectoryError):
        return Finding(
            name, "warning", "it is not there", "put in the stick or mount the share; without it the next source is asked"
        )
    except PermissionError:
        return Finding(
            name,
            "warning",
            f"user {os.geteuid()} may not read it",
            "mount it so that the user of `edge-agent sync` may read it",
        )
    wrong = [f"{path.name}: {why}" for path in sorted(paths)[:MAX_BUNDLES] if (why := _not_a_bundle(path)) is not None]
    if wrong:
        return Finding(
            name, "warning", f"not whole bundles: {_some(wrong)}", "copy them once more, or make them anew (edge-fleet bundle)"
        )
    if not paths and not blobs:
        advice = "see whether the stick or share is mounted there; a bundle is made by `edge-fleet bundle`"
        return Finding(name, "warning", "it has no bundle and no blobs", advice)
    return Finding(name, "ok", f"{_count(len(paths), 'bundle')}, {_count(blobs, 'file')} in blobs")


def _blobs(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(SHA256.fullmatch(entry.name) is not None for entry in itertools.islice(entries, MAX_BLOBS))
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _not_a_bundle(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            for _ in bundle.members(file):
                pass
    except (OSError, BundleError) as error:
        return error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return None


# -- on the network ----------------------------------------------------------------------------------------------------------------


def _neighbour(address: str, clock: Clock, known: Known | None) -> Finding:
    name = f"neighbour {address}"
    http = FleetHttp(f"http://{address}", clock, connect_timeout_s=NEIGHBOUR_CONNECT_S)
    try:
        status = _ask(http, known)
    except Problem as problem:
        advice = "see whether it is switched on, has sync.neighbour_listen, and its firewall lets this device in"
        return Finding(name, "warning", problem.message, advice)
    if status in (200, 206) and known is not None:
        return Finding(name, "ok", f"it lends, and has {known[0]}")
    return Finding(name, "ok", "it lends; what it has is found out when it is asked")


def _mirror(url: str, who: Identity | None, clock: Clock, unset: Callable[[], bool], known: Known | None, way: Way) -> Finding:
    name = f"mirror {url}"
    http = FleetHttp(url, clock, ca=who.ca_file if who else None, public=True, unset=unset, way=way)
    try:
        status = _ask(http, known)
    except Problem as problem:
        return Finding(
            name,
            "warning",
            problem.message,
            "open the address from here; its certificate has to be of an authority that this machine trusts",
        )
    if status == 404 and known is not None:
        advice = f"see whether {url}{enrolment.BLOBS_PATH} is where its copy of the fleet's files begins, and whether the copy is of today"
        return Finding(name, "warning", f"it answers, and does not have {known[0]}, which serves here", advice)
    if status == 200:
        return Finding(name, "ok", "it has files, but sends no ranges: what breaks off there begins anew")
    return Finding(name, "ok", f"it has {known[0]}" if status == 206 and known else "it answers")


def _ask(http: FleetHttp, known: Known | None) -> int:
    """The status of an answer to who asks for the first byte of a file.  Raises: Problem for any but those that a source
    gives.
    """
    try:
        sha256 = known[1] if known else NOBODYS
        with http.open(http.url(enrolment.BLOBS_PATH + sha256), headers={"Range": "bytes=0-0"}, accept=(200, 206)) as answer:
            return answer.status_code
    except HttpStatus as problem:
        if problem.status == 404:
            return 404
        raise
    finally:
        http.close()


def _lending(listen: str) -> Finding:
    name = "lending to neighbours"
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        socket.create_connection((_ANYWHERE.get(host, host), int(port)), timeout=NEIGHBOUR_CONNECT_S).close()
    except OSError as error:
        message = f"nobody listens at {listen}: {error.strerror or error}"
        return Finding(name, "warning", message, "start `edge-agent sync`; its log says whether the port was taken")
    return Finding(name, "ok", f"at {listen}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
