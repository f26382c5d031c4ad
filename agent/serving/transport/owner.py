"""Who works for a connection: one owner at any time, and a table of who may follow whom.

Whoever owns a connection reads from it, answers, and gives it on; nobody else touches it. Any move that is not in `NEXT`
raises, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum


class Owner(IntEnum):
    NOBODY = 0  # it is not let in yet, or is closed
    LEADER = 1  # it is at the epoll, and the thread that polls attends it
    THREAD = 2  # one other thread works for it, and the epoll does not know it
    QUEUE = 3  # its prediction waits for its turn, no thread works for it, and the epoll does not know it
    HEARD_QUEUE = 4  # as QUEUE, but the thread that polls hears when the peer goes


class Move(IntEnum):
    ADMIT = 0
    HAND_OVER = 1
    PARK = 2
    HEAR = 3
    START = 4
    PUT_BACK = 5
    CLOSE = 6


NOBODY, LEADER, THREAD, QUEUE, HEARD_QUEUE = Owner  # looking a member up at its class takes longer than the comparison

NEXT: Mapping[tuple[Owner, Move], Owner] = {
    (NOBODY, Move.ADMIT): LEADER,
    (NOBODY, Move.CLOSE): NOBODY,
    (LEADER, Move.HAND_OVER): THREAD,
    (LEADER, Move.PARK): HEARD_QUEUE,  # the epoll knows it: from now on only the peer's end is heard
    (LEADER, Move.CLOSE): NOBODY,
    (THREAD, Move.PARK): QUEUE,
    (THREAD, Move.PUT_BACK): LEADER,
    (THREAD, Move.CLOSE): NOBODY,
    (QUEUE, Move.HEAR): HEARD_QUEUE,
    (QUEUE, Move.START): THREAD,
    (HEARD_QUEUE, Move.START): THREAD,
    # A queue closes nothing: who gives a waiting prediction up first takes it out of the queue, which is START.
}


class IllegalMove(Exception):
    """A move that cannot follow: a mistake of this program."""


def after(owner: Owner, move: Move) -> Owner:
    """Who owns the connection after this move.  Raises: IllegalMove."""
    found = NEXT.get((owner, move))
    if found is None:
        raise IllegalMove(f"{move.name} cannot follow while {owner.name} has the connection")
    return found
