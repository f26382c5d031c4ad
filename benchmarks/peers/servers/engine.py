"""What every Python server here shares: the sessions, opened as ours opens them. The folder of the models is in PEER_MODELS."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"

import onnxruntime

SHAPES = {"tiny": (1, 64), "image": (1, 3, 224, 224)}


def open_session(name):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = os.path.join(os.environ["PEER_MODELS"], f"{name}.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_all():
    return {name: open_session(name) for name in SHAPES}
