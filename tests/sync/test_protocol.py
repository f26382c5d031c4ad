"""Which MQTT an agent speaks after a broker has accepted or refused it."""

import math

from agent.sync.fleet.protocol import FIVE, STAYS_FOR, THREE, ProtocolChoice, asks_again_after_s


def tried(choice, count):
    """What is tried after each of so many refusals."""
    found = []
    for _ in range(count):
        choice.refused()
        found.append(choice.present)
    return found


def test_a_broker_that_took_nothing_yet_is_tried_with_both_in_turn():
    assert tried(ProtocolChoice(), 4) == [THREE, FIVE, THREE, FIVE]


def test_what_a_broker_took_is_tried_again_and_the_other_once_in_a_while(caplog):
    caplog.set_level("INFO")
    choice = ProtocolChoice()
    choice.refused()
    choice.accepted()
    choice.accepted()
    assert [record.message for record in caplog.records] == ["the broker speaks MQTT 3.1.1: going on with that"]
    assert tried(choice, STAYS_FOR + 2) == [*[THREE] * (STAYS_FOR - 1), FIVE, THREE, THREE]


def test_a_broker_that_was_replaced_by_one_of_mqtt_5_is_found_out():
    choice = ProtocolChoice()
    choice.refused()
    choice.accepted()
    tried(choice, STAYS_FOR)
    choice.accepted()
    assert tried(choice, STAYS_FOR - 1) == [FIVE] * (STAYS_FOR - 1)


def test_pokes_are_asked_for_again_where_a_cluster_may_forget_them():
    """Soon after connecting, when a node has perhaps just died, and then seldom."""
    waits = [asks_again_after_s(THREE, times) for times in range(1, 7)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1], waits[-2]) == (5.0, 600.0, 600.0)
    assert asks_again_after_s(FIVE, 1) == math.inf
