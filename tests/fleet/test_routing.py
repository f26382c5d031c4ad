"""How MQTT topics and the names in a RabbitMQ cluster go together."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract import names, topics
from fleet_server.ingest import routing

devices = st.from_regex(names.DEVICE_ID, fullmatch=True)


@given(devices, st.sampled_from(get_args(topics.Upward)))
def test_a_topic_comes_back_as_it_was(device, what):
    topic = topics.up(device, what)
    assert routing.topic_of(routing.key_of(topic)) == topic
    assert topics.parse_up(routing.topic_of(routing.key_of(topic))) == (device, what)


def test_what_is_reported_and_what_is_asked_go_different_ways():
    keys = {routing.key_of(topics.up("+", what)) for what in get_args(topics.Upward)}
    (asks,) = [queue for queue in routing.queues(3, messages=10, size_bytes=100) if queue.name == routing.ASKS]
    assert {key for _, key in asks.bound} | set(routing.report_keys()) == keys
    assert not {key for _, key in asks.bound} & set(routing.report_keys())


@pytest.mark.parametrize("partitions", [1, 8])
def test_a_report_queue_is_read_by_one_at_a_time_and_refuses_when_it_is_full(partitions):
    found = routing.queues(partitions, messages=1000, size_bytes=1 << 20)
    reports = [queue for queue in found if queue.name != routing.ASKS]
    assert [queue.name for queue in reports] == [routing.partition(number) for number in range(partitions)]
    for queue in reports:
        assert queue.arguments["x-single-active-consumer"] is True
        assert queue.arguments["x-queue-type"] == "quorum"
        assert (queue.arguments["x-overflow"], queue.arguments["x-max-length"]) == ("reject-publish", 1000)
        assert queue.bound == ((routing.REPORTS, "1"),)
