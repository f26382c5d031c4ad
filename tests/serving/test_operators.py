"""The ONNX project's own operator tests, through the socket: what the engine gives in this process, the socket gives bit for bit.

The models and their inputs come from the wheel of onnx 1.16.2 (newer ones have none); `make test` fetches it into .cache.
What cannot be asked over the socket is listed with its reason in operators_outside.txt.
"""

import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.serving.server import Server

NODES = Path(__file__).resolve().parents[2] / ".cache/onnx-node-tests/node"
CASES = sorted(path.name for path in NODES.iterdir() if (path / "model.onnx").is_file()) if NODES.is_dir() else []
OUTSIDE = Path(__file__).with_name("operators_outside.txt")
ALIGNMENT = 64
CARRIED = {
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float", "double", "string",
}  # fmt: skip


class Outside(Exception):
    """The case cannot be compared; the message is the reason."""


def session(case):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(NODES / case / "model.onnx", options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Outside("the engine does not load it") from error


def check_types(opened):
    for node in (*opened.get_inputs(), *opened.get_outputs()):
        kind = node.type.removeprefix("tensor(").removesuffix(")")
        if kind not in CARRIED:
            raise Outside(f"the protocol has no {node.type}")


def name_of(case):
    """Some cases have longer names than a model may have."""
    return f"case-{CASES.index(case)}"


def read(path):
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(tensor)


def inputs(opened, folder):
    return {node.name: aligned(read(folder / f"input_{number}.pb")) for number, node in enumerate(opened.get_inputs())}


def aligned(array):
    """The same array where vector instructions find it: the order in which an engine adds depends on where the data begins."""
    if array.dtype.kind in "OSU":
        return array
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    placed = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed


def run(opened, feeds):
    """As whoever has the engine in their own process: arrays in, arrays out."""
    try:
        return opened.run(None, feeds)
    except Exception as error:
        raise Outside(f"the engine's Python interface fails on it: {' '.join(str(error).split())[:60]}") from error


def as_carried(array):
    """What a client gets for it: text as UTF-8."""
    if array.dtype.kind not in "OSU":
        return array
    return np.array([str(element).encode() for element in array.flat], np.object_).reshape(array.shape)


def same_bits(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return list(one.flat) == list(other.flat) if one.dtype.kind == "O" else one.tobytes() == other.tobytes()


def in_process(case):
    """[(feeds, outputs)] of each data set, by the engine alone.  Raises: Outside."""
    opened = session(case)
    check_types(opened)
    found = []
    for folder in sorted((NODES / case).glob("test_data_set_*")):
        feeds = inputs(opened, folder)
        outputs, again = ([as_carried(array) for array in run(opened, feeds)] for _ in range(2))
        if not all(map(same_bits, outputs, again)):
            raise Outside("its answer is random")
        found.append((feeds, outputs))
    return [node.name for node in opened.get_outputs()], found


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """One server with every case as a model, those too that cannot be loaded."""
    folder = tmp_path_factory.mktemp("operators")
    models = folder / "models"
    models.mkdir()
    for case in CASES:
        (models / f"{name_of(case)}.onnx").symlink_to(NODES / case / "model.onnx")
    # In the server's process: what a request could do to it is not what is tried here, and a hundred processes take their time.
    server = Server(folder, "run", models, "--in-process", "*", "--socket", folder / "s.sock").start(deadline_s=100)
    with server.client() as client:
        yield client
    server.stop()


@pytest.mark.skipif(not CASES, reason="the operator tests are not fetched: run make test")
def test_the_operator_tests_are_all_there():
    assert len(CASES) == 1282


@pytest.mark.parametrize("case", CASES)
def test_the_socket_gives_what_the_engine_gives(client, case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx says that some types have no NumPy counterpart
        try:
            names, sets = in_process(case)
        except Outside as outside:
            reason = str(outside)
        else:
            reason = ""
    if reason:
        assert f"{case}: {reason}" in listed() or not is_listed_engine(), f"{case} is outside, and not listed: {reason}"
        return
    for feeds, expected in sets:
        got = client.infer(name_of(case), feeds)
        for name, array in zip(names, expected, strict=True):
            assert same_bits(got[name], array), f"{name}: {got[name]!r} over the socket, {array!r} in the process"


def listed():
    return OUTSIDE.read_text().splitlines()[1:]


def is_listed_engine():
    """The list was made with one version of the engine; another one loads more or less."""
    return OUTSIDE.read_text().splitlines()[0] == f"# onnxruntime {onnxruntime.__version__}"


def write_list():
    """`python -m tests.serving.test_operators` writes the list anew."""
    lines = [f"# onnxruntime {onnxruntime.__version__}"]
    for case in CASES:
        try:
            in_process(case)
        except Outside as reason:
            lines.append(f"{case}: {reason}")
    OUTSIDE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"
    warnings.simplefilter("ignore")
    write_list()
