"""Trials with real processes: whatever a model does to its process, the parent ends up with a reason and stays alive."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agent.contract.manifest import Close, Picture, Serving, Tensor, Top1
from agent.contract.reasons import Reason
from agent.host.clock import SystemClock
from agent.sync.problems import Problem, Stopped
from agent.sync.trial import TrialProcesses
from agent.sync.trial_protocol import Case, Limits, Request
from tests.serving import onnx_models
from tests.sync.conftest import eventually
from tests.sync.fleet import npz

pytestmark = pytest.mark.usefixtures("script_runtime")

EXAMPLES = Path(__file__).parents[2] / "examples" / "digits"
MEMORY = 1 << 30


@pytest.fixture
def trials(tmp_path: Path) -> TrialProcesses:
    return TrialProcesses(SystemClock(), tmp_path / "no-such.sock")


def request(tmp_path: Path, script: str, *, memory: int = MEMORY, cpu_s: int = 60, **changes) -> Request:
    path = tmp_path / "model.script"
    path.write_text(script)
    limits = {name: changes.pop(name) for name in ("max_p95_ms", "max_memory_bytes") if name in changes}
    return Request(
        release="crane:1",
        runtime="script",
        model=str(path),
        limits=Limits(memory_bytes=memory, cpu_s=cpu_s, **limits),
        **changes,
    )


def case(tmp_path: Path, factor: float, **compare) -> Case:
    x = np.array([[1.0, 2.0], [3.0, 0.5]], np.float32)
    npz(tmp_path, "in.npz", x=x)
    npz(tmp_path, "out.npz", y=x * np.float32(factor))
    return Case(
        name="truth",
        inputs=str(tmp_path / "in.npz"),
        expected=str(tmp_path / "out.npz"),
        compare=compare or {"y": Close(atol=1e-6)},
    )


def refused(trials: TrialProcesses, request: Request, timeout_s: float = 20.0) -> Problem:
    with pytest.raises(Problem) as caught:
        trials.run(request, timeout_s, lambda: False)
    return caught.value


def test_a_good_model_passes_with_numbers(trials, tmp_path):
    evidence = trials.run(request(tmp_path, "scale 2", cases=(case(tmp_path, 2.0),)), 20.0, lambda: False)

    assert evidence["runtime"] == "script 1.0"
    assert 0 <= evidence["p95_ms"] < 1000
    assert evidence["memory_bytes"] >= 0


DEATHS = [
    ("load segfault", Reason.TRIAL_CRASHED, "SIGSEGV while loading"),
    ("run segfault", Reason.TRIAL_CRASHED, "SIGSEGV while"),
    ("load abort", Reason.TRIAL_CRASHED, "SIGABRT"),
    ("load kill", Reason.TOO_MUCH_MEMORY, "SIGKILL"),
    ("load exit 3", Reason.TRIAL_CRASHED, "exit status 3"),
    ("load exit 0", Reason.TRIAL_CRASHED, "without a verdict"),
    ("load allocate", Reason.TOO_MUCH_MEMORY, "memory"),
    ("run fail", Reason.GOLDEN_MISMATCH, "the engine says no"),
    ("load nonsense", Reason.LOAD_FAILED, "unknown verb"),
    ("", Reason.LOAD_FAILED, "empty script"),
]


@pytest.mark.parametrize(("script", "reason", "words"), DEATHS, ids=str)
def test_however_it_ends_there_is_a_reason(script, reason, words, trials, tmp_path):
    found = refused(trials, request(tmp_path, script, cases=(case(tmp_path, 1.0),)))

    assert found.reason is reason
    assert words in found.message


@pytest.mark.parametrize("script", ["load sleep 600", "run sleep 600", "load spin"])
def test_one_that_never_ends_is_ended(script, trials, tmp_path):
    found = refused(trials, request(tmp_path, script), timeout_s=1.5)

    assert found.reason is Reason.TRIAL_TIMED_OUT


def test_one_that_burns_the_processor_is_ended_by_the_kernel(trials, tmp_path):
    found = refused(trials, request(tmp_path, "load spin", cpu_s=1), timeout_s=20.0)

    assert found.reason in (
        Reason.TRIAL_TIMED_OUT,
        Reason.TOO_MUCH_MEMORY,
    )  # SIGXCPU, or SIGKILL where soft and hard limit meet


def test_an_engine_that_prints_does_not_disturb(trials, tmp_path):
    assert trials.run(request(tmp_path, "load print"), 20.0, lambda: False)


def may_leave_the_network() -> bool:
    """Root may, and others where the kernel lets them make user namespaces."""
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x40000000 if not __import__('os').geteuid() else 0x50000000) != 0)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(
    not may_leave_the_network(), reason="this kernel lets nobody make a network namespace; under systemd the unit does"
)
def test_it_has_no_network(trials, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = refused(trials, request(tmp_path, f"load connect 127.0.0.1 {port}"))

    assert found.reason is Reason.LOAD_FAILED
    assert "no connection" in found.message


def test_killed_from_outside_in_the_middle(trials, tmp_path):
    mark = tmp_path / "mark"
    found: list[Problem] = []
    thread = threading.Thread(target=lambda: found.append(refused(trials, request(tmp_path, f"load mark {mark} 60"), 60.0)))
    thread.start()
    eventually(mark.exists, "the trial to be under way")
    os.kill(_children_of(os.getpid())[-1], signal.SIGKILL)
    thread.join(10)

    assert not thread.is_alive()
    assert found[0].reason is Reason.TOO_MUCH_MEMORY
    assert "SIGKILL while loading" in found[0].message


def test_a_trial_can_be_given_up(trials, tmp_path):
    mark, stop = tmp_path / "mark", threading.Event()
    before = set(_children_of(os.getpid()))  # of other tests, such as multiprocessing's resource tracker
    raised: list[type[BaseException]] = []

    def run() -> None:
        try:
            trials.run(request(tmp_path, f"load mark {mark} 60"), 60.0, stop.is_set)
        except Stopped as error:
            raised.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    eventually(mark.exists, "the trial to be under way")
    stop.set()
    thread.join(10)

    assert raised == [Stopped]
    assert set(_children_of(os.getpid())) <= before, "the trial's process is gone"


def _children_of(pid: int) -> list[int]:
    found = [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]
    return sorted(found)


def test_the_trial_dies_with_its_parent(tmp_path):
    """`sync` is killed in the middle of a trial: the child must not stay behind with a model in memory."""
    mark = tmp_path / "mark"
    code = (
        "import sys; from pathlib import Path; from tests.sync.test_trial import *; "
        "TrialProcesses(SystemClock(), Path('/nowhere')).run(request(Path(sys.argv[1]), f'load mark {sys.argv[2]} 600'), 600.0, lambda: False)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(mark)], cwd=Path(__file__).parents[2])
    eventually(mark.exists, "the trial to be under way")
    child = _children_of(parent.pid)[0]
    parent.kill()
    parent.wait()

    eventually(lambda: not _alive(child), "the trial to die")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


WRONG_INTERFACES = [
    ({"inputs": (Tensor(name="z", datatype="FP32", shape=(-1, 2)),)}, "input 'z'"),
    ({"inputs": (Tensor(name="x", datatype="INT8", shape=(-1, 2)),)}, "is FP32, the manifest says INT8"),
    ({"outputs": (Tensor(name="y", datatype="FP32", shape=(-1, 3)),)}, "[-1, 2], the manifest says [-1, 3]"),
]


@pytest.mark.parametrize(("declared", "words"), WRONG_INTERFACES, ids=lambda v: str(v)[:40])
def test_a_model_must_have_the_tensors_its_manifest_declares(declared, words, trials, tmp_path):
    found = refused(trials, request(tmp_path, "scale 1", **declared))

    assert found.reason is Reason.WRONG_INTERFACE
    assert words in found.message


def test_a_model_that_answers_wrong_is_refused_with_the_difference(trials, tmp_path):
    found = refused(trials, request(tmp_path, "scale 3", cases=(case(tmp_path, 2.0),)))

    assert found.reason is Reason.GOLDEN_MISMATCH
    assert "golden case 'truth': 4 of 4 elements of 'y' differ by up to 3" in found.message


def test_top1_is_counted_over_rows(trials, tmp_path):
    npz(tmp_path, "in.npz", x=np.array([[1, 2], [3, 0], [5, 1], [0, 1]], np.float32))
    npz(tmp_path, "out.npz", y=np.array([1, 0, 1, 0]))
    truth = Case(
        name="truth",
        inputs=str(tmp_path / "in.npz"),
        expected=str(tmp_path / "out.npz"),
        compare={"y": Top1(min_agreement=0.9)},
    )

    found = refused(trials, request(tmp_path, "scale 1", cases=(truth,)))

    assert found.message == "golden case 'truth': top-1 agreement 0.50, at least 0.90 demanded"
    assert found.evidence["agreement"] == 0.5


def test_limits_of_the_publisher(trials, tmp_path):
    slow = refused(trials, request(tmp_path, "run sleep 0.02", max_p95_ms=5.0))

    assert slow.reason is Reason.TOO_SLOW
    assert "at most 5 ms allowed" in slow.message


@pytest.mark.parametrize("damage", ["pickle", "truncated", "missing array", "no file"])
def test_golden_files_that_cannot_be_used(damage, trials, tmp_path):
    truth = case(tmp_path, 2.0)
    inputs = Path(truth.inputs)
    if damage == "pickle":
        npz(tmp_path, "in.npz", x=np.array([{"a": 1}], dtype=object))
    elif damage == "truncated":
        inputs.write_bytes(inputs.read_bytes()[:-20])
    elif damage == "missing array":
        npz(tmp_path, "in.npz", other=np.zeros(2))
    else:
        inputs.unlink()

    assert refused(trials, request(tmp_path, "scale 2", cases=(truth,))).reason is Reason.GOLDEN_MISMATCH


REAL = [("onnx", "digits-v1-int8-qdq.onnx"), ("tflite", "digits-v1-int8.tflite")]


@pytest.mark.parametrize(("runtime", "name"), REAL)
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_truncated_models_are_refused_by_real_runtimes(runtime, name, keep, trials, tmp_path):
    data = (EXAMPLES / "models" / name).read_bytes()
    path = tmp_path / "model"
    path.write_bytes(data[: int(len(data) * keep)])
    tried = Request(release="digits:1", runtime=runtime, model=str(path), limits=Limits(memory_bytes=2 << 30, cpu_s=60))

    assert refused(trials, tried).reason in (Reason.LOAD_FAILED, Reason.TRIAL_CRASHED, Reason.GOLDEN_MISMATCH)


@pytest.mark.parametrize(("runtime", "name"), REAL)
def test_whole_models_pass_on_real_runtimes(runtime, name, trials, tmp_path):
    path = EXAMPLES / "models" / name
    tried = Request(release="digits:1", runtime=runtime, model=str(path), limits=Limits(memory_bytes=2 << 30, cpu_s=60))

    assert trials.run(tried, 30.0, lambda: False)["p95_ms"] < 1000


def onnx(path: Path, **declared) -> Request:
    return Request(
        release="crane:1", runtime="onnx", model=str(path), limits=Limits(memory_bytes=2 << 30, cpu_s=60), **declared
    )


DECLARED = [
    ({"state": {"before": "sum"}}, None),
    ({"state": {"after": "sum"}}, "the model has no input 'after'"),
    ({"state": {"before": "total"}}, "the model has no output 'total'"),
    ({"serving": Serving(max_batch_size=4)}, None),
    ({"picture": Picture(width=8, height=8)}, "pictures name input '', the model has 'x', 'before'"),
]


@pytest.mark.parametrize(("declared", "words"), DECLARED, ids=str)
def test_a_model_must_fit_what_its_variant_declares(declared, words, trials, tmp_path):
    tried = onnx(onnx_models.total(tmp_path / "total.onnx"), **declared)
    if words is None:
        assert trials.run(tried, 30.0, lambda: False)
        return
    found = refused(trials, tried)

    assert found.reason is Reason.WRONG_INTERFACE
    assert words in found.message


def test_a_model_of_one_size_cannot_be_batched(trials, tmp_path):
    found = refused(trials, onnx(onnx_models.identity(tmp_path / "one.onnx", 1, [1, 4]), serving=Serving(max_batch_size=4)))

    assert found.reason is Reason.WRONG_INTERFACE
    assert "max_batch_size 4 needs a first dimension of any size" in found.message


@pytest.mark.parametrize("listed", [("x",), ("x", "before")], ids=str)
def test_golden_cases_of_a_model_with_state_are_independent(listed, trials, tmp_path):
    """Callers do not see what carries the state, so cases leave it out; each begins at zero, whatever the one before left."""
    x = np.array([[3.0]], np.float32)
    npz(tmp_path, "in.npz", x=x)
    npz(tmp_path, "out.npz", sum=x)
    cases = tuple(
        Case(
            name=name,
            inputs=str(tmp_path / "in.npz"),
            expected=str(tmp_path / "out.npz"),
            compare={"sum": Close(atol=1e-6)},
        )
        for name in ("first", "second")
    )
    inputs = tuple(Tensor(name=name, datatype="FP32", shape=(-1, 1)) for name in listed)
    tried = onnx(onnx_models.total(tmp_path / "total.onnx"), state={"before": "sum"}, cases=cases, inputs=inputs)

    assert trials.run(tried, 30.0, lambda: False)


def test_over_a_socket_as_systemd_starts_it(tmp_path):
    """Accept=yes with StandardInput=socket: the accepted connection is the process's stdin and stdout."""
    path = tmp_path / "trial.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def one_connection() -> None:
        channel, _ = listener.accept()
        with channel:
            subprocess.run(
                [sys.executable, "-m", "agent.sync.trial_child"],
                stdin=channel,
                stdout=channel,
                stderr=subprocess.DEVNULL,
                check=False,
            )

    trials = TrialProcesses(SystemClock(), path)
    for script, reason in (("scale 2", None), ("load segfault", Reason.TRIAL_CRASHED)):
        thread = threading.Thread(target=one_connection)
        thread.start()
        if reason is None:
            assert trials.run(request(tmp_path, script, cases=(case(tmp_path, 2.0),)), 20.0, lambda: False)
        else:
            assert refused(trials, request(tmp_path, script)).reason is reason
        thread.join(10)
    listener.close()


def test_garbage_instead_of_a_verdict(tmp_path):
    path = tmp_path / "trial.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def babble() -> None:
            channel, _ = listener.accept()
            with channel:
                channel.sendall(b"Segmentation fault (core dumped)\n")

        thread = threading.Thread(target=babble)
        thread.start()
        found = refused(TrialProcesses(SystemClock(), path), request(tmp_path, "scale 1"))
        thread.join(10)

    assert found.reason is Reason.TRIAL_CRASHED
    assert "spoke nonsense" in found.message


def test_what_the_trial_must_not_load():
    """It is handed unknown models: there should be no client for anything in its reach, and little memory spent before them."""
    code = "import sys, agent.sync.trial_child, runtimes.registry; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"tuf", "paho", "requests", "urllib3", "cryptography", "securesystemslib", "click"} & {
        m.split(".")[0] for m in loaded
    }


def test_two_trials_take_turns(trials, tmp_path):
    mark = tmp_path / "mark"
    started = time.monotonic()
    threads = [
        threading.Thread(target=lambda: trials.run(request(tmp_path, f"load mark {mark} 0.3"), 30.0, lambda: False))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert mark.read_text() == "xx"
    assert time.monotonic() - started > 0.6
