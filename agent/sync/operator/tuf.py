"""`edge-agent tuf`: our verification path against any TUF repository, with the command line of the public conformance suite for clients.

DIR/root.json, timestamp.json, …   the metadata that was verified, under names without versions
DIR/.edge-agent/                    the root of `init`, the highest versions, the last signed time
"""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]

from agent.common import files
from agent.contract.reasons import Reason
from agent.host.clock import LastKnownGood, SignedClock, SystemClock
from agent.sync.http import FleetHttp
from agent.sync.problems import Problem
from agent.sync.trust.metadata import MetadataClient, Session

MAX_ROOT_BYTES = 512_000
MAX_TARGET_BYTES = 256 * 1024 * 1024
"""A target is held in memory before its hash is known; releases' files never come this way."""

MAX_DELEGATIONS = 32
PRIVATE = ".edge-agent"


def init(folder: Path, root: Path) -> None:
    """Makes `root` the trusted root for the repository whose metadata `folder` will hold. Asks nobody.  Raises: OSError,
    Problem.
    """
    data = root.read_bytes()
    if len(data) > MAX_ROOT_BYTES:
        raise Problem(Reason.BAD_SIGNATURE, f"{root} has {len(data)} bytes, a root has at most {MAX_ROOT_BYTES}")
    files.make_directory(folder / PRIVATE, mode=0o700)
    files.write(folder / PRIVATE / "root", data)
    files.write(folder / "root.json", data)


def refresh(folder: Path, url: str) -> None:
    """Brings the top-level metadata up to date.  Raises: Problem, OSError."""
    with _opened(folder, url) as client, client.session() as session:
        client.keep(session.seen)


def download(folder: Path, url: str, base_url: str, into: Path, names: Sequence[str]) -> None:
    """The targets, one after the other; one that is there already is not asked for.  Raises: Problem at the first that fails;
    OSError.
    """
    with _opened(folder, url) as client, client.session() as session:
        client.keep(session.seen)
        for name in names:
            _one(session, name, base_url.rstrip("/") + "/", into)


def _one(session: Session, name: str, base_url: str, into: Path) -> None:
    target = session.info(name, f"target {name!r}")
    if target is None:
        raise Problem(Reason.WRONG_RELEASE, f"target {name!r} is not among those that were signed")
    path = into / urllib.parse.quote(name, safe="")  # one file name: a target's path leads nowhere outside
    if _there(target, path):
        return
    if target.length > MAX_TARGET_BYTES:
        raise Problem(Reason.BAD_MANIFEST, f"target {name!r} has {target.length} bytes, more than {MAX_TARGET_BYTES}")
    files.make_directory(into)
    files.write(path, session.fetch(target, base_url, f"target {name!r}"))


def _there(target: TargetFile, path: Path) -> bool:
    try:
        with path.open("rb") as file:
            target.verify_length_and_hashes(file)
    except (OSError, LengthOrHashMismatchError):
        return False
    return True


@contextlib.contextmanager
def _opened(folder: Path, url: str) -> Iterator[MetadataClient]:
    """A client of the repository in `folder`, closed at the end."""
    private = folder / PRIVATE
    try:
        root = (private / "root").read_bytes()
    except FileNotFoundError:
        raise Problem(
            Reason.STORE_FAILED, f"{folder} was not initialised: run `edge-agent tuf init TRUSTED_ROOT` first"
        ) from None
    clock = SignedClock(SystemClock(), LastKnownGood(private / "clock.json"))
    http = FleetHttp(url, clock)
    try:
        yield MetadataClient(
            memory=private,
            metadata=folder,
            root=root,
            url=url,
            http=http,
            clock=clock,
            max_delegations=MAX_DELEGATIONS,
        )
    finally:
        http.close()
