"""Scopes: who is in one, which of two is looked at first, and whether a device can ever be in both; by sentences and by search."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.assignment import (
    Assignment,
    DeviceRecord,
    ModelAssignment,
    Reach,
    Rollout,
    Rule,
    format_of,
    read_assignment,
    wanted,
)
from agent.contract.codec import ContractError, encode
from agent.contract.scopes import Identity, is_within, meets, never_meet, rank, scope_of, text_of
from agent.sync.trust.desired import Desired

PI, JETSON = "aarch64/Pi/-", "aarch64/Jetson, 8 GB/cuda"

DEVICES = st.builds(
    Identity,
    device=st.sampled_from(["a", "b", "c"]),
    groups=st.frozensets(st.sampled_from(["canary", "kiosk"])),
    labels=st.dictionaries(st.sampled_from(["site", "line"]), st.sampled_from(["1", "2"])),
    hardware=st.sampled_from(["", PI, JETSON]),
)
TEXTS = st.sampled_from(
    [
        "group:canary", "group:kiosk", "group:canary,kiosk", "label:site=1", "label:site=2", "label:site=1,site=2", "label:line=1",
        "label:site=1,line=2", f"class:{PI}", f"class:{JETSON}", "device:a", "device:b,c",
    ]
)  # fmt: skip
SCOPES = st.lists(TEXTS, max_size=3).map(scope_of)


@pytest.mark.parametrize(
    ("texts", "inside", "outside"),
    [
        ([], Identity("a"), None),
        (["group:canary,beta"], Identity("a", ["beta"]), Identity("a", ["other"])),
        (
            ["label:site=berlin"],
            Identity("a", labels={"site": "berlin"}),
            Identity("a", labels={"site": "paris", "x": "berlin"}),
        ),
        (["group:k", "label:site=berlin"], Identity("a", ["k"], {"site": "berlin"}), Identity("a", ["k"])),
        ([f"class:{JETSON}"], Identity("a", hardware=JETSON), Identity("a", hardware="aarch64/Jetson")),
        (["device:a,b"], Identity("b"), Identity("c")),
    ],
)
def test_who_is_in_a_scope(texts, inside, outside):
    assert meets(scope_of(texts), inside)
    assert outside is None or not meets(scope_of(texts), outside)


@pytest.mark.parametrize(
    "text",
    ["canary", "group:", "team:x", "label:site", "label:site=", "group:a,,b", "group:a b", "device:a/b", "class:\x00", ":", ""],
)
def test_what_is_no_scope_is_refused_with_what_may_be_written(text):
    with pytest.raises(ValueError, match=r"scope|group|label|device|class"):
        scope_of([text])


def test_a_scope_of_named_devices_is_bounded():
    scope_of(["device:" + ",".join(f"d{n}" for n in range(100))])
    with pytest.raises(ValueError, match="from 1 to 100 device values"):
        scope_of(["device:" + ",".join(f"d{n}" for n in range(101))])


@given(scope=SCOPES)
def test_a_scope_is_read_as_it_is_written(scope):
    assert scope_of([one for one in text_of(scope).split(" and ") if one != "everyone"]) == scope


@given(one=SCOPES, other=SCOPES, device=DEVICES)
def test_no_device_is_in_two_scopes_that_never_meet(one, other, device):
    if never_meet(one, other):
        assert not (meets(one, device) and meets(other, device))


@given(one=SCOPES, other=SCOPES, device=DEVICES)
def test_who_is_in_the_inner_scope_is_in_the_outer_one(one, other, device):
    if is_within(one, other) and meets(one, device):
        assert meets(other, device)


@given(scopes=st.lists(SCOPES, max_size=4, unique=True), device=DEVICES)
def test_a_device_follows_the_first_rule_that_it_meets_and_no_other(scopes, device):
    ordered = sorted((scope for scope in scopes if scope), key=rank)
    rules = tuple(Rule(scope=scope, release=number + 2) for number, scope in enumerate(ordered))
    found = wanted(ModelAssignment(release=1, rules=rules), device.device, device.groups, device.hardware, device.labels)
    met = [rule.release for rule in rules if meets(rule.scope, device)]
    assert found.release == (met[0] if met else 1)


def test_the_most_specific_rule_is_looked_at_first():
    texts = [["group:a"], ["device:x"], ["class:c"], ["group:a", "label:s=1"], ["label:s=1"]]
    ordered = [text_of(scope) for scope in sorted(map(scope_of, texts), key=rank)]
    assert ordered == ["device:x", "label:s=1 and group:a", "label:s=1", "group:a", "class:c"]


def test_a_rollout_to_a_scope_leaves_the_rest_where_it_is():
    rollout = Rollout(id="r1", release=2, previous=1, permille=1000)
    model = ModelAssignment(release=1, rules=(Rule(scope=scope_of(["group:canary"]), rollout=rollout),))
    assert wanted(model, "a", ["canary"]).release == 2
    assert wanted(model, "a", []).release == 1


def test_devices_that_a_first_rollout_to_a_scope_has_not_reached_follow_the_next_rule():
    rollout = Rollout(id="r1", release=4, previous=1, groups=("first",))
    rules = (
        Rule(scope=scope_of(["group:kiosk", "label:site=1"]), rollout=rollout),
        Rule(scope=scope_of(["group:kiosk"]), release=3),
    )
    model = ModelAssignment(release=1, rules=rules)
    assert wanted(model, "a", ["kiosk"], labels={"site": "1"}).release == 3
    assert wanted(model, "a", ["kiosk", "first"], labels={"site": "1"}).release == 4


def test_older_software_refuses_what_it_would_run_wrong_and_reads_the_rest():
    """Its reader takes format 1 alone: an assignment with rules says 2, one without is as it was."""
    plain = {"digits": ModelAssignment(release=1, rollout=Rollout(id="r1", release=2, previous=1, attempt=4))}
    ruled = {"digits": ModelAssignment(release=1, rules=(Rule(scope=scope_of(["group:a"]), release=2),))}
    assert (format_of(plain.values()), format_of(ruled.values())) == (1, 2)
    made = Assignment(fleet="f", version=1, models=ruled, format=2)
    assert read_assignment(encode(made)) == made
    with pytest.raises(ContractError, match="assignment has format 3; this version reads formats 1 to 2: update the software"):
        read_assignment(encode(made).replace(b'"format":2', b'"format":3'))


def test_a_scope_out_of_order_or_of_an_unknown_kind_is_no_document():
    made = Assignment(
        fleet="f", version=1, format=2,
        models={"digits": ModelAssignment(release=1, rules=(Rule(scope=scope_of(["group:a,b"]), release=2),))},
    )  # fmt: skip
    for before, after in ((b'["a","b"]', b'["b","a"]'), (b'"kind":"group"', b'"kind":"planet"'), (b'["a","b"]', b"[]")):
        data = encode(made).replace(before, after)
        assert data != encode(made)
        with pytest.raises(ContractError):
            read_assignment(data)


def test_a_device_can_say_which_rule_it_follows():
    """What `edge-agent why` names: the rule that brought the release, by its rollout where there is one."""
    record = DeviceRecord(fleet="f", device="a", serial=1, groups=("kiosk",), labels={"site": "1"}, issued=0, expires=1)
    rollout = Rollout(id="r2", release=4, previous=3, groups=("first",), kept=(Reach(id="r1", release=5, permille=1000),))
    kiosk, berlin = scope_of(["group:kiosk"]), scope_of(["label:site=1"])

    def followed(*rules):
        models = {"digits": ModelAssignment(release=1, rules=rules)}
        assignment = Assignment(fleet="f", version=1, models=models, format=2)
        desired = Desired(assignment=assignment, record=record, verified_at=0, valid_until=1)
        found = desired.wanted("digits")
        return found.release, found.rollout, desired.rule("digits", "", found).scope

    assert followed() == (1, None, ())
    assert followed(Rule(scope=kiosk, release=3)) == (3, None, kiosk)
    assert followed(Rule(scope=berlin, rollout=rollout), Rule(scope=kiosk, release=3)) == (5, "r1", berlin)
    unreached = msgspec.structs.replace(rollout, kept=())
    assert followed(Rule(scope=berlin, rollout=unreached), Rule(scope=kiosk, release=3)) == (3, None, kiosk)
