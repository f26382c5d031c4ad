"""A runtime whose models are one line of text that says how to behave, for trials that must go wrong in a certain way.

scale 2            y = 2 x
load VERB ARGS     does VERB while loading
run VERB ARGS      does VERB at each run
close VERB ARGS    does VERB while it is closed
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

from runtimes.contract import CONTRACT_VERSION, ModelInvalid, Placement, RunFailed, TensorSpec


def started(count, seconds):
    for _ in range(count):
        if os.fork() == 0:
            time.sleep(seconds)
            os._exit(0)


def behave(verb, *args):
    if verb == "then":
        while args:
            at = args.index("then") if "then" in args else len(args)
            behave(*args[:at])
            args = args[at + 1 :]
    elif verb == "sleep":
        time.sleep(float(args[0]))
    elif verb == "segfault":
        ctypes.string_at(0)
    elif verb == "abort":
        os.kill(os.getpid(), signal.SIGABRT)
    elif verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "allocate":
        keep = []
        while True:
            keep.append(np.ones(8 << 20, np.uint8))
    elif verb == "exit":
        os._exit(int(args[0]))
    elif verb == "print":
        print("loading model... done")
        sys.stdout.flush()
    elif verb == "connect":
        with socket.create_connection((args[0], int(args[1])), timeout=2):
            pass
    elif verb == "call":
        with contextlib.suppress(OSError):  # a model that phones home and gets over it when nobody answers
            behave("connect", *args)
    elif verb == "mark":
        (Path(os.environ["TMPDIR"]) / "mark").write_text(str(os.getpid()))
        time.sleep(float(args[0]))
    elif verb == "fork":
        started(int(args[0]), float(args[1]))
    elif verb == "daemon":
        if os.fork() == 0:
            os.setsid()
            started(1, float(args[0]))
            os._exit(0)
        os.wait()
    elif verb == "write":
        Path(args[0]).write_text("it was here")
    elif verb == "fill":
        for number in range(1000):
            (Path(os.environ["TMPDIR"]) / f"{number}").write_bytes(bytes(1 << 20))
            time.sleep(0.01)
    elif verb == "swell":
        with (Path(os.environ["TMPDIR"]) / "large").open("wb") as file:
            file.truncate((1 << 30) + 1)
    elif verb == "signal":
        os.kill(int(args[0]), signal.SIGTERM)
    elif verb == "burn":
        end = time.thread_time() + float(args[0])
        while time.thread_time() < end:
            pass
    elif verb == "spin":
        while True:
            pass
    elif verb == "surprise":
        raise KeyError("surprise")
    elif verb == "fail":
        raise RunFailed("the engine says no")
    elif verb != "scale":
        raise ModelInvalid(f"unknown verb {verb!r}")


class ScriptModel:
    inputs = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)
    placement = Placement("cpu", "cpu")

    def __init__(self, words):
        self.words = words

    def run(self, feeds, outputs=None):
        factor = 1.0
        if self.words[0] == "scale":
            factor = float(self.words[1])
        elif self.words[0] == "run":
            behave(*self.words[1:])
        return [feeds["x"] * np.float32(factor)]

    def close(self):
        if self.words[0] == "close":
            behave(*self.words[1:])


class ScriptRuntime:
    contract_version = CONTRACT_VERSION
    name = "script"
    suffixes = (".script",)

    def version(self):
        return "script 1.0"

    def load(self, path, options):
        words = path.read_text().split()
        if not words:
            raise ModelInvalid("empty script")
        if words[0] == "load":
            try:
                behave(*words[1:])
            except OSError as error:
                raise ModelInvalid(f"the system says no: {error}") from error
        return ScriptModel(words)
