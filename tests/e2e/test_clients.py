"""The example clients, in every language, as their README starts them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.server import Server

EXAMPLES = Path(__file__).parents[2] / "examples"
CLIENTS = EXAMPLES / "clients"
LANGUAGES = ("py", "sh", "c", "mjs")


def command(program, language, folder):
    source = CLIENTS / f"{program}.{language}"
    if language == "py":
        return [sys.executable, str(source)]
    if language == "sh":
        return ["sh", str(source)]
    if language == "mjs":
        return ["node", str(source)]
    binary = folder / program
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(binary), str(source)], check=True)
    return [str(binary)]


def output(program, language, folder, *words):
    line = [*command(program, language, folder), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(named):
        servers.append(Server(tmp_path, "run", named, "--socket", tmp_path / "s.sock"))
        return servers[-1].start().socket

    yield start
    for server in servers:
        server.stop()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_picture(serve, tmp_path, language):
    socket = serve(f"digits={EXAMPLES / 'digits/models/digits-v2-int8-qdq.onnx'}")
    code, out, err = output("classify", language, tmp_path, socket, CLIENTS / "three.pgm")
    assert (code, err) == (0, "")
    assert out == "three.pgm shows a 3 (100%)\n"


@pytest.mark.shared
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("clip", "words"), [("yes_1000ms.wav", True), ("silence_1000ms.wav", False)])
def test_a_recording(serve, tmp_path, shared_models, language, clip, words):
    socket = serve(f"vad={shared_models / 'onnx/silero_vad_16k_op15.onnx'}")
    code, out, err = output("speech", language, tmp_path, socket, shared_models / "raw" / clip)
    assert (code, err) == (0, "")
    speaking = int(out.removeprefix(f"{clip}: speech in ").split()[0])
    assert out == f"{clip}: speech in {speaking} of 31 windows of 32 ms\n"
    assert (speaking > 3) is words


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_server_that_refuses_is_heard(serve, tmp_path, language):
    """The model has another name: the server says so, and the program ends with an error."""
    socket = serve(f"numbers={EXAMPLES / 'digits/models/digits-v2-int8-qdq.onnx'}")
    code, out, err = output("classify", language, tmp_path, socket, CLIENTS / "three.pgm")
    assert code != 0
    assert "'digits' is not found" in out + err


def test_node_and_a_compiler_are_there():
    assert shutil.which("node")
    assert shutil.which("gcc")
