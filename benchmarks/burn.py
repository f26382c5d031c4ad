"""Keeps cores busy with a model, as a server would, without being one: burn.py MODEL THREADS."""

import os
import sys
import threading

os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"

import onnxruntime

from benchmarks import models


def main() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    array = models.slow_input()

    def work() -> None:
        while True:
            session.run(["y"], {"x": array})

    for _ in range(int(sys.argv[2])):
        threading.Thread(target=work).start()


if __name__ == "__main__":
    main()
