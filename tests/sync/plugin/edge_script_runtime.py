"""A runtime whose models are one line of text that says how to behave, for trials that must go wrong in a certain way.

scale 2            y = 2 x
load VERB ARGS     does VERB while loading
run VERB ARGS      does VERB at each run
"""

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

from runtimes.contract import CONTRACT_VERSION, ModelInvalid, Placement, RunFailed, TensorSpec


def behave(verb, *args):
    if verb == "sleep":
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
    elif verb == "mark":
        with Path(args[0]).open("a") as file:
            file.write("x")
        time.sleep(float(args[1]))
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
        pass


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
                raise ModelInvalid(f"no connection: {error}") from error
        return ScriptModel(words)
