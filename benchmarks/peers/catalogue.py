"""Which servers are compared, how each is started, and the request that asks it for a prediction."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import models, processes
from benchmarks.models import Subject

HERE = Path(__file__).parent
SERVERS = HERE / "servers"
ENVIRONMENTS = HERE.parents[1] / ".cache/peers"


@dataclass(frozen=True)
class Place:
    """Where one server runs: a folder of its own, the folder of the models, and the address it is told to listen at (a socket's
    path or 127.0.0.1:PORT).
    """

    folder: Path
    models: Path
    address: str

    @property
    def port(self) -> str:
        return self.address.rpartition(":")[2]


@dataclass(frozen=True)
class Peer:
    """One server. `environment` names its file in requirements/, empty for ours; `speaks` is what the requests are."""

    name: str
    speaks: str
    environment: str
    command: Callable[[Place], list[str]]
    request: Callable[[Subject], bytes]
    unix: bool = False
    settings: dict[str, str] = field(default_factory=dict)

    def install(self) -> None:
        """The peer's own virtual environment, once."""
        if not self.environment:
            return
        folder = ENVIRONMENTS / self.environment
        wanted = HERE / "requirements" / f"{self.environment}.txt"
        mark = folder / ".installed"
        if mark.is_file() and mark.read_bytes() == wanted.read_bytes():
            return
        print(f"installing {wanted.stem} into {folder} …", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)]
        subprocess.run(pip, check=True)
        mark.write_bytes(wanted.read_bytes())

    def place(self, folder: Path, models_folder: Path) -> Place:
        folder.mkdir(parents=True)
        return Place(folder, models_folder, str(folder / "peer.sock") if self.unix else f"127.0.0.1:{_free_port()}")

    def environ(self, place: Place) -> dict[str, str]:
        return {
            **processes.environment(),
            "ORT_DISABLE_TELEMETRY": "1",
            "ORT_TELEMETRY_DISABLED": "1",
            "PEER_MODELS": str(place.models),
            "PYTHONPATH": str(SERVERS),
            "HOME": str(place.folder),
            **{key: value.format(folder=place.folder, port=place.port) for key, value in self.settings.items()},
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- requests --------------------------------------------------------------------------------------------------------------


def _post(path: str, body: bytes, kind: str, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"content-type: {kind}", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def raw_bytes(subject: Subject) -> bytes:
    return _post(f"/predict/{subject.name}", subject.array.tobytes(), "application/octet-stream")


def fastapi_json(subject: Subject) -> bytes:
    return _post(f"/predict/{subject.name}", json.dumps({"x": subject.array.tolist()}).encode(), "application/json")


def litserve_json(subject: Subject) -> bytes:
    return _post("/predict", json.dumps({"model": subject.name, "x": subject.array.tolist()}).encode(), "application/json")


def bentoml_json(subject: Subject) -> bytes:
    return _post(f"/{subject.name}", json.dumps({"x": subject.array.tolist()}).encode(), "application/json")


def oip_json(subject: Subject) -> bytes:
    tensor = {"name": "x", "shape": subject.array.shape, "datatype": "FP32", "data": subject.array.ravel().tolist()}
    return _post(f"/v2/models/{subject.name}/infer", json.dumps({"inputs": [tensor]}).encode(), "application/json")


def oip_binary(subject: Subject) -> bytes:
    tensor = {
        "name": "x",
        "shape": subject.array.shape,
        "datatype": "FP32",
        "parameters": {"binary_data_size": subject.array.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = head + subject.array.tobytes()
    path = f"/v2/models/{subject.name}/infer"
    return _post(path, body, "application/octet-stream", f"inference-header-content-length: {len(head)}")


# -- servers ---------------------------------------------------------------------------------------------------------------


def _script(environment: str, script: str, *more: str) -> Callable[[Place], list[str]]:
    python = str(ENVIRONMENTS / environment / "bin/python")

    def command(place: Place) -> list[str]:
        address = place.address if "/" in place.address else place.port
        return [python, str(SERVERS / script), address, *(text.format(folder=place.folder) for text in more)]

    return command


def _ours(place: Place) -> list[str]:
    return processes.agent("run", place.models, "--socket", place.address)


def _mlserver(place: Place) -> list[str]:
    settings = {
        "host": "127.0.0.1", "http_port": int(place.port), "grpc_port": _free_port(), "metrics_endpoint": None,
        "parallel_workers": 0, "debug": False, "metrics_dir": str(place.folder), "environments_dir": str(place.folder),
    }  # fmt: skip
    (place.folder / "settings.json").write_text(json.dumps(settings))
    for name in ("tiny", "image"):
        (place.folder / name).mkdir()
        document = {"name": name, "implementation": "mlserver_runtime.Onnx"}
        (place.folder / name / "model-settings.json").write_text(json.dumps(document))
    return [str(ENVIRONMENTS / "mlserver/bin/mlserver"), "start", str(place.folder)]


def _bentoml(place: Place) -> list[str]:
    program = str(ENVIRONMENTS / "bentoml/bin/bentoml")
    return [program, "serve", "bentoml_app:Predict", "--host", "127.0.0.1", "--port", place.port, "--working-dir", str(SERVERS)]


PEERS = (
    Peer("edge-agent", "Unix socket, binary tensors", "", _ours, lambda subject: models.request(subject.name, subject.array), unix=True),
    Peer("FastAPI, raw bytes", "Unix socket, raw bytes", "fastapi", _script("fastapi", "fastapi_raw.py"), raw_bytes, unix=True),
    Peer("FastAPI, JSON", "Unix socket, JSON", "fastapi", _script("fastapi", "fastapi_json.py"), fastapi_json, unix=True),
    Peer("KServe", "HTTP, binary tensors", "kserve", _script("kserve", "kserve_app.py"), oip_binary),
    Peer("MLServer", "HTTP, JSON", "mlserver", _mlserver, oip_json),
    Peer("LitServe", "HTTP, JSON", "litserve", _script("litserve", "litserve_app.py"), litserve_json),
    Peer(
        "BentoML", "HTTP, JSON", "bentoml", _bentoml, bentoml_json,
        settings={"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": "{folder}"},
    ),
    Peer(
        "PyTriton", "HTTP, binary tensors", "pytriton", _script("pytriton", "pytriton_app.py", "{folder}/workspace"), oip_binary,
        # Triton's Python backend looks for the interpreter's library, and must find this one
        settings={"PYTRITON_NO_TELEMETRY": "1", "PYTRITON_HOME": "{folder}", "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))},
    ),
)  # fmt: skip
