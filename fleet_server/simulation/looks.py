"""How a simulated device that verifies learns the fleet's word: by python-tuf, from the documents of a poke and, for what is not
there, from the fleet server over HTTPS with its own certificate. Every call blocks, and is for a thread beside the loop.
"""

from __future__ import annotations

import hashlib
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import msgspec
import requests
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from tuf.api.exceptions import BadVersionNumberError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from agent.contract import enrolment
from agent.contract.assignment import ASSIGNMENT_TARGET, MAX_RECORD_BYTES, DeviceRecord, read_assignment
from agent.contract.codec import ContractError
from agent.contract.manifest import ReleaseManifest, parse_manifest
from agent.contract.names import ReleaseRef
from agent.contract.news import News
from fleet_server.errors import Refused, Unavailable
from fleet_server.simulation.news import Said, record_in
from fleet_server.simulation.papers import Address, Papers

TIMEOUT_S = 30.0
CHUNK = 256 * 1024
NOT_FOUND = 404


class Looker:
    """One device's trust, in a folder of its own. One thread at a time."""

    def __init__(self, address: Address, papers: Papers, folder: Path) -> None:
        self._address, self._papers, self._folder = address, papers, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._record: DeviceRecord | None = None
        self.asked = 0
        """Requests that were made of the server."""

    def look(self, news: News | None) -> Said | None:
        """The fleet's word, verified. None when `news` are older than what is known: the broker keeps the last poke, and metadata
        may have been renewed since.

        Raises: Refused when it does not verify; Unavailable when the server does not answer.
        """
        with self._session() as session:
            fetcher = _Fetcher(self, session, news)
            try:
                return self._look(fetcher)
            except BadVersionNumberError as error:
                if news is not None:
                    return None
                raise Refused(
                    f"{self._papers.device}: the server has older metadata than before: {error}", code="older"
                ) from error
            except (RepositoryError, VerificationError, ContractError, ValueError) as error:
                raise Refused(
                    f"{self._papers.device}: the fleet's word does not verify: {error}", code="bad_signature"
                ) from error
            except requests.RequestException as error:
                raise Unavailable(f"{self._papers.device}: {self._address.device_url} does not answer: {error}") from error

    def blob(self, sha256: str) -> int:
        """Fetches a file and checks its hash; how many bytes it has.  Raises: Refused, Unavailable."""
        size, digest = 0, hashlib.sha256()
        try:
            with self._session() as session, self._sent(self._get(session, enrolment.BLOBS_PATH + sha256)) as answer:
                for chunk in answer.iter_content(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
        except requests.RequestException as error:
            raise Unavailable(f"{self._papers.device}: blob {sha256} cannot be fetched: {error}") from error
        if digest.hexdigest() != sha256:
            raise Refused(f"{self._papers.device}: blob {sha256} has other bytes", code="hash_mismatch")
        return size

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        session.cert, session.verify = str(self._papers.file), str(self._address.ca)
        return session

    def _get(self, session: requests.Session, path: str) -> requests.Response:
        self.asked += 1
        answer = session.get(self._address.device_url + path, timeout=TIMEOUT_S, stream=True, allow_redirects=False)
        if answer.status_code != NOT_FOUND:
            answer.raise_for_status()
        return answer

    @staticmethod
    def _sent(answer: requests.Response) -> requests.Response:
        """What the server sends, or what is at the address that it sends the device to, where this device's certificate and the
        fleet's CA mean nothing.
        """
        if not answer.is_redirect:
            return answer
        answer.close()
        elsewhere = requests.get(answer.headers["Location"], timeout=TIMEOUT_S, stream=True)
        elsewhere.raise_for_status()
        return elsewhere

    def _look(self, fetcher: _Fetcher) -> Said:
        targets = self._folder / "targets"
        targets.mkdir(exist_ok=True)
        updater = Updater(
            str(self._folder / "metadata"), "poke:" + enrolment.METADATA_PATH, str(targets), "poke:" + enrolment.TARGETS_PATH,
            fetcher, UpdaterConfig(), bootstrap=self._address.root,
        )  # fmt: skip
        updater.refresh()
        assignment = read_assignment(self._target(updater, ASSIGNMENT_TARGET))
        if assignment.fleet != self._address.fleet:
            raise Refused(f"{self._papers.device}: the assignment is of fleet {assignment.fleet!r}", code="wrong_fleet")
        wanted = {ReleaseRef(model, number) for model, rules in assignment.models.items() for number in rules.named()}
        manifests = tuple(self._manifest(updater, ref) for ref in sorted(wanted))
        return Said(assignment, self._groups(fetcher), manifests)

    def _manifest(self, updater: Updater, ref: ReleaseRef) -> ReleaseManifest:
        return parse_manifest(self._target(updater, ref.target_path), expected=ref)

    def _target(self, updater: Updater, path: str) -> bytes:
        """The verified bytes of a target."""
        info = updater.get_targetinfo(path)
        if info is None:
            raise ContractError(f"{path} is not among what was signed")
        kept = self._folder / "targets" / hashlib.sha256(path.encode()).hexdigest()
        found = updater.find_cached_target(info, str(kept)) or updater.download_target(info, str(kept))
        return Path(found).read_bytes()

    def _groups(self, fetcher: _Fetcher) -> tuple[str, ...]:
        """The groups that the device's own record gives it, verified by the keys of the role `assignments`."""
        carried = fetcher.carried("record")
        if carried is None and self._record is not None:
            return self._record.groups
        data = (
            carried if carried is not None else b"".join(fetcher.fetch("poke:" + enrolment.RECORD_PATH))[: MAX_RECORD_BYTES + 1]
        )
        trusted = Metadata[Targets].from_file(str(self._folder / "metadata" / "targets.json")).signed
        role = trusted.get_delegated_role("assignments")
        envelope = Envelope.from_dict(msgspec.json.decode(data))
        envelope.verify([trusted.get_key(keyid) for keyid in role.keyids], role.threshold)
        record = record_in(data)
        if (record.fleet, record.device) != (self._address.fleet, self._papers.device):
            raise Refused(f"{self._papers.device}: the device record is of {record.device!r}", code="wrong_device")
        self._record = record
        return record.groups


class _Fetcher(FetcherInterface):
    """Documents by their paths: those that came with the poke, else the server's."""

    def __init__(self, looker: Looker, session: requests.Session, news: News | None) -> None:
        self._looker, self._session, self._news = looker, session, news

    def carried(self, path: str) -> bytes | None:
        text = self._news.documents.get(path) if self._news is not None else None
        return text.encode() if text is not None else None

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = urllib.parse.urlsplit(url).path
        if (found := self.carried(path.removeprefix("/"))) is not None:
            return iter([found])
        name = path.removeprefix(enrolment.METADATA_PATH)
        if self._news is not None and name.endswith(".root.json") and int(name.split(".")[0]) > self._news.root:
            raise DownloadHTTPError(f"the poke knows of no {path}", NOT_FOUND)
        with self._looker._get(self._session, path) as answer:  # noqa: SLF001 - the same module
            if answer.status_code == NOT_FOUND:
                raise DownloadHTTPError(f"the server has no {path}", NOT_FOUND)
            return iter([answer.content])
