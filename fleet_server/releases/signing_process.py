"""Signing through a URI of securesystemslib, in a process of its own.

A token's PKCS#11 library is loaded into whoever uses it, and shares OpenSSL with it: after SoftHSM2 was asked for a signature,
the TLS of the same process failed with the errors it had left behind. So the library lives in a child, which is asked in lines
of JSON:

    parent: {"uri": …, "candidates": [public keys], "payload": hex}     or {"uri": …, "import": true}
    child:  {"ask": what}, answered by {"secret": …}, any number of times; then {"signature": …}, {"key": …} or {"error": text}
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, Key, Signature, Signer  # type: ignore[attr-defined]

from fleet_server.errors import Invalid

END_S = 10.0
"""For the child to end after its answer. How long the answer takes is not limited: a token may wait for a finger on its button.
"""

PROBE = b"edge-fleet asks whether this is the right key"
Ask = Callable[[str], str]


class ProcessSigner(Signer):
    """Signs in a child, with the one of `candidates` that the URI turns out to be.  Raises: Invalid when it is none of them."""

    def __init__(self, uri: str, candidates: Iterable[Key], ask: Ask) -> None:
        self._uri, self._ask = uri, ask
        known = {key.keyid: key for key in candidates}
        self._known = list(known.values())
        self._key = known[self.sign(PROBE).keyid]
        self._known = [self._key]

    @property
    def public_key(self) -> Key:
        return self._key

    def sign(self, payload: bytes) -> Signature:
        candidates = [to_dict(key) for key in self._known]
        answer = _converse({"uri": self._uri, "candidates": candidates, "payload": payload.hex()}, self._ask)
        return Signature.from_dict(answer["signature"])

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Ask | None = None) -> ProcessSigner:
        return cls(priv_key_uri, [public_key], secrets_handler or (lambda _: ""))


def imported(uri: str) -> Key:
    """The public key that a URI tells of itself.  Raises: Invalid."""
    data = _converse({"uri": uri, "import": True}, lambda _: "")["key"]
    return Key.from_dict(data.pop("keyid"), data)


def to_dict(key: Key) -> dict[str, Any]:
    return {"keyid": key.keyid, **key.to_dict()}


def _converse(request: dict[str, Any], ask: Ask) -> dict[str, Any]:
    line = [sys.executable, "-m", "fleet_server.releases.signing_process"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:  # noqa: S603 - our own module
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _send(child.stdin, request)
            while True:
                text = child.stdout.readline()
                answer: dict[str, Any] = json.loads(text) if text else {"error": "the signer's process died"}
                if "ask" not in answer:
                    break
                _send(child.stdin, {"secret": ask(answer["ask"])})
            child.stdin.close()
            child.wait(END_S)
        except BaseException:
            child.kill()
            raise
    if "error" in answer:
        raise Invalid(f"{request['uri']}: {answer['error']}", code="wrong_key")
    return answer


def _send(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


# -- in the child -----------------------------------------------------------------------------------------------------------------


def _serve() -> None:
    request = json.loads(sys.stdin.readline())
    try:
        answer = _import(request["uri"]) if request.get("import") else _sign(request)
    except Exception as error:  # noqa: BLE001 - each signer raises what its library raises
        answer = {"error": f"{type(error).__name__}: {error}"}
    _send(sys.stdout, answer)


def _sign(request: dict[str, Any]) -> dict[str, Any]:
    payload, why = bytes.fromhex(request["payload"]), "no key counts here"
    known: list[str] = []
    for data in request["candidates"]:
        key = Key.from_dict(data.pop("keyid"), data)
        try:
            signature = Signer.from_priv_key_uri(request["uri"], key, lambda what: _secret(what, known)).sign(payload)
            key.verify_signature(signature, payload)
        except Exception as error:  # noqa: BLE001 - as above
            why = f"{type(error).__name__}: {error}"
            if known and not isinstance(error, UnverifiedSignatureError):
                break  # perhaps a wrong PIN: trying it again with the next candidate would lock the token
            continue
        return {"signature": {**signature.to_dict(), "keyid": key.keyid}}
    return {"error": f"it cannot sign here, or is not one of the keys that count ({why})"}


def _secret(what: str, known: list[str]) -> str:
    """Asked for once, however many candidates are tried: a token locks after a few wrong PINs."""
    if not known:
        _send(sys.stdout, {"ask": what})
        known.append(json.loads(sys.stdin.readline())["secret"])
    return known[0]


def _import(uri: str) -> dict[str, Any]:
    scheme, _, rest = uri.partition(":")
    if scheme not in _IMPORTS:
        return {"error": f"the public key must be given as a file: {scheme} does not tell it"}
    _, key = _IMPORTS[scheme](SIGNER_FOR_URI_SCHEME[scheme], rest)
    return {"key": to_dict(key)}


def _hsm(signer: Any, rest: str) -> tuple[str, Key]:
    number, _, query = rest.partition("?")
    label = dict(urllib.parse.parse_qsl(query)).get("label")
    found: tuple[str, Key] = signer.import_(int(number) if number else None, label)
    return found


def _azure(signer: Any, rest: str) -> tuple[str, Key]:
    vault, _, key = rest.removeprefix("//").partition(".vault.azure.net/keys/")
    found: tuple[str, Key] = signer.import_(vault, key.partition("/")[0])
    return found


_IMPORTS: dict[str, Callable[[Any, str], tuple[str, Key]]] = {
    "hsm": _hsm,
    "azurekms": _azure,
    "awskms": lambda signer, rest: signer.import_(rest),
    "gcpkms": lambda signer, rest: signer.import_(rest.removeprefix("//")),
    "hv": lambda signer, rest: signer.import_(rest),
}

if __name__ == "__main__":
    _serve()
