"""The command line as a person and a program use it."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest

from agent.cli import predict
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S, Server


def agent(*arguments, check=True, **environment):
    run = subprocess.run(
        [sys.executable, "-m", "agent.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    if check:
        assert run.returncode == 0, run.stderr
        return run.stdout
    return run


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    onnx_models.scale(folder / "scale.onnx", 3.0, width=3)
    onnx_models.pair(folder / "pair.onnx")
    (folder / "broken.onnx").write_bytes(b"broken")
    (folder / "notes.txt").write_text("not a model")
    np.save(folder / "x.npy", np.array([[1, 3, 2]], np.float32))
    np.savez(folder / "ab.npz", a=np.array([5]), b=np.array([3]))
    made = Server(folder, "run", folder, "--socket", folder / "s.sock").start()
    yield made
    made.stop()


def test_what_run_prints_can_be_pasted(server):
    text = server.output()
    assert f"Serving on {server.socket}" in text
    assert "broken  NOT SERVED: broken.onnx is not a model" in text
    assert "in  x  FP32 [-1, 3]" in text
    lines = [line.strip() for line in text.splitlines()]
    curl = next(line for line in lines if line.startswith("curl"))
    answer = subprocess.run(["bash", "-c", curl + " -sS"], capture_output=True, check=True, timeout=DEADLINE_S)
    assert json.loads(answer.stdout)["model_name"] == "pair"
    predict = next(line for line in lines if line.startswith("edge-agent predict"))
    assert predict == f"edge-agent predict pair --input a=x0.npy --input b=x1.npy --socket {server.socket}"


def test_predict(server):
    folder = server.folder
    where = ("--socket", server.socket)
    assert agent("predict", "scale", "--input", folder / "x.npy", *where).splitlines()[0] == "y  float32 [1, 3]"
    assert json.loads(agent("predict", "scale", "--input", folder / "x.npy", "--json", *where)) == {"y": [[3, 9, 6]]}
    top = json.loads(agent("predict", "scale", "--input", f"x={folder / 'x.npy'}", "--top", 2, "--json", *where))
    assert top == {"y": [[{"index": 1, "value": 9}, {"index": 2, "value": 6}]]}
    out = folder / "out.npz"
    agent("predict", "pair", "--input", folder / "ab.npz", "--output", out, EDGE_AGENT_SOCKET=str(server.socket))
    with np.load(out) as found:
        assert {name: found[name].tolist() for name in found.files} == {"total": [8], "difference": [2]}


def test_names_and_files_with_an_equals_sign(server, tmp_path, monkeypatch):
    """The name ends at the last "=" behind which a file is named; what is a file as it stands has no name."""
    monkeypatch.chdir(tmp_path)
    x, model = (server.folder / "x.npy").read_bytes(), tmp_path / "odd.onnx"
    onnx_models.identity(model, onnx.TensorProto.FLOAT, ("n", 3), name="a=b")
    for name in ("plain.npy", "c=d.npy", "a=b=e.npy"):
        (tmp_path / name).write_bytes(x)
    assert [predict.named_file(text) for text in ("a=b=plain.npy", "a=b=c=d.npy", "c=d.npy", "a=b=e.npy", "a=b=none", "b=-", "-")] == [
        ("a=b", "plain.npy"), ("a=b", "c=d.npy"), ("", "c=d.npy"), ("", "a=b=e.npy"), ("a=b", "none"), ("b", "-"), ("", "-"),
    ]  # fmt: skip
    odd = Server(tmp_path, "run", model, "--socket", tmp_path / "s.sock").start()
    try:
        for text in ("a=b=plain.npy", "a=b=c=d.npy", "a=b=e.npy"):
            assert json.loads(agent("predict", "odd", "--input", text, "--json", "--socket", odd.socket)) == {"y": [[1, 3, 2]]}
    finally:
        odd.stop()


def test_an_input_from_standard_input_and_a_model_without_any(server, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "agent.cli", "predict", "scale", "--input", "x=-", "--json", "--socket", str(server.socket)],
        input=(server.folder / "x.npy").read_bytes(), capture_output=True, timeout=DEADLINE_S, check=True,
    )  # fmt: skip
    assert json.loads(run.stdout) == {"y": [[3, 9, 6]]}
    alone = Server(tmp_path, "run", onnx_models.constant(tmp_path / "seven.onnx", 7.0), "--socket", tmp_path / "s.sock").start()
    try:
        assert json.loads(agent("predict", "seven", "--json", "--socket", alone.socket)) == {"y": [7.0]}
    finally:
        alone.stop()


def test_models_and_status(server):
    where = ("--socket", server.socket)
    states = {m["name"]: m["state"] for m in json.loads(agent("models", "--json", *where))}
    assert states == {"broken": "UNAVAILABLE", "pair": "READY", "scale": "READY"}
    assert json.loads(agent("status", "--json", *where))["pid"] == server.process.pid
    assert "broken:1  broken.onnx is not a model" in agent("models", *where)
    assert f"pid {server.process.pid}" in agent("status", *where)


def test_pickles_are_not_opened(server, tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], object), allow_pickle=True)
    run = agent("predict", "scale", "--input", tmp_path / "evil.npy", "--socket", server.socket, check=False)
    assert run.returncode == 1
    assert "without pickled objects" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("predict", "none", "--input", "{x}"), 1, "edge-agent: Request for unknown model: 'none' is not found"),
        (("predict", "pair", "--input", "{x}"), 1, "has the inputs 'a', 'b': give each by its name"),
        (("predict", "scale", "--input", "nothing.npy"), 2, "'nothing.npy' does not exist"),
        (("predict", "scale"), 1, "expected 1 inputs but got 0 inputs for model 'scale': 'x' is missing"),
        (("predict", "scale", "--input", "x=nothing.npy"), 2, "'nothing.npy' does not exist"),
        (("predict", "scale", "--input", "x="), 2, "no file is named behind 'x='"),
        (("predict", "scale", "--input", "a" * 5000), 2, "cannot be opened: File name too long"),
        (("predict", "scale", "--input", "x=" + "a" * 300), 2, "cannot be opened: File name too long"),
        (("predict", "scale", "--input", "{folder}"), 2, "is a folder: name a .npy or .npz file"),
        (("predict", "scale", "--input", "x=-"), 1, "standard input is not a NumPy file"),
        (("predict", "scale", "--input", "{folder}/notes.txt"), 1, "is not a NumPy file without pickled objects"),
        (("predict", "pair", "--input", "a={x}", "--input", "a={x}"), 2, "input 'a' is given twice"),
        (("predict", "scale", "--input", "z={folder}/ab.npz"), 2, "has the arrays a, b: none is called 'z'"),
        (("models", "--socket", "/nowhere.sock"), 1, "no server answers at /nowhere.sock: No such file or directory"),
        (("run", "/nothing.onnx"), 2, "'/nothing.onnx' does not exist"),
        (("run", "a={folder}/scale.onnx", "a={folder}/pair.onnx"), 2, "are both called 'a': name one, such as other="),
        (("run", "a b={folder}/scale.onnx"), 2, "model name 'a b' is not allowed"),
        (("run", "{folder}/broken.onnx", "--socket", "{folder}/t.sock"), 1, "cannot load model 'broken'"),
        (("serve", "--config", "/nothing.yaml"), 1, "/nothing.yaml does not exist"),
        (("serve", "--config", "{folder}/agent.yaml"), 1, "has store format 99"),
        (("nonsense",), 2, "No such command 'nonsense'"),
    ],
)
def test_failures_are_1_and_misuse_is_2(server, arguments, code, text):
    (server.folder / "agent.yaml").write_text(f"store: {server.folder}\nserve: {{socket: {server.folder}/t.sock}}\n")
    (server.folder / "format.json").write_text('{"format": 99}')
    values = {"folder": server.folder, "x": server.folder / "x.npy"}
    arguments = [argument.format(**values) for argument in arguments]
    run = agent(*arguments, check=False, EDGE_AGENT_SOCKET=str(server.socket))
    assert run.returncode == code
    assert text in run.stderr
    assert "Traceback" not in run.stderr


def test_help_imports_nothing_heavy():
    script = "import sys; sys.argv[1:] = ['--help']\nfrom agent.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "enrol" in loaded
    for name in ("numpy", "rich", "agent.sync.cli", "onnxruntime"):
        assert f" {name} " not in loaded


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    assert "_EDGE_AGENT_COMPLETE" in agent("completion", shell)
