"""A JPEG or PNG over the socket, labels back."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agent.contract.codec import encode
from agent.store import Choice, Selection, hash_file
from tests.serving.server import Device

DIGITS = Path(__file__).resolve().parents[2] / "examples/digits"
GREY = {"width": 8, "height": 8, "color": "gray", "scale": 1 / 255, "fit": "stretch", "top": 3}


@pytest.fixture(scope="module")
def images():
    with np.load(DIGITS / "data/digits-test.npz") as data:
        return data["image_u8"], data["label"]


def picture(image, kind="PNG"):
    memory = io.BytesIO()
    Image.fromarray((image.astype(np.uint16) * 255 // 16).astype(np.uint8)).save(memory, kind)
    return memory.getvalue()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The digits model with a declaration of its pictures and the names of its classes, and one without."""
    folder = tmp_path_factory.mktemp("pictures")
    device = Device(folder)
    names = folder / "labels.txt"
    names.write_text("".join(f"digit {n}\n" for n in range(10)))
    model = DIGITS / "models/digits-v2-int8-qdq.onnx"
    files = {path.name: {"sha256": hash_file(path), "size_bytes": path.stat().st_size} for path in (model, names)}
    for path in (model, names):
        (device.store.blobs / hash_file(path)).write_bytes(path.read_bytes())
    document = {
        "kind": "release", "format": 1, "model": "digits", "version": 1, "files": files,
        "variants": [{"name": "cpu", "runtime": "onnx", "file": model.name, "picture": GREY}],
        "outputs": [{"name": "probs", "datatype": "FP32", "shape": [-1, 10], "labels": names.name}],
    }  # fmt: skip
    device.store.write_manifest(encode(document))
    device.store.select(Selection(model="digits", active=Choice(version=1, variant="cpu")))
    device.release("plain", 1, model)
    device.select("plain", 1)
    server = device.server()
    yield server.start()
    server.stop()


def ask(server, data, model="digits", query=""):
    with server.client() as client:
        status, _, body = client.request("POST", f"/v2/models/{model}/picture{query}", data)
    return status, json.loads(body)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_gets_its_labels(served, images, kind):
    right = 0
    for image, label in zip(*images, strict=True):
        status, answer = ask(served, picture(image, kind))
        assert status == 200, answer
        assert len(answer["labels"]) == 3
        right += answer["labels"][0]["label"] == f"digit {label}"
        if right > 40:
            break
    assert right > 40


def test_the_answer_is_that_of_the_tensors(served, images):
    image = images[0][0]
    pixels = (image.astype(np.uint16) * 255 // 16).astype(np.float32) / 255
    with served.client() as client:
        scores = client.infer("digits", pixels[np.newaxis, np.newaxis])["probs"][0]
    _, answer = ask(served, picture(image), query="?top=10")
    assert answer["labels"][0]["index"] == scores.argmax()
    for one in answer["labels"]:
        assert one["score"] == pytest.approx(scores[one["index"]], abs=1e-5)
    assert (answer["model_name"], answer["model_version"]) == ("digits", "1")


@pytest.mark.parametrize(
    ("data", "model", "query", "status", "words"),
    [
        (b"no picture", "digits", "", 400, "not a JPEG or PNG"),
        (b"", "plain", "", 400, "takes no pictures: its release declares none"),
        (b"", "other", "", 404, "is not found"),
        (b"", "digits", "?top=0", 400, "from 1 to"),
        (b"", "digits", "?top=x", 400, "from 1 to"),
    ],
)
def test_refusals(served, data, model, query, status, words):
    got, answer = ask(served, data, model, query)
    assert got == status
    assert words in answer["error"]


def test_a_release_whose_pictures_do_not_fit_its_model_is_not_served(tmp_path):
    device = Device(tmp_path)
    device.release("digits", 1, DIGITS / "models/digits-v2-int8-qdq.onnx", picture={**GREY, "width": 9})
    device.select("digits", 1)
    server = device.server()
    server.start()
    try:
        status, answer = ask(server, b"")
        assert status == 503
        assert "but input 'image' has shape [-1, 1, 8, 8]" in answer["error"]
    finally:
        server.stop()
