"""A real server process on a real socket, and a client that may say anything."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from agent.client import Client
from agent.contract.codec import encode
from agent.store import Choice, Selection, Store, hash_file

DEADLINE_S = 20.0


class Server:
    """`edge-agent run` or `edge-agent serve`, ready when `start` returns: it says so as systemd is told."""

    def __init__(self, folder, *arguments, environment=None):
        self.folder = folder
        self.socket = folder / "s.sock"
        self.arguments = [str(a) for a in arguments]
        self.environment = environment or {}
        self.process = None
        self.messages = []

    def start(self, *, wait=True, deadline_s=DEADLINE_S):
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = self.folder / f"notify-{time.monotonic_ns()}"
        self._notify.bind(str(address))
        self._notify.settimeout(deadline_s)
        self.log = (self.folder / "log.txt").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agent.cli", *self.arguments],
            env={**os.environ, **self.environment, "NOTIFY_SOCKET": str(address)},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        if wait:
            self.wait_for("READY=1")
        return self

    def wait_for(self, message):
        while True:
            said = self._notify.recv(4096).decode()
            self.messages.append(said)
            if message in said:
                return

    def output(self):
        return (self.folder / "log.txt").read_text()

    def stop(self):
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(DEADLINE_S)
        self._close()
        return code

    def kill(self):
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self._close()

    def _close(self):
        self._notify.close()
        self.log.close()
        self.process = None

    def client(self, **options):
        return Client(self.socket, **options)

    def connect(self, timeout_s=10.0):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        sock.connect(str(self.socket))
        return sock

    def port(self):
        """What the system chose for `127.0.0.1:0`: the one socket on the loopback that the process listens on."""
        inodes = set()
        for descriptor in list(Path(f"/proc/{self.process.pid}/fd").iterdir()):
            with contextlib.suppress(FileNotFoundError):  # one that was open for a moment
                inodes.add(str(descriptor.readlink()))
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                return int(fields[1].rpartition(":")[2], 16)
        raise AssertionError("the process listens on no port")

    def raw(self, *pieces, end=False):
        """Sends bytes as they are and reads until the server closes or a whole answer is there: (status, headers, body)."""
        with self.connect() as sock:
            for piece in pieces:
                sock.sendall(piece)
            if end:
                sock.shutdown(socket.SHUT_WR)
            return read_answer(sock)


def read_answer(sock, rest=b""):
    data = rest
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            raise EOFError(f"the connection ended after {data!r}")
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    status = int(lines[0].split()[1])
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
    size = int(headers.get("content-length", 0))
    while len(body) < size:
        piece = sock.recv(65536)
        if not piece:
            raise EOFError("the connection ended within an answer")
        body += piece
    assert len(body) == size, body
    return status, headers, body


def closed(sock):
    """Whether the server ends the connection (within the socket's timeout)."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def request(method, path, body=b"", **headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Device:
    """A store with releases of ONNX files, as `sync` would have written it."""

    def __init__(self, folder):
        self.folder = folder
        self.store = Store.create(folder / "store")
        self.config = folder / "agent.yaml"
        self.socket = folder / "s.sock"

    def release(self, model, version, path, *, runtime="onnx", variant="cpu", data=(), beside=(), **settings):
        """`data`: the model's names for its other files, which are beside it, as are those that the release has `beside`."""
        files = {}
        for location in ("", *data, *beside):
            source = path.parent / location if location else path
            sha256 = hash_file(source)
            (self.store.blobs / sha256).write_bytes(source.read_bytes())
            name = location or re.sub(r"[^A-Za-z0-9._-]", "-", path.name)
            files[name] = {"sha256": sha256, "size_bytes": source.stat().st_size}
        self.store.write_manifest(
            encode(
                {
                    "kind": "release",
                    "format": 1,
                    "model": model,
                    "version": version,
                    "files": files,
                    "variants": [
                        {
                            "name": variant,
                            "runtime": runtime,
                            "file": next(iter(files)),
                            "data": {location: location for location in data},
                            **settings,
                        }
                    ],
                }
            )
        )

    def select(self, model, active, previous=None, variant="cpu"):
        choice = None if previous is None else Choice(version=previous, variant=variant)
        self.store.select(Selection(model=model, active=Choice(version=active, variant=variant), previous=choice))

    def server(self, environment=None, **serve):
        import yaml

        settings = {"socket": str(self.socket), **serve}
        self.config.write_text(yaml.safe_dump({"store": str(self.store.root), "serve": settings}))
        return Server(self.folder, "serve", "--config", self.config, environment=environment)
