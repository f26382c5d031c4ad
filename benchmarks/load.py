"""What load.c does, for machines without a C compiler. Its own cost is in the numbers, so compare them only with each other."""

import fcntl
import json
import os
import socket
import sys
import threading
import time

WARM_UP_S = 0.2


def receive(sock: socket.socket, size: int) -> None:
    room = memoryview(bytearray(size))
    have = 0
    while have < size:
        got = sock.recv_into(room[have:])
        if not got:
            raise ConnectionError
        have += got


def echo(path: str, request_bytes: int, reply_bytes: int) -> None:
    reply = bytes(reply_bytes)

    def one(sock: socket.socket) -> None:
        try:
            while True:
                receive(sock, request_bytes)
                sock.sendall(reply)
        except OSError:
            sock.close()

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    while True:
        threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()


def receive_http(sock: socket.socket) -> bool:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    receive(sock, int(fields[b"content-length"]) - len(body))
    return data.startswith(b"HTTP/1.1 200 ")


def answered(sock: socket.socket, kind: str) -> bool:
    if kind == "http":
        return receive_http(sock)
    receive(sock, int(kind))
    return True


def share(sock: socket.socket, memory: bytes) -> None:
    """Shares the bytes as the region `bench`."""
    body = b'{"byte_size": %d}' % len(memory)
    head = b"POST /v2/edge/memory/bench/register HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n" % len(body)
    shared = os.memfd_create("bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(shared, memory)
        fcntl.fcntl(shared, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        socket.send_fds(sock, [head + body], [shared])
    finally:
        os.close(shared)
    if not receive_http(sock):
        raise ConnectionError


def drive(path: str, request: bytes, kind: str, clients: int, seconds: float, memory: bytes) -> dict[str, float]:
    start = time.perf_counter() + WARM_UP_S
    end = start + seconds
    latencies: list[float] = []
    failures: list[int] = []

    def one() -> None:
        own = []
        sock = None
        while (began := time.perf_counter()) < end:
            try:
                if sock is None:
                    sock = socket.socket(socket.AF_UNIX)
                    sock.connect(path)
                    if memory:
                        share(sock, memory)
                sock.sendall(request)
                ok = answered(sock, kind)
            except OSError:
                ok, sock = False, None
            if not ok:
                failures.append(1)
            elif began >= start:
                own.append((time.perf_counter() - began) * 1e6)
        latencies.extend(own)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latencies.sort()
    count = len(latencies)
    return {
        "answers": count, "failures": len(failures), "seconds": seconds, "p50_us": latencies[count // 2] if count else 0,
        "p99_us": latencies[int(count * 0.99)] if count else 0, "max_us": latencies[-1] if count else 0,
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        with open(sys.argv[3], "rb") as file:  # noqa: PTH123
            content = file.read()
        memory = b""
        if len(sys.argv) > 7:
            with open(sys.argv[7], "rb") as file:  # noqa: PTH123
                memory = file.read()
        print(json.dumps(drive(sys.argv[2], content, sys.argv[4], int(sys.argv[5]), float(sys.argv[6]), memory)))
