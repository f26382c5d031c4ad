"""Which peer may do what."""

import os

import pytest

from agent.config import AccessRule, ConfigError, ServeSettings
from agent.host.peer import Peer
from agent.serving.access import Access, AccessTable
from agent.serving.answers import Refusal

OWN_UID = 500


def grant(uid, *gids, everyone="observe", rules=()):
    table = AccessTable(ServeSettings(everyone=everyone, access=tuple(rules)), OWN_UID)
    return table.grant(Peer(1, uid, frozenset(gids)))


CONTROL = AccessRule(allow="control", uids=(7,))
GROUP = AccessRule(allow="observe", gids=(70, 71))
LIMITED = AccessRule(allow="predict", uids=(8,), models=("a", "b"))
LIMITED_GROUP = AccessRule(allow="predict", gids=(80,), models=("c",))
RULES = (CONTROL, GROUP, LIMITED, LIMITED_GROUP)


@pytest.mark.parametrize(
    ("uid", "gids", "everyone", "access", "models"),
    [
        (0, (), "none", Access.CONTROL, None),
        (OWN_UID, (), "none", Access.CONTROL, None),
        (1, (), "none", Access.NONE, None),
        (1, (), "predict", Access.PREDICT, None),
        (7, (), "none", Access.CONTROL, None),
        (1, (5, 71), "predict", Access.OBSERVE, None),
        (1, (71,), "none", Access.OBSERVE, None),
        (8, (), "observe", Access.OBSERVE, {"a", "b"}),
        (8, (80,), "none", Access.PREDICT, {"a", "b", "c"}),
        (8, (70,), "none", Access.OBSERVE, None),
    ],
)
def test_the_largest_class_that_any_rule_gives(uid, gids, everyone, access, models):
    found = grant(uid, *gids, everyone=everyone, rules=RULES)
    assert found.access is access
    assert found.models == (None if models is None else frozenset(models))


def test_a_refusal_says_what_is_missing_and_where_it_is_granted():
    with pytest.raises(
        Refusal, match=r"needs access class 'control', uid 1 has 'observe': grant it under serve.access"
    ) as refused:
        grant(1).check(Access.CONTROL)
    assert refused.value.status == 403
    with pytest.raises(Refusal, match="uid 8 may use the models a, b, not 'c'"):
        grant(8, rules=RULES).check(Access.PREDICT, "c")
    grant(8, rules=RULES).check(Access.PREDICT, "a")


def test_names_of_users_and_groups_are_looked_up():
    rule = AccessRule(allow="control", uids=("root",), gids=("root",))
    assert grant(9, 0, rules=[rule]).access is Access.CONTROL
    for wrong in (AccessRule(allow="control", uids=("no-such-user",)), AccessRule(allow="control", gids=("no-such-group",))):
        with pytest.raises(ConfigError, match=r"there is no such (user|group) on this machine"):
            grant(1, rules=[wrong])


def test_the_kernel_says_who_the_peer_is():
    import socket

    from agent.host.peer import own, peer_of

    a, b = socket.socketpair()
    with a, b:
        assert peer_of(a) == own()
        assert peer_of(a).pid == os.getpid()
