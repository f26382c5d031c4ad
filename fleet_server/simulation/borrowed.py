"""A server that runs already: devices enrol there as real ones do, in a group of their own, and are deleted in the end."""

from __future__ import annotations

import hashlib
import http.client
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.common import files
from agent.contract.codec import ContractError, decode, encode
from agent.contract.enrolment import (
    CA_PATH,
    ENROL_PATH,
    MAX_RESPONSE_BYTES,
    EnrolmentRequest,
    EnrolmentResponse,
    EnrolmentString,
)
from fleet_server.client import Client
from fleet_server.devices import pki
from fleet_server.errors import FleetError, Refused, ServerRefused, Unavailable
from fleet_server.simulation import papers
from fleet_server.simulation.members import Member
from fleet_server.simulation.papers import Address, Papers

TOKEN_S = 3600.0
TIMEOUT_S = 60.0
AT_ONCE = 4
TRIES = 3
LEFT_NAMED = 10
NOT_FOUND = 404


class Borrowed:
    """Between `enrol` and `leave` the server has simulated devices."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client, self._folder, self._groups = client, folder, set[str]()
        self._token: str | None = None
        self._enrolled: list[str] = []
        self._answer: EnrolmentResponse | None = None

    def enrol(self, members: Sequence[Member], progress: Callable[[int], None]) -> dict[str, Papers]:
        """Enrols the devices, each over HTTPS with a request of its own: device → its papers. All are in the groups of the first
        one.  Raises: ServerRefused, Refused, Unavailable.
        """
        body = {"groups": list(members[0].groups), "uses": len(members), "ttl_s": TOKEN_S}
        self._groups = set(members[0].groups)
        made = self._client.post("/enrolment-tokens", body)
        self._token = made["id"]
        string = EnrolmentString.parse(made["string"])
        files.make_directory(self._folder / "devices", mode=0o700)
        self._fetch_ca(string)
        found: dict[str, Papers] = {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for one in pool.map(lambda member: self._enrol(string, member), members):
                found[one.device] = one
                progress(len(found))
        return found

    def address(self) -> Address:
        """As the server told the devices."""
        assert self._answer is not None
        return Address(
            fleet=self._answer.fleet, device_url=self._answer.device_url, broker_host=self._answer.broker_host,
            broker_port=self._answer.broker_port, ca=self._folder / "ca.pem", root=self._answer.tuf_root.encode(),
        )  # fmt: skip

    def leave(self, progress: Callable[[int, int], None]) -> None:
        """Ends a rollout to the devices that is under way, deletes them and the enrolment token.

        Raises: Unavailable that names what is left.
        """
        left = self._end_rollouts()
        for number, device in enumerate(self._enrolled, start=1):
            if not self._tried(lambda device=device: self._client.delete(f"/devices/{device}")):  # type: ignore[misc]
                left.append(f"device {device}")
            progress(number, len(self._enrolled))
        if self._token is not None and not self._tried(lambda: self._client.delete(f"/enrolment-tokens/{self._token}")):
            left.append(f"enrolment token {self._token}")
        if left:
            some = ", ".join(left[:LEFT_NAMED]) + (", …" if len(left) > LEFT_NAMED else "")
            raise Unavailable(f"{len(left)} things could not be removed from the server, remove them by hand: {some}")

    def _end_rollouts(self) -> list[str]:
        """Ends what reaches the group of these devices; what could not be ended."""
        found: list[Any] = []
        if self._enrolled and not self._tried(lambda: found.extend(self._client.get("/rollouts", limit=100))):
            return [f"a rollout to the group {', '.join(self._groups)}, if there is one"]
        left = []
        for one in found:
            groups = {group for wave in one["waves"] for group in wave["groups"]}
            under_way = one["state"] not in {"completed", "superseded", "aborted"} and self._groups & groups
            if under_way and not self._tried(lambda one=one: self._client.post(f"/rollouts/{one['id']}/abort")):  # type: ignore[misc]
                left.append(f"rollout {one['id']}")
        return left

    @staticmethod
    def _tried(ask: Callable[[], object]) -> bool:
        """Whether it is done, or what it was about is not there."""
        for _ in range(TRIES):
            try:
                ask()
            except ServerRefused as refused:
                return refused.status == NOT_FOUND
            except FleetError:
                continue
            return True
        return False

    def _fetch_ca(self, string: EnrolmentString) -> None:
        """The fleet's CA, proved by the fingerprint that came with the token over the operator's own connection."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what it gives is compared below
        connection = http.client.HTTPSConnection(string.host, string.port, timeout=TIMEOUT_S, context=context)
        try:
            connection.request("GET", CA_PATH)
            pem = connection.getresponse().read(MAX_RESPONSE_BYTES)
            found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).hexdigest()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unavailable(f"{string.base_url} does not give its CA: {error}") from error
        finally:
            connection.close()
        if found != string.ca_sha256:
            raise Refused(f"{string.base_url} has another CA than the one that the enrolment names", code="wrong_ca")
        files.write(self._folder / "ca.pem", pem)

    def _enrol(self, string: EnrolmentString, member: Member) -> Papers:
        key = ec.generate_private_key(ec.SECP256R1())
        csr = papers.request(key, member.id).public_bytes(serialization.Encoding.PEM).decode()
        self._enrolled.append(member.id)  # before it is known whether it was: an answer may be lost
        asks = EnrolmentRequest(token=string.token, csr_pem=csr, device=member.id, hardware=member.hardware)
        try:
            answer = requests.post(
                string.base_url + ENROL_PATH, data=encode(asks), verify=str(self._folder / "ca.pem"), timeout=TIMEOUT_S
            )
            if answer.status_code != requests.codes.ok:
                raise Refused(f"the server does not enrol {member.id}: {answer.text[:500]}")
            self._answer = given = decode(answer.content, EnrolmentResponse, limit_bytes=MAX_RESPONSE_BYTES)
        except (requests.RequestException, ContractError) as error:
            raise Unavailable(f"{member.id} cannot be enrolled: {error}") from error
        file = self._folder / "devices" / f"{member.id}.pem"
        files.write(file, given.certificate_pem.encode() + pki.key_pem(key), mode=0o600)
        return Papers(member.id, key, file)
