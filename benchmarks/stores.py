"""A store as `sync` would have written it, and the control routes as `sync` uses them."""

from pathlib import Path
from typing import Any

from agent.client import Client
from agent.contract.codec import encode
from agent.store import Store, hash_file


def release(store: Store, model: str, version: int, file: Path) -> None:
    """Puts a copy of the file into the store. An ONNX file carries the release's name as a note, so that no two have the same bytes."""
    data = file.read_bytes()
    if file.suffix == ".onnx":
        note = f"{model} {version}".encode()
        data += b"\x32" + bytes([len(note)]) + note  # ModelProto.doc_string
    copy = store.root.parent / f"{model}-{version}{file.suffix}"
    copy.write_bytes(data)
    sha256 = hash_file(copy)
    copy.replace(store.blob(sha256))
    document = {
        "model": model, "version": version, "files": {file.name: {"sha256": sha256, "size_bytes": len(data)}},
        "variants": [{"name": "cpu", "runtime": "tflite" if file.suffix == ".tflite" else "onnx", "file": file.name}],
    }  # fmt: skip
    store.write_manifest(encode(document))


def control(client: Client, model: str, action: str, body: dict[str, Any]) -> None:
    """Raises: RuntimeError with the server's answer when it refuses."""
    status, _, answer = client.request("POST", f"/control/v1/models/{model}/{action}", body)
    if status != 200:
        raise RuntimeError(f"{action} of {model}: {answer!r}")
