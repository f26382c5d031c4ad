"""Keeps cores busy with a model, as a server would, without being one: burn.py MODEL THREADS. Says so when it has begun."""

import os
import sys
import threading

os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"

import onnxruntime

from benchmarks import models


def main() -> None:
    threads = int(sys.argv[2])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    array = models.slow_input()

    begun = threading.Barrier(threads + 1)

    def work() -> None:
        session.run(["y"], {"x": array})
        begun.wait()
        while True:
            session.run(["y"], {"x": array})

    for _ in range(threads):
        threading.Thread(target=work).start()
    begun.wait()
    print("at work", flush=True)


if __name__ == "__main__":
    main()
