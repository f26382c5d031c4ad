"""The operator's side of the REST API: the profile file, and requests that speak it. Used by the CLI."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import requests
import yaml

from agent.common import files
from agent.contract.codec import convert
from fleet_server.errors import FleetError, Invalid, NotFound, ServerRefused, Unavailable

ENVIRONMENT = "EDGE_FLEET_PROFILE"
URL, TOKEN, CA = "EDGE_FLEET_URL", "EDGE_FLEET_TOKEN", "EDGE_FLEET_CA"
API = "/api/v1"
TIMEOUT_S = 30.0
UPLOAD_CHUNK = 256 * 1024
OTHERS_UPLOAD_S = 60.0
"""An upload by somebody else that has not gone on for so long is waited for no more."""
OTHERS_AGAIN_S = 0.3


_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Where the server is, whom to trust, and the access token. `ca` is a file with a certificate, `ca_sha256` the fingerprint
    that it must have; several of both while the fleet's CA is replaced.
    """

    url: str
    token: str
    ca: str | None = None
    ca_sha256: str | tuple[str, ...] | None = None

    def write(self, path: Path) -> None:
        files.make_directory(path.parent, mode=0o700)
        files.write(path, yaml.safe_dump(msgspec.to_builtins(self), sort_keys=False).encode(), mode=0o600)

    @classmethod
    def read(cls, path: Path, *, checked: bool = True) -> Profile:
        """The profile in a file; `checked`: its CA file is the one that it names.  Raises: NotFound, Invalid."""
        try:
            profile = convert(yaml.safe_load(path.read_bytes()), cls)
        except FileNotFoundError:
            raise NotFound(
                f"profile {path} does not exist; `edge-fleet init` writes one, or name yours with --profile, or set {URL} and {TOKEN}"
            ) from None
        except (OSError, yaml.YAMLError, msgspec.ValidationError) as error:
            raise Invalid(f"profile {path} cannot be used: {error}") from error
        if checked:
            profile.check_ca()
        return profile

    @classmethod
    def chosen(cls, path: Path | None) -> Profile:
        """The profile in `path`; without one, what the environment says (EDGE_FLEET_URL, EDGE_FLEET_TOKEN, EDGE_FLEET_CA) over
        the profile that stands where profiles do. A token goes to the address that it came with: another address needs a token
        of its own.

        Raises: NotFound, Invalid.
        """
        if path is not None:
            return cls.read(path)
        url, token, ca = (os.environ.get(name) or None for name in (URL, TOKEN, CA))
        if url is not None:
            if token is None:
                raise Invalid(f"{URL} is set, so the token has to come from {TOKEN}: the profile's is for another server")
            return cls(url=url, token=token, ca=ca)
        profile = cls.read(default_profile())
        if ca is not None:
            profile = msgspec.structs.replace(profile, ca=ca, ca_sha256=None)
        return msgspec.structs.replace(profile, token=token) if token is not None else profile

    def check_ca(self) -> None:
        """Raises: Invalid when the CA file does not have the fingerprint that the profile names."""
        if self.ca is None or self.ca_sha256 is None:
            return
        named = (self.ca_sha256,) if isinstance(self.ca_sha256, str) else self.ca_sha256
        try:
            found = [ssl.PEM_cert_to_DER_cert(one) for one in _CERTIFICATE.findall(Path(self.ca).read_text())]
        except (OSError, ValueError) as error:
            raise Invalid(f"the CA file {self.ca} of the profile cannot be read: {error}") from error
        if not found or any(hashlib.sha256(der).hexdigest() not in named for der in found):
            raise Invalid(
                f"the CA file {self.ca} is not the one that the profile names (sha256 {', '.join(named)}); get the right one. Where the "
                "fleet's CA was replaced, its administrator has it (edge-fleet ca trust --out FILE)"
            )


def default_profile() -> Path:
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "edge-fleet" / "profile.yaml"


class Client:
    """Requests to one server.  Every method raises ServerRefused (it said no) or Unavailable (it cannot be reached)."""

    def __init__(self, profile: Profile) -> None:
        self._url = profile.url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # neither proxies nor .netrc of the machine decide where a token goes
        self._session.headers["Authorization"] = f"Bearer {profile.token}"
        if profile.ca is not None:
            self._session.verify = profile.ca

    def close(self) -> None:
        self._session.close()

    def get(self, path: str, **query: Any) -> Any:
        return self._json("GET", path, params={k: v for k, v in query.items() if v is not None})

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._json("POST", path, json=body if body is not None else {})

    def put(self, path: str, body: dict[str, Any]) -> Any:
        return self._json("PUT", path, json=body)

    def delete(self, path: str) -> Any:
        return self._json("DELETE", path)

    def upload(self, sha256: str, path: Path, progress: Callable[[int], None]) -> None:
        """Sends the file unless the server has it, from where an upload stopped. `progress` gets the bytes done so far.

        While somebody else sends the same file it is waited for, as long as that goes on.
        """
        size, before, since = path.stat().st_size, -1, time.monotonic()
        while True:
            with self._request("HEAD", f"/blobs/{sha256}", allowed=(404,)) as response:
                offset = int(response.headers.get("Upload-Offset", "0"))
                there, under_way = response.status_code == 200, "Upload-Under-Way" in response.headers
            if there:
                progress(size)
                return
            if offset != before:
                before, since = offset, time.monotonic()
            stands_still = time.monotonic() - since > OTHERS_UPLOAD_S
            if not under_way or stands_still:
                try:
                    self._send(sha256, path, offset if offset <= size else 0, progress)
                except ServerRefused as refused:
                    if stands_still or refused.code not in {"conflict", "wrong_offset"}:
                        raise
                else:
                    return
            time.sleep(OTHERS_AGAIN_S)

    def _send(self, sha256: str, path: Path, offset: int, progress: Callable[[int], None]) -> None:
        with path.open("rb") as file:
            file.seek(offset)

            def pieces() -> Iterator[bytes]:
                progress(file.tell())
                while chunk := file.read(UPLOAD_CHUNK):
                    yield chunk
                    progress(file.tell())

            with self._request("PUT", f"/blobs/{sha256}", data=pieces(), headers={"Upload-Offset": str(offset)}):
                pass

    def download(self, path: str, body: dict[str, Any], file: IO[bytes], progress: Callable[[int, int], None]) -> None:
        """Writes the answer to a POST into `file`. `progress` gets the bytes done and all of them.

        Raises: Unavailable when the answer breaks off.
        """
        with self._request("POST", path, json=body, stream=True) as response, _translated(self._url):
            total, done = int(response.headers.get("Content-Length", "0")), 0
            for chunk in response.iter_content(UPLOAD_CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
        if done != total:
            raise Unavailable(f"{self._url} broke off after {done} of {total} bytes; try again")

    def stream(self, path: str, after: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Server-sent events as (kind, data), until the server ends the stream."""
        query = {} if after is None else {"after": after}
        with self._request("GET", path, params=query, stream=True, timeout=(TIMEOUT_S, 60.0)) as response:
            kind = ""
            with _translated(self._url):
                for line in response.iter_lines(chunk_size=1, decode_unicode=True):
                    if line.startswith("event: "):
                        kind = line[7:]
                    elif line.startswith("data: "):
                        yield kind, json.loads(line[6:])

    def _json(self, method: str, path: str, **options: Any) -> Any:
        with self._request(method, path, **options) as response:
            try:
                return response.json()
            except ValueError as error:
                raise Unavailable(f"{self._url} does not answer like an edge-fleet server: {error}") from error

    @contextlib.contextmanager
    def _request(self, method: str, path: str, *, allowed: tuple[int, ...] = (), **options: Any) -> Iterator[requests.Response]:
        options.setdefault("timeout", TIMEOUT_S)
        with _translated(self._url):
            response = self._session.request(method, f"{self._url}{API}{path}", **options)
        with response:
            if response.status_code >= 400 and response.status_code not in allowed:
                raise _refusal(response)
            yield response


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except requests.exceptions.SSLError as error:
        raise Unavailable(
            f"{url} cannot prove that it is your server: {error}. If the fleet's CA was replaced, its administrator has the new one "
            "(edge-fleet ca trust --out FILE)"
        ) from error
    except requests.exceptions.RequestException as error:
        raise Unavailable(f"{url} cannot be reached: {error}; is `edge-fleet serve` running?") from error


def _refusal(response: requests.Response) -> FleetError:
    try:
        body = response.json()
        text, code = str(body["error"]), str(body["code"])
    except (ValueError, KeyError, TypeError):
        text, code = f"the server answered {response.status_code}", "failed"
    if response.status_code >= 500:
        return Unavailable(text, code=code)
    return ServerRefused(text, code, response.status_code)
