"""What the shared port reads of a first message: whatever comes, it gives protocols, asks for more, or gives up; it never raises."""

import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.api.client_hello import MAX_BYTES, offered


def hello(*protocols):
    """The first message of a real client."""
    context = ssl.create_default_context()
    if protocols:
        context.set_alpn_protocols(list(protocols))
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="fleet.example.org")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


REAL = hello("mqtt", "http/1.1")


def in_records(message, size):
    """The same handshake message in records of `size` bytes."""
    body = message[5:]
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(message[:3] + len(part).to_bytes(2, "big") + part for part in parts)


@pytest.mark.parametrize("protocols", [(), ("mqtt",), ("edge-devices", "http/1.1"), ("h2", "http/1.1")])
def test_what_a_client_offers(protocols):
    assert offered(hello(*protocols)) == set(protocols)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_in_several_records(size):
    assert offered(in_records(hello("mqtt"), size)) == {"mqtt"}


def test_byte_by_byte():
    whole = hello("mqtt")
    assert all(offered(whole[:end]) is None for end in range(len(whole)))
    assert offered(whole + b"more") == {"mqtt"}


def test_what_is_no_tls_is_not_waited_for():
    assert offered(b"GET / HTTP/1.1\r\n") == frozenset()
    assert offered(b"\x16\x03\x01\x00\x01\x02") == frozenset()  # a ServerHello
    assert offered(b"\x16\x03\x01\xff\xff" + bytes(MAX_BYTES)) == frozenset()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_to_a_real_one(data):
    message = bytearray(REAL)
    for _ in range(data.draw(st.integers(1, 8))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    found = offered(bytes(message[: data.draw(st.integers(0, len(message)))]))
    assert found is None or all(isinstance(one, str) for one in found)
