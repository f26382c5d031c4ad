"""Wrong bytes from anybody but the fleet server say nothing about a release: it is tried again, not refused for good."""

from __future__ import annotations

import pytest

from agent.contract.codec import decode
from agent.contract.reasons import Reason
from agent.contract.transfers import Ask, Part, Status
from agent.store import Store
from agent.sync.fetching.mqtt import MqttBlobs, Transfers
from agent.sync.problems import Problem
from tests.sync.blobs import MemoryBlobs, blocked, downloader, fetch

DATA = b"right" * 500
FILE = blocked(DATA, 1000)


class Away(MemoryBlobs):
    """The fleet server, out of reach."""

    def read(self, sha256, start, end):
        raise Problem(Reason.DOWNLOAD_FAILED, "no route to host")


def forging() -> MqttBlobs:
    """A broker that answers every ask with bytes of its own."""

    def send(payload: bytes) -> bool:
        ask = decode(payload, Ask, limit_bytes=4096)
        for number in ask.parts():
            count = max(0, min(ask.part_bytes, len(DATA) - number * ask.part_bytes))
            transfers.received(ask.id, Part(Status.OK, number, len(DATA), b"!" * count).encode())
        return True

    transfers = Transfers(send, lambda: True, part_bytes=1024)
    return MqttBlobs(transfers)


def test_a_broker_that_forges_bytes_makes_no_release_bad(store: Store):
    with pytest.raises(Problem) as caught:
        fetch(downloader(store, Away(b"", name="server"), forging()), FILE)
    assert caught.value.retryable


def test_one_source_that_is_not_the_fleets_makes_no_release_bad(store: Store):
    with pytest.raises(Problem) as caught:
        fetch(downloader(store, MemoryBlobs(bytes(len(DATA)), name="stick", final=False)), FILE)
    assert caught.value.retryable
