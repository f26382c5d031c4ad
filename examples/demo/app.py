"""An app on a device: asks for predictions one after another and says five times a second how it went.

usage: app.py SOCKET MODEL DATA.npz BATCH      (prints one JSON object per line; ends when its standard input closes)
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass

import numpy as np

from agent.client import Client, ClientError

REPORT_EVERY_S = 0.2
PAUSE_S = 0.004  # a fast camera; without it three apps alone fill two cores, and there is nothing left to update with


@dataclass
class Tally:
    """What the app saw since it started. `correct` counts images whose most likely digit is the one a person read."""

    requests: int = 0
    failed: int = 0
    images: int = 0
    correct: int = 0
    slowest_ms: float = 0.0
    last_error: str = ""


def predict_for_ever(socket: str, model: str, images: np.ndarray, labels: np.ndarray, batch: int, tally: Tally) -> None:
    client = Client(socket)
    start = 0
    while True:
        rows = slice(start, start + batch)
        start = (start + batch) % (len(images) - batch)
        before = time.perf_counter()
        try:
            probabilities = client.infer(model, {"image": images[rows]})["probs"]
        except ClientError as error:
            tally.failed += 1
            tally.last_error = str(error)
        else:
            tally.images += batch
            tally.correct += int((probabilities.argmax(axis=1) == labels[rows]).sum())
        tally.requests += 1
        tally.slowest_ms = max(tally.slowest_ms, (time.perf_counter() - before) * 1e3)
        time.sleep(PAUSE_S)


def main() -> None:
    socket, model, data, batch = sys.argv[1:]
    with np.load(data) as archive:
        images = (archive["image_u8"].astype(np.float32) * archive["scale"])[:, None]
        labels = archive["label"]
    tally = Tally()
    threading.Thread(target=predict_for_ever, args=(socket, model, images, labels, int(batch), tally), daemon=True).start()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        print(json.dumps(asdict(tally)), flush=True)
        tally.slowest_ms = 0.0
        time.sleep(REPORT_EVERY_S)


if __name__ == "__main__":
    main()
