"""What a file is that is given as a model and is none: the first bytes tell, and what to do about it follows."""

from __future__ import annotations

import zipfile
from pathlib import Path

HEAD_BYTES = 512

HEADS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"\x1f\x8b", "an archive (gzip): unpack it and give the model in it"),
    (b"BZh", "an archive (bzip2): unpack it and give the model in it"),
    (b"\xfd7zXZ\x00", "an archive (xz): unpack it and give the model in it"),
    (b"\x28\xb5\x2f\xfd", "an archive (zstd): unpack it and give the model in it"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z): unpack it and give the model in it"),
    (b"\x89HDF\r\n\x1a\n", "a Keras model (HDF5): convert it, with tf2onnx or tf.lite.TFLiteConverter"),
    (b"x\x9c", "compressed (zlib), as joblib writes pickles, which are never opened: convert the model, with skl2onnx"),
    (b"ftrt", "an engine that TensorRT has built: its variant's runtime has to be tensorrt"),
    (b"vtrt", "an engine that TensorRT-RTX has built: its variant's runtime has to be tensorrt"),
    (b"GGUF", "a GGUF file of llama.cpp, which no engine here runs"),
    (b"\x7fELF", "a program or library, not a model"),
    (b"%PDF", "a PDF document, not a model"),
    (b"\x89PNG", "a picture (PNG), not a model"),
    (b"\xff\xd8\xff", "a picture (JPEG), not a model"),
    (b"\x93NUMPY", "a NumPy array, not a model"),
)  # fmt: skip
ONNX_IN_IT = "with torch.onnx.export, or for scikit-learn with skl2onnx"
PICKLE = f"a Python pickle (PyTorch, scikit-learn, joblib), which is never opened: convert it, {ONNX_IN_IT}"
TORCH = "a PyTorch file: convert it with torch.onnx.export"
SAVED_MODEL = "a TensorFlow SavedModel or frozen graph: convert it, with tf2onnx or tf.lite.TFLiteConverter"


def what_folder(path: Path) -> str | None:
    """What a folder is that is given as a model, in words, with what to do; None when it may be one."""
    if (path / "saved_model.pb").is_file():
        return SAVED_MODEL
    if (path / "Manifest.json").is_file() and path.suffix == ".mlpackage":
        return "a Core ML package, which only Apple's engine runs: export the model to ONNX"
    return None


def what_it_is(path: Path) -> str | None:
    """In words, with what to do; None when it may be a model, or cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None
    if head[4:8] in (b"TFL3", b"ORTM"):
        return None  # a model: what is before that is a number, which may look like anything
    for start, words in HEADS:
        if head.startswith(start):
            return words
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    if head[257:262] == b"ustar":
        return "an archive (tar): unpack it and give the model in it"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 100_000_000:
        return "a safetensors file, which has weights and no graph: export the model to ONNX"
    return _text(head) or _other_engine(path, head)


def is_tflite(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == b"TFL3"
    except OSError:
        return False


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return "an archive (zip, damaged or cut off)"
    if any(name.endswith(("/data.pkl", "/constants.pkl")) or name == "data.pkl" for name in names):
        return TORCH
    if {"config.json", "metadata.json"} <= set(names):
        return "a Keras model (.keras): convert it, with tf2onnx or tf.lite.TFLiteConverter"
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz), not a model"
    models = [name for name in names if name.endswith((".onnx", ".tflite"))]
    return f"an archive (zip): unpack it and give the model in it{f', {models[0]}' if models else ''}"


def _text(head: bytes) -> str | None:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return "a web page (HTML): the download went to a page instead of the file, as where one has to sign in first"
    if start.startswith(b"<"):
        return "XML: the download went to a message instead of the file, or it is a model of OpenVINO, which has to be in ONNX"
    if start.startswith(b"{"):
        return "JSON, not a model: perhaps a download's error message or a configuration"
    return None


def _other_engine(path: Path, head: bytes) -> str | None:
    if path.name in ("saved_model.pb", "frozen_inference_graph.pb") or (path.parent / "variables").is_dir():
        return SAVED_MODEL
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and b"\n\x06graph" in head[:64]:
        return SAVED_MODEL
    return None
