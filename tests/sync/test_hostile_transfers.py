"""A broker that answers transfers as it likes wastes a little time and memory, and no more."""

from __future__ import annotations

import threading

import pytest

from agent.contract.codec import decode
from agent.contract.transfers import Ask, Part, Status
from agent.sync.fetching.mqtt import MqttDocuments, Transfers
from agent.sync.problems import Problem

PART = 1024
SIZE = 40 * PART


def test_a_part_that_comes_again_and_again_is_no_progress():
    asks: list[Ask] = []
    answered = threading.Event()

    def send(payload: bytes) -> bool:
        ask = decode(payload, Ask, limit_bytes=4096)
        asks.append(ask)
        if len(asks) == 1:
            transfers.received(ask.id, Part(Status.OK, 0, SIZE, bytes(PART)).encode())
        answered.set()
        return True

    def repeat() -> None:
        answered.wait(5.0)
        while transfers.active:
            transfers.received(asks[0].id, Part(Status.OK, 2, SIZE, bytes(PART)).encode())
            ended.wait(0.002)

    transfers, ended = Transfers(send, lambda: True, part_bytes=PART, silence_s=0.5), threading.Event()
    hostile = threading.Thread(target=repeat)
    hostile.start()
    try:
        with pytest.raises(Problem) as caught:
            MqttDocuments(transfers).get("mqtt:/x", limit_bytes=2 * SIZE, deadline_s=20.0)
    finally:
        hostile.join(10.0)
    assert caught.value.retryable


def test_what_is_larger_than_a_part_is_not_kept():
    kept: list[int] = []

    def send(payload: bytes) -> bool:
        id_ = decode(payload, Ask, limit_bytes=4096).id
        transfers.received(id_, Part(Status.OK, 0, 1 << 40, bytes(64 * PART)).encode())
        kept.append(transfers.unread)
        return True

    transfers = Transfers(send, lambda: True, part_bytes=PART, silence_s=0.01)
    with pytest.raises(Problem):
        next(transfers.parts("blob", "x", 0, 40))
    assert set(kept) == {0}
