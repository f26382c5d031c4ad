"""`serve` as the updater sees it: control routes over a real Unix socket, models that are names only, and numbers a test sets.

It reads the store's selections when it (re)starts, like the real one.
"""

from __future__ import annotations

import json
import socketserver
import threading
import uuid
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from agent.store import Selection, Store, StoreError

BOUNDS = [0.1, 1.0, 10.0, 100.0]


def stats(ok: int = 0, invalid: int = 0, run: int = 0, counts: list[int] | None = None) -> dict:
    return {
        "requests": ok + invalid + run,
        "ok": ok,
        "failed": {"invalid": invalid, "run": run, "unavailable": 0},
        "latency": {"bounds_ms": BOUNDS, "counts": counts or [ok, 0, 0, 0, 0], "sum_ms": 0.0, "count": ok},
    }


class FakeServe:
    def __init__(self, store: Store, socket_path: Path) -> None:
        self.store = store
        self.socket_path = socket_path
        self.stats: dict[tuple[str, int], dict] = {}
        self.refuse: dict[tuple[str, int], tuple[int, str, str]] = {}  # (action, version) → status, code, error
        self.calls: list[tuple[str, str, int | None]] = []
        self.block: dict[str, threading.Event] = {}
        self.crash_on: tuple[str, int] | None = None
        self._lock = threading.Lock()
        self._server: socketserver.ThreadingUnixStreamServer | None = None
        self.start()

    def start(self) -> None:
        self.instance = uuid.uuid4().hex
        self.models: dict[str, dict] = {}
        for model, selection in self.store.selections().items():
            if isinstance(selection, Selection):
                self._load(model, selection.active.version, selection.active.variant)
                self.models[model]["active"] = selection.active.version
        self.socket_path.unlink(missing_ok=True)
        outer = self

        class Handler(_Handler):
            serve = outer

        self._server = _Server(str(self.socket_path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        for event in self.block.values():
            event.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def restart(self) -> None:
        """A crash, and systemd starting it again."""
        self.stop()
        self.start()

    def status(self) -> dict:
        return {"instance": self.instance, "pid": 1, "started": 0, "agent_version": "0.1.0", "models": self.models}

    def _load(self, model: str, version: int, variant: str) -> dict:
        release = self.store.release(model, _choice(version, variant))
        entry = self.models.setdefault(model, {"active": None, "previous": None, "versions": {}})
        entry["versions"][str(version)] = {
            "version": version, "variant": variant, "state": "READY", "reason": "",
            "sha256": release.manifest.files[release.variant.file].sha256,
            "placement": {"requested": "cpu", "actual": "cpu", "fallback": None}, "load_ms": 1.0, "memory_bytes": 0,
            "stats": self.stats.get((model, version), stats()),
        }  # fmt: skip
        return entry["versions"][str(version)]

    def act(self, model: str, action: str, body: dict) -> tuple[int, dict]:
        version = body.get("version")
        self.calls.append((action, model, version))
        if action in self.block:
            self.block[action].wait(30)
        if (action, version) in self.refuse:
            status, code, error = self.refuse[action, version]
            return status, {"error": error, "code": code}
        with self._lock:
            try:
                return self._act(model, action, version, body)
            except StoreError as error:
                return 409, {"error": str(error), "code": "not_in_store"}

    def _act(self, model: str, action: str, version: int | None, body: dict) -> tuple[int, dict]:
        if action == "load":
            return 200, self._load(model, version, body["variant"])
        entry = self.models.get(model)
        if entry is None and action != "rollback":
            return 404, {"error": f"no model {model!r}", "code": "unknown_model"}
        if action == "activate":
            if str(version) not in entry["versions"]:
                return 409, {"error": "not loaded", "code": "not_loaded"}
            if entry["active"] != version:
                entry["previous"], entry["active"] = entry["active"], version
        elif action == "rollback":
            self._load(model, version, "cpu")
            entry = self.models[model]
            entry.update(active=version, previous=None, versions={str(version): entry["versions"][str(version)]})
        elif action == "commit":
            entry["previous"] = None
            entry["versions"] = {str(entry["active"]): entry["versions"][str(entry["active"])]}
        elif action == "unload":
            del self.models[model]
            return 200, {}
        return 200, {"active": entry["active"], "previous": entry["previous"]}

    def activate_team(self, versions: dict) -> tuple[int, dict]:
        self.calls.append(("activate_team", ",".join(sorted(versions)), None))
        with self._lock:
            for model, version in versions.items():
                if version is not None and str(version) not in self.models.get(model, {"versions": {}})["versions"]:
                    return 409, {"error": f"{model} is not loaded", "code": "not_loaded"}
            for model, version in versions.items():
                if version is None:
                    self.models.pop(model, None)
                else:
                    self._act(model, "activate", version, {})
        return 200, {}

    def answer_with(self, model: str, version: int, numbers: dict) -> None:
        """What this version is to say about itself from now on."""
        self.stats[model, version] = numbers
        with self._lock:
            if version_entry := self.models.get(model, {}).get("versions", {}).get(str(version)):
                version_entry["stats"] = numbers


def _choice(version: int, variant: str):
    from agent.store import Choice

    return Choice(version=version, variant=variant)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = True

    def get_request(self):
        request, _ = super().get_request()
        request.settimeout(5)
        return request, ("local", 0)

    def handle_error(self, request, client_address) -> None:
        return


class _Handler(BaseHTTPRequestHandler):
    serve: FakeServe

    def log_message(self, *args) -> None:
        return

    def do_GET(self) -> None:
        self._answer(200, self.serve.status())

    def do_POST(self) -> None:
        *_, model, action = self.path.split("/")
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self.serve.crash_on == (action, body.get("version")):
            self.connection.close()
            return
        if self.path == "/control/v1/activate":
            self._answer(*self.serve.activate_team(body["versions"]))
            return
        self._answer(*self.serve.act(model, action, body))

    def _answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
