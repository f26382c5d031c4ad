"""Tables of what may follow what: owners of connections, and where the models of versions are."""

import itertools

import pytest

from agent.serving.models.presence import TRANSITIONS, IllegalStep, Place, Presence, Step
from agent.serving.transport.owner import NEXT, IllegalMove, Move, Owner, after


@pytest.mark.parametrize(("owner", "move"), list(itertools.product(Owner, Move)), ids=lambda member: member.name)
def test_a_move_that_is_not_in_the_table_raises(owner, move):
    if (owner, move) in NEXT:
        assert after(owner, move) is NEXT[owner, move]
    else:
        with pytest.raises(IllegalMove, match=f"{move.name} cannot follow while {owner.name}"):
            after(owner, move)


def test_whoever_owns_a_connection_can_be_followed_by_nobody():
    """From every owner some moves lead to the end of the connection."""
    ends = {Owner.NOBODY}
    for _ in Owner:
        ends |= {owner for (owner, _), then in NEXT.items() if then in ends}
    assert ends == set(Owner)


@pytest.mark.parametrize(("place", "step"), list(itertools.product(Place, Step)), ids=lambda member: member.name)
def test_a_step_of_a_version_that_is_not_in_the_table_raises_and_changes_nothing(place, step):
    presence = Presence()
    presence.place, presence.reason = place, "before"
    if (place, step) in TRANSITIONS:
        presence.step(step, "after")
        assert (presence.place, presence.reason) == (TRANSITIONS[place, step], "after")
    else:
        with pytest.raises(IllegalStep):
            presence.step(step, "after")
        assert (presence.place, presence.reason) == (place, "before")
