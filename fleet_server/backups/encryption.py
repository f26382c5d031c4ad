"""A backup for certain eyes: encrypted with age (https://age-encryption.org), so that the tool `age` opens it, too.

Whoever takes backups needs public keys only (`age1…`, or the line of an SSH key); the machine that is backed up cannot read its old
backups, and nor can whoever takes it over.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from fleet_server.errors import Invalid

MAGIC = b"age-encryption.org/"
ADVICE = "the library for it is not installed: pip install 'edge-inference-agent[backups]'"


@contextlib.contextmanager
def encrypting(out: IO[bytes], recipients: Sequence[str]) -> Iterator[IO[bytes]]:
    """A file of which `out` gets what is written, encrypted for each of the recipients; `out` itself when there is none.

    Raises: Invalid for a recipient that cannot be read.
    """
    if not recipients:
        yield out
        return
    age = _library()
    found = [_recipient(age, text) for text in recipients]
    with _through(lambda reading: age.encrypt_io(reading, out, found)) as writing:
        yield writing


@contextlib.contextmanager
def decrypted(source: IO[bytes], identities: Sequence[Path]) -> Iterator[IO[bytes]]:
    """A file of what is in `source`, decrypted where it is encrypted. `identities`: files with age's secret keys, or an SSH key.

    Raises: Invalid when no identity fits.
    """
    buffered = io.BufferedReader(cast("io.RawIOBase", source), 1 << 20) if not isinstance(source, io.BufferedReader) else source
    if not buffered.peek(len(MAGIC)).startswith(MAGIC):
        yield buffered
        return
    if not identities:
        raise Invalid("this backup is encrypted: name the file with the secret key (--identity)", code="encrypted")
    age = _library()
    keys = [key for path in identities for key in _identities(age, path)]
    receiving, sending = os.pipe()
    failures: list[Exception] = []

    def work() -> None:
        try:
            with os.fdopen(sending, "wb") as out:
                age.decrypt_io(buffered, out, keys)
        except Exception as error:  # noqa: BLE001 - told by whoever reads
            failures.append(error)

    worker = threading.Thread(target=work, name="decryption", daemon=True)
    worker.start()
    try:
        with os.fdopen(receiving, "rb") as reading:
            yield reading
    except Invalid:
        worker.join(1.0)
        _raise(failures)  # it is why nothing more came
        raise
    worker.join()
    _raise(failures)


def _raise(failures: list[Exception]) -> None:
    for error in failures:
        if not isinstance(error, BrokenPipeError):
            raise Invalid(
                f"the backup cannot be decrypted with this key, or it is cut off or damaged: {error}", code="encrypted"
            ) from error


@contextlib.contextmanager
def _through(work: Callable[[IO[bytes]], None]) -> Iterator[IO[bytes]]:
    """A file; `work` reads in a thread of its own what is written to it, and has done when the block ends."""
    receiving, sending = os.pipe()
    failures: list[BaseException] = []

    def run() -> None:
        with os.fdopen(receiving, "rb") as reading:
            try:
                work(reading)
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)

    worker = threading.Thread(target=run, name="encryption", daemon=True)
    worker.start()
    try:
        with os.fdopen(sending, "wb") as writing:
            yield writing
    except BrokenPipeError:
        worker.join()
        if not failures:
            raise
    worker.join()
    if failures:
        raise failures[0]


def _library() -> Any:
    try:
        import pyrage  # type: ignore[import-untyped]
    except ImportError as error:
        raise Invalid(ADVICE, code="no_encryption") from error
    return pyrage


def _recipient(age: Any, text: str) -> Any:
    for kind in (age.x25519.Recipient, age.ssh.Recipient):
        with contextlib.suppress(age.RecipientError):
            return kind.from_str(text.strip())
    raise Invalid(
        f"{text[:80]!r} is no public key: age1… as `age-keygen` prints it, or the line of an SSH key", code="bad_recipient"
    )


def _identities(age: Any, path: Path) -> list[Any]:
    data = path.read_bytes()
    with contextlib.suppress(age.IdentityError):
        return [age.ssh.Identity.from_buffer(data)]
    lines = [line.strip() for line in data.decode(errors="replace").splitlines()]
    try:
        found = [age.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
    except age.IdentityError as error:
        raise Invalid(f"{path} holds no secret key of age or SSH: {error}", code="bad_identity") from error
    if not found:
        raise Invalid(f"{path} holds no secret key of age or SSH", code="bad_identity")
    return found
