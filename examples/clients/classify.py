"""Which digit does a picture show?  classify.py SOCKET PICTURE.pgm"""

import sys
from pathlib import Path

import numpy as np

from agent.client import Client


def read_pgm(path: Path) -> np.ndarray:
    """The grey values of a binary PGM, from 0 to 1."""
    kind, width, height, white, pixels = path.read_bytes().split(maxsplit=4)
    if kind != b"P5" or int(white) > 255:
        raise SystemExit(f"{path} is not a binary PGM of one byte per pixel")
    return np.frombuffer(pixels, np.uint8, int(width) * int(height)).reshape(int(height), int(width)) / np.float32(white)


def main() -> None:
    socket, picture = map(Path, sys.argv[1:])
    image = read_pgm(picture).astype(np.float32)
    with Client(socket) as client:
        probabilities = client.infer("digits", image[np.newaxis, np.newaxis])["probs"][0]
    print(f"{picture.name} shows a {probabilities.argmax()} ({probabilities.max():.0%})")


if __name__ == "__main__":
    main()
