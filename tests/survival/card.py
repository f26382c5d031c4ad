"""A disk of its own for a device: ext4 on a loop device, which can lose its power, run full and refuse writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
"""What is not on the disk yet is lost, the journal's open transaction too: what a power cut leaves."""


GONE_LIMIT_S = 15.0


class CardError(Exception):
    """The file system cannot be made, mounted or repaired."""


class Card:
    """An ext4 file system of `size_mb`, mounted at `path`. Needs root."""

    def __init__(self, folder: Path, size_mb: int = 768) -> None:
        self.path = folder / "card"
        self._image = (folder / "card.img").resolve()
        self._size = size_mb << 20

    def __enter__(self) -> Card:  # noqa: PYI034 - typing.Self came with Python 3.11
        self.path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(self._size)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", self._image)
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(CardError):
            self._unmount()
        self._image.unlink()

    def sync(self) -> None:
        """What was written before a test begins is not what it is about."""
        _run("sync", "--file-system", self.path)

    def cut(self) -> None:
        """The power goes: from here on nothing reaches the disk, and every access fails with EIO."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def power_up(self) -> None:
        """After a cut, once every process that used it is gone: the kernel replays the journal."""
        self._unmount()
        self._mount()

    def check(self) -> None:
        """Raises: CardError when the file system itself is damaged."""
        self._unmount()
        _run("e2fsck", "-f", "-n", self._image)
        self._mount()

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte is free meanwhile."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as out, contextlib.suppress(OSError):
            for size in (1 << 20, 1 << 12, 1 << 9, 1):
                with contextlib.suppress(OSError):
                    while True:
                        out.write(b"\0" * size)
        try:
            yield
        finally:
            ballast.unlink()

    def fail(self) -> None:
        """The kernel finds an error and lets nobody write any more; only `power_up` ends that."""
        Path(f"/sys/fs/ext4/{self._device()}/trigger_fs_error").write_text("made by a test")

    def _device(self) -> str:
        return Path(_run("findmnt", "--noheadings", "--output", "SOURCE", self.path).strip()).name

    def _mount(self) -> None:
        _run("mount", "-o", "loop,noatime,errors=remount-ro", self._image, self.path)

    def _unmount(self) -> None:
        """Returns when nobody has the file system any more, in other mount namespaces neither: else the same one would be mounted again."""
        loop = Path(f"/sys/block/{self._device()}/loop/backing_file")
        deadline = time.monotonic() + GONE_LIMIT_S
        while True:
            try:
                _run("umount", self.path)
                break
            except CardError as error:  # the kernel closes the files of a process that is gone a moment later
                if "busy" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.005)
        while _read(loop) == str(self._image):
            if time.monotonic() > deadline:
                raise CardError(
                    f"{self.path} is still in use {GONE_LIMIT_S:.0f} s after it was unmounted, by {_holders(self.path)}"
                )
            time.sleep(0.005)


def _holders(path: Path) -> list[str]:
    """The processes in whose mount namespaces it is still mounted."""
    tables = Path("/proc").glob("[0-9]*/mounts")
    return [_read(table.with_name("comm")) + f" ({table.parent.name})" for table in tables if f" {path} " in _read(table)]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _run(*line: object) -> str:
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise CardError(f"{line[0]} ended with status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout
