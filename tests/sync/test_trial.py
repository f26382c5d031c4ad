"""Trials with real processes: whatever a model does to its process, the parent ends up with a reason and stays alive."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from onnx import TensorProto

from agent.contract.acceptance import Close, Top1
from agent.contract.manifest import Picture, Serving, Tensor
from agent.contract.reasons import Reason
from agent.host.clock import SystemClock
from agent.sync.problems import Problem, Stopped
from agent.sync.trials import containment
from agent.sync.trials.protocol import Case, Limits, Request
from agent.sync.trials.queue import TrialQueue
from agent.sync.trials.trial import TrialProcesses
from tests.serving import onnx_models, tflite_models
from tests.sync.conftest import eventually
from tests.sync.fleet import npz

# Trials give way to all else on the machine, and here have a second or two; some measure time, and one makes every processor busy.
pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("script_runtime")]

EXAMPLES = Path(__file__).parents[2] / "examples" / "digits"
MEMORY = 1 << 30


@pytest.fixture
def trials(tmp_path: Path) -> TrialProcesses:
    return TrialProcesses(SystemClock(), tmp_path / "no-such.sock", scratch=tmp_path / "scratch", scratch_bytes=32 << 20)


def under_way(folder: Path, count: int = 1) -> list[int]:
    """The trials that have left a mark in their scratch folders."""
    found = []
    for mark in folder.glob("scratch/*/mark"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(mark.read_text()))
    return found if len(found) >= count else []


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


def test_its_own_clock_ends_one_whose_parent_cannot(trials, tmp_path):
    limits = Limits(memory_bytes=MEMORY, cpu_s=60, wall_s=0.5 - containment.GRACE_S)
    found = refused(trials, msgspec.structs.replace(request(tmp_path, "load spin"), limits=limits))

    assert found.reason is Reason.TRIAL_TIMED_OUT
    assert "by its own clock" in found.message


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

    assert found.reason is Reason.TRIAL_NETWORK
    assert "it wanted to look up '127.0.0.1'" in found.message


def test_one_that_would_do_without_an_answer_is_refused_too(trials, tmp_path):
    """It asks again where there is a network."""
    found = refused(trials, request(tmp_path, "run call 192.0.2.1 443"))

    assert found.reason is Reason.TRIAL_NETWORK


def test_processes_that_stay_are_ended_and_named(trials, tmp_path):
    found = refused(trials, request(tmp_path, "load fork 2 600"))

    assert found.reason is Reason.TRIAL_FORKED
    assert "it left processes behind" in found.message
    assert nothing_of(tmp_path)


def test_one_that_hides_in_a_session_of_its_own_too(trials, tmp_path):
    found = refused(trials, request(tmp_path, "load daemon 600"))

    assert found.reason is Reason.TRIAL_FORKED
    assert nothing_of(tmp_path)


def test_helpers_that_end_are_nobodys_business(trials, tmp_path):
    assert trials.run(request(tmp_path, "load fork 2 0"), 20.0, lambda: False)


@pytest.mark.parametrize("end", ["segfault", "exit 0", "sleep 600"])
def test_what_it_started_goes_with_it_however_it_ends(end, trials, tmp_path):
    """It was seen it while the trial ran; what left the session only in the last moments before a crash is the unit's to end."""
    found = refused(trials, request(tmp_path, f"run then fork 2 600 then sleep 0.5 then {end}"), timeout_s=3.0)

    assert found.reason is (Reason.TRIAL_TIMED_OUT if end.startswith("sleep") else Reason.TRIAL_CRASHED)
    assert nothing_of(tmp_path)


def test_one_that_starts_ever_more_is_ended(trials, tmp_path):
    found = refused(trials, request(tmp_path, "load then fork 60 600 then sleep 600"))

    assert found.reason is Reason.TRIAL_FORKED
    assert "at most" in found.message or "a trial may have 32" in found.message
    assert nothing_of(tmp_path)


def nothing_of(folder: Path) -> bool:
    """No process has this test's scratch folder in its environment, and no folder is left."""

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(folder / "scratch") in process.environ().get("TMPDIR", ""):
                    found.append(process)
        return found

    eventually(lambda: not left(), "the last process of the trial to end")
    assert list((folder / "scratch").iterdir()) == []
    return True


def landlock() -> bool:
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)) >= 6


needs_landlock = pytest.mark.skipif(
    not landlock(), reason="this kernel has no Landlock, or an early one; under systemd the unit does"
)


@needs_landlock
@pytest.mark.parametrize("name", ["new", "there"])
def test_it_writes_nowhere_else(name, trials, tmp_path):
    path = tmp_path / name
    if name == "there":
        path.write_text("mine")
    found = refused(trials, request(tmp_path, f"load write {path}"))

    assert found.reason is Reason.TRIAL_WROTE
    assert str(path) in found.message
    assert not path.exists() or path.read_text() == "mine"


@needs_landlock
def test_it_signals_nobody_else(trials, tmp_path):
    """Not even the one who started it, who runs as the same user."""
    refused(trials, request(tmp_path, f"load signal {os.getpid()}"))


def test_one_that_fills_its_scratch_is_ended(trials, tmp_path):
    found = refused(trials, request(tmp_path, "load fill"))

    assert found.reason is Reason.TRIAL_SCRATCH
    assert found.evidence["scratch_bytes"] > 32 << 20
    assert nothing_of(tmp_path)


def test_one_file_has_an_end_too(trials, tmp_path):
    found = refused(trials, request(tmp_path, "load swell"))

    assert found.reason is Reason.TRIAL_SCRATCH
    assert "File too large" in found.message


def test_killed_from_outside_in_the_middle(trials, tmp_path):
    found: list[Problem] = []
    thread = threading.Thread(target=lambda: found.append(refused(trials, request(tmp_path, "load mark 60"), 60.0)))
    thread.start()
    eventually(lambda: under_way(tmp_path), "the trial to be under way")
    os.kill(under_way(tmp_path)[0], signal.SIGKILL)
    thread.join(10)

    assert not thread.is_alive()
    assert found[0].reason is Reason.TOO_MUCH_MEMORY
    assert "SIGKILL while loading" in found[0].message


@pytest.mark.parametrize("told_too", [True, False])
def test_ended_in_order_from_outside(told_too, trials, tmp_path):
    """systemd ends a whole service at once: the trial may hear it before `sync` does. Alone, it is what its release did."""
    stop, ends = threading.Event(), []

    def run() -> None:
        try:
            trials.run(request(tmp_path, "load mark 60"), 60.0, stop.is_set)
        except (Stopped, Problem) as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: under_way(tmp_path), "the trial to be under way")
    (pid,) = under_way(tmp_path)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "the trial to be gone")
    if told_too:
        stop.set()
    thread.join(10)

    (end,) = ends
    if told_too:
        assert isinstance(end, Stopped)
    else:
        assert isinstance(end, Problem)
        assert end.reason is Reason.TRIAL_CRASHED


def test_a_trial_can_be_given_up(trials, tmp_path):
    stop = threading.Event()
    before = set(_children_of(os.getpid()))  # of other tests, such as multiprocessing's resource tracker
    raised: list[type[BaseException]] = []

    def run() -> None:
        try:
            trials.run(request(tmp_path, "load mark 60"), 60.0, stop.is_set)
        except Stopped as error:
            raised.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: under_way(tmp_path), "the trial to be under way")
    stop.set()
    thread.join(10)

    assert raised == [Stopped]
    assert set(_children_of(os.getpid())) <= before, "the trial's process is gone"


def _children_of(pid: int) -> list[int]:
    found = [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]
    return sorted(found)


def test_the_trial_dies_with_its_parent(tmp_path):
    """`sync` is killed in the middle of a trial: the child must not stay behind with a model in memory."""
    code = (
        "import sys; from pathlib import Path; from tests.sync.test_trial import *; "
        "folder = Path(sys.argv[1]); trials = TrialProcesses(SystemClock(), Path('/nowhere'), scratch=folder / 'scratch'); "
        "trials.run(request(folder, 'load mark 600'), 600.0, lambda: False)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    eventually(lambda: under_way(tmp_path), "the trial to be under way")
    child = under_way(tmp_path)[0]
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


def test_the_time_of_others_is_not_counted(trials, tmp_path):
    """A trial gives way to everything else on the machine, and its p95 is judged all the same."""
    # each in a session of its own: where the kernel shares time between sessions, theirs together would have as much as the trial's
    hog = [sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(hog, start_new_session=True) for _ in range(4 * (os.cpu_count() or 1))]
    try:
        evidence = trials.run(request(tmp_path, "run burn 0.01"), 60.0, lambda: False)
    finally:
        for one in hogs:
            one.kill()
            one.wait()

    assert evidence["gave_way_ms"] > 20.0
    assert 10.0 <= evidence["p50_ms"] < 60.0, "with the time of others it is a multiple of this"


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


def test_a_model_of_several_files_is_tried_with_those_that_are_listed(trials, tmp_path):
    path = onnx_models.scattered(tmp_path / "model.onnx", (1, 2, 4))
    data = {location: str(tmp_path / location) for location in onnx_models.SCATTERED}

    assert trials.run(onnx(path, data=data), 30.0, lambda: False)["p95_ms"] < 1000
    problem = refused(trials, onnx(path, data={"weights.bin": data["weights.bin"]}))
    assert problem.reason is Reason.LOAD_FAILED
    assert "which its variant does not list as data" in str(problem)


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


def signed(tmp_path: Path, signature: str, given: dict, expected: dict, **declared) -> Request:
    npz(tmp_path, "in.npz", **given)
    npz(tmp_path, "out.npz", **expected)
    truth = Case(
        name="truth",
        inputs=str(tmp_path / "in.npz"),
        expected=str(tmp_path / "out.npz"),
        compare=dict.fromkeys(expected, Close(atol=1e-6)),
        signature=signature,
    )
    path = tflite_models.coder(tmp_path / "coder.tflite")
    limits = Limits(memory_bytes=2 << 30, cpu_s=60)
    return Request(release="coder:1", runtime="tflite", model=str(path), limits=limits, cases=(truth,), **declared)


ONES = np.ones((1, 2), np.float32)
A, B = np.float32([5, 5, 5]), np.float32([1, 2, 3])
SIGNED = [
    ("", {"encode_x:0": ONES}, {"Call:0": ONES * 2}, None),
    ("", {"x": ONES}, {"y": ONES * 2}, None),
    ("encode", {"x": ONES}, {"y": ONES * 2}, None),
    ("decode", {"a": A, "b": B}, {"difference": A - B}, None),
    ("decode", {"a": A, "b": B}, {"difference": A + B}, "3 of 3 elements of 'difference' differ by up to 6"),
    ("decode", {"a": A}, {"difference": A - B}, "'decode/b' is not among the inputs"),
    ("train", {"x": ONES}, {"y": ONES}, "is for signature 'train', which the model has not (it has: 'encode', 'decode')"),
]


@pytest.mark.parametrize(("signature", "given", "expected", "words"), SIGNED, ids=lambda v: str(v)[:30])
def test_golden_cases_may_be_for_any_signature(signature, given, expected, words, trials, tmp_path):
    declared = {
        "inputs": (Tensor(name="x", datatype="FP32", shape=(-1, 2)),),
        "outputs": (Tensor(name="Call:0", datatype="FP32", shape=(-1, 2)),),
    }
    tried = signed(tmp_path, signature, given, expected, **declared)
    if words is None:
        assert trials.run(tried, 30.0, lambda: False)["p95_ms"] < 1000
    else:
        found = refused(trials, tried)
        assert (found.reason, words in found.message) == (Reason.GOLDEN_MISMATCH, True), found.message


NUMBER, WORD, WORDS = np.array(3, np.float32), np.array(b"one"), np.array([["one", "zw\u00f6lf"]])
PLAIN = [
    (TensorProto.FLOAT, NUMBER, NUMBER, None),
    (TensorProto.STRING, WORD, WORD, None),
    (TensorProto.STRING, WORDS, WORDS, None),
    (TensorProto.STRING, WORDS, WORDS[:, ::-1], "the texts of 'y' are not the expected ones"),
    (TensorProto.STRING, WORD, NUMBER, "the texts of 'y' are not the expected ones"),
    (TensorProto.FLOAT, NUMBER, WORD, "the texts of 'y' are not the expected ones"),
]


@pytest.mark.parametrize(("kind", "given", "expected", "words"), PLAIN, ids=str)
def test_golden_cases_may_be_texts_and_have_no_dimensions(kind, given, expected, words, trials, tmp_path):
    path = onnx_models.identity(tmp_path / "m.onnx", kind, given.shape)
    tried = msgspec.structs.replace(signed(tmp_path, "", {"x": given}, {"y": expected}), runtime="onnx", model=str(path))
    if words is None:
        assert trials.run(tried, 30.0, lambda: False)
    else:
        found = refused(trials, tried)
        assert (found.reason, words in found.message) == (Reason.GOLDEN_MISMATCH, True), found.message


@pytest.mark.parametrize("listed", [("x",), ("x", "k")], ids=str)
def test_a_manifest_need_not_list_optional_inputs(listed, trials, tmp_path):
    shapes = {"x": (-1,), "k": (1,)}
    inputs = tuple(Tensor(name=name, datatype="FP32", shape=shapes[name]) for name in listed)
    tried = onnx(onnx_models.scale_by_default(tmp_path / "m.onnx", 2.0), inputs=inputs)

    assert trials.run(tried, 30.0, lambda: False)


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
                [sys.executable, "-m", "agent.sync.trials.child"],
                stdin=channel,
                stdout=channel,
                stderr=subprocess.DEVNULL,
                check=False,
            )

    trials = TrialProcesses(SystemClock(), path)
    endings = (
        ("scale 2", None),
        ("load segfault", Reason.TRIAL_CRASHED),
        ("load fork 2 600", Reason.TRIAL_FORKED),
        ("load sleep 600", Reason.TRIAL_TIMED_OUT),  # and it goes, although nobody here can kill it
    )
    for script, reason in endings:
        thread = threading.Thread(target=one_connection)
        thread.start()
        if reason is None:
            assert trials.run(request(tmp_path, script, cases=(case(tmp_path, 2.0),)), 20.0, lambda: False)
        else:
            assert refused(trials, request(tmp_path, script), timeout_s=2.0).reason is reason
        thread.join(10)
        assert not thread.is_alive(), script
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
    code = "import sys, agent.sync.trials.child, runtimes.registry; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"tuf", "paho", "requests", "urllib3", "cryptography", "securesystemslib", "click"} & {
        m.split(".")[0] for m in loaded
    }


def test_a_trial_begins_when_its_turn_has_come_and_not_before(tmp_path):
    queue, marks, order = TrialQueue(cores=1), tmp_path / "scratch", []
    trials = TrialProcesses(SystemClock(), tmp_path / "no-such.sock", queue, scratch=marks)

    def begins() -> None:
        order.append("begins")
        assert not marks.exists(), "nothing of it ran yet"

    thread = threading.Thread(
        target=lambda: trials.run(request(tmp_path, "scale 2"), 30.0, lambda: order.append("asked") is not None, begins)
    )
    with queue.turn(0, 0, 1, lambda: False):
        thread.start()
        eventually(lambda: len(order) > 1, "it to wait")
        assert "begins" not in order
    thread.join(30)

    assert order.count("begins") == 1
    assert marks.exists()


def test_a_trial_whose_beginning_cannot_be_written_down_does_not_run(trials, tmp_path):
    def begins() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        trials.run(request(tmp_path, "load mark 60"), 60.0, lambda: False, begins)

    assert under_way(tmp_path) == []


def test_two_trials_take_turns(trials, tmp_path):
    started = time.monotonic()
    threads = [
        threading.Thread(target=lambda: trials.run(request(tmp_path, "load mark 0.3"), 30.0, lambda: False)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert time.monotonic() - started > 0.6
