"""Where in a recording does somebody speak?  speech.py SOCKET CLIP.wav"""

import sys
import wave
from pathlib import Path

import numpy as np

from agent.client import Client

RATE, WINDOW, CONTEXT = 16_000, 512, 64  # samples: 32 ms a request, with the last 4 ms of the window before


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path)) as clip:
        if (clip.getnchannels(), clip.getsampwidth(), clip.getframerate()) != (1, 2, RATE):
            raise SystemExit(f"{path} is not 16 kHz, mono, 16 bits")
        return np.frombuffer(clip.readframes(clip.getnframes()), "<i2").astype(np.float32) / 32768


def main() -> None:
    socket, path = map(Path, sys.argv[1:])
    samples = np.concatenate([np.zeros(CONTEXT, np.float32), read_wav(path)])
    state, rate = np.zeros((2, 1, 128), np.float32), np.array(RATE)
    speaking, windows = 0, 0
    with Client(socket) as client:
        for start in range(0, len(samples) - CONTEXT - WINDOW + 1, WINDOW):
            window = samples[np.newaxis, start : start + CONTEXT + WINDOW]
            heard = client.infer("vad", {"input": window, "state": state, "sr": rate})
            state = heard["stateN"]
            speaking += int(heard["output"].item() > 0.5)
            windows += 1
    print(f"{path.name}: speech in {speaking} of {windows} windows of 32 ms")


if __name__ == "__main__":
    main()
