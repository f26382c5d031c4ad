"""An enrolled device that sends as much as the broker takes: `python -m tests.fleet.flooder PORT CA CERTIFICATE KEY TOPIC QOS SIZE SECONDS`.

It fills its TLS records and waits for nothing, and comes back when it is thrown off. Prints how many messages it sent.
"""

import contextlib
import select
import socket
import ssl
import struct
import sys
import time

CONNECT = b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x00"


def publish(topic, payload, *, qos=0, retain=False):
    """The bytes of a PUBLISH of MQTT 5."""
    body = struct.pack(">H", len(topic)) + topic + (b"\x00\x07" if qos else b"") + b"\x00" + payload
    return bytes([0x30 | qos << 1 | retain]) + length(len(body)) + body


def length(count):
    digits = bytearray()
    while True:
        count, digit = divmod(count, 128)
        digits.append(digit | (128 if count else 0))
        if not count:
            return bytes(digits)


def hello(port, ca, certificate, key, connect=CONNECT):
    """A connection that the broker has accepted."""
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(certificate, key)
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        tls = stack.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
        tls.sendall(connect)
        answer = tls.recv(1000)
        if answer[:1] != b"\x20" or answer[3] != 0:
            raise ConnectionError(f"refused: {answer!r}")
        stack.pop_all()
    return tls


def main(port, ca, certificate, key, topic, qos, size, seconds):
    packet = publish(topic.encode(), b"x" * int(size), qos=int(qos))
    at_once = max(1, 64_000 // len(packet))
    until, sent = time.monotonic() + float(seconds), 0
    while time.monotonic() < until:
        try:
            with hello(int(port), ca, certificate, key) as tls:
                tls.setblocking(False)
                while time.monotonic() < until:
                    readable, writable, _ = select.select([tls], [tls], [], 0.5)
                    if readable:
                        try:
                            if not tls.recv(1 << 16):
                                break
                        except ssl.SSLWantReadError:
                            pass
                    if writable:
                        tls.settimeout(5)
                        tls.sendall(packet * at_once)
                        sent += at_once
                        tls.setblocking(False)
        except OSError:
            time.sleep(0.05)
    print(sent)


if __name__ == "__main__":
    main(*sys.argv[1:])
