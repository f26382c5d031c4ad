"""What a device may do at the broker, whichever broker it is. Pure.

Rules:
 1. a device writes the topics that exist for it to write, and no others: each could keep a retained message for ever;
 2. it reads its own `down` and what is for `all`, by the filters that exist; another's, `#` and shared subscriptions never;
 3. its client id is its name, which its certificate says: with another's it would throw that one off again and again.
"""

from __future__ import annotations

from typing import get_args

from agent.contract import topics
from fleet_server.devices import pki

_WRITES = tuple(get_args(topics.Upward))


def may_write(device: str, topic: str) -> bool:
    found = topics.parse_up(topic)
    return found is not None and found[0] == device and found[1] in _WRITES


def filters(device: str) -> frozenset[str]:
    """What there is for a device to subscribe to."""
    down, everybody = f"{topics.ROOT}/d/{device}/down/#", f"{topics.ROOT}/all/#"
    return frozenset({topics.down_poke(device), topics.POKE_ALL, topics.down_blocks(device, "+"), down, everybody})


def mosquitto_acl(control: str) -> str:
    """The same as mosquitto's access list. The server itself may do everything below the root and speak to the plug-in at the topic
    `control`.

    mosquitto grants every subscription and filters what is delivered by the list. Shared subscriptions are not used anywhere: the
    list does not cover joining one, and messages given to a member that may not read them are lost.
    """
    writes = "\n".join(f"pattern write {topics.up('%u', what)}" for what in _WRITES)
    return f"""\
user {pki.SERVER_CN}
topic readwrite {topics.ROOT}/#
topic readwrite {control}/#

{writes}
pattern read {topics.ROOT}/d/%u/down/#
pattern read {topics.ROOT}/all/#
"""
