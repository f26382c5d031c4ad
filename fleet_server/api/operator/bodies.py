"""The bodies of requests. What a route answers is the type that its handler returns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fleet_server.access import Role
from fleet_server.devices.ca_replacement import LONGEST_SPREAD_S, MAX_SWITCH_AFTER_S, SWITCH_AFTER_S
from fleet_server.devices.inventory import MAX_LATE_S

Name = Annotated[str, Field(min_length=1, max_length=64)]
Version = Annotated[int, Field(ge=1, le=2**53 - 1)]


ScopeText = Annotated[str, Field(max_length=8192, examples=["group:canary", "label:site=berlin", "device:crane-1,crane-2"])]
ConditionText = Annotated[str, Field(max_length=8192, examples=["label:site=berlin", "class:aarch64/*/cuda", "agent:0.4.*"])]
Scopes = Annotated[list[ScopeText], Field(max_length=8)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Groups(Body):
    """All groups the device shall be in; those not named it leaves."""

    groups: Annotated[list[Name], Field(max_length=64)]


class GroupScope(Body):
    """Conditions that the devices of a group meet, all of them."""

    scope: Annotated[list[ConditionText], Field(min_length=1, max_length=8)]


class Labels(Body):
    """Labels to give, and names of those to take off. Others stay."""

    set: dict[str, str] = {}
    unset: Annotated[list[Name], Field(max_length=64)] = []


class LateRenewal(Body):
    """How long the device may renew a certificate that has ended."""

    ttl_s: Annotated[float, Field(gt=0, le=MAX_LATE_S)] = 86400.0


class NewEnrolmentToken(Body):
    """`device`: only this id may join with it. `groups`, `labels`: what the joining devices are put in and given."""

    device: Name | None = None
    groups: Annotated[list[Name], Field(max_length=64)] = []
    labels: Annotated[dict[str, str], Field(max_length=32)] = {}
    uses: Annotated[int, Field(ge=1, le=100_000)] = 1
    ttl_s: Annotated[float, Field(gt=0, le=365 * 86400)] = 86400.0


class NewAccessToken(Body):
    """An access token to be made, for a person or a program."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    role: Role


class SignIn(Body):
    """An access token, for which the browser gets a session."""

    token: Annotated[str, Field(min_length=1, max_length=256)]


class Publication(Body):
    """The manifest's and the signed metadata's exact bytes, as text."""

    manifest: str
    metadata: str


class Metadata(Body):
    """A publisher's signed metadata that adds no release, as text."""

    metadata: str


class PublicKey(BaseModel):
    """A public key as `edge-fleet keys public` prints it. Kinds of keys may have further fields."""

    model_config = ConfigDict(extra="allow")

    keyid: Annotated[str, Field(max_length=256)]
    keytype: Annotated[str, Field(max_length=64)]
    scheme: Annotated[str, Field(max_length=64)]
    keyval: dict[str, str]


class KeyWish(Body):
    """A change of who is trusted. `role`: root, targets, a publisher, assignments, snapshot, timestamp, or `online` for those
    three.
    """

    action: Annotated[str, Field(pattern="^(renew|rotate|add-publisher|remove-publisher)$")]
    role: Name
    add: Annotated[list[PublicKey], Field(max_length=16)] = []
    remove: Annotated[list[Name], Field(max_length=16)] = []
    threshold: Annotated[int, Field(ge=1, le=16)] | None = None
    patterns: Annotated[list[Annotated[str, Field(min_length=1, max_length=65)]], Field(max_length=64)] = []


class CaReplace(Body):
    """`switch_after_s`: when the server's own certificates are of the new CA. `spread_s`: the time over which devices renew; without
    it what `looks_per_s` makes of their number.
    """

    switch_after_s: Annotated[float, Field(ge=0, le=MAX_SWITCH_AFTER_S)] = SWITCH_AFTER_S
    spread_s: Annotated[float, Field(ge=0, le=LONGEST_SPREAD_S)] | None = None


class CaFinish(Body):
    """`leave_behind`: whether devices may be left that have not followed."""

    leave_behind: bool = False


class SignedChange(Body):
    """The change file as the offline keys signed it, as text."""

    change: str


RENAMED = {"hold": "confirm", "together": "team"}
"""Fields of a new rollout that were called otherwise → what they are called now."""


class PlannedRollout(Body):
    """`waves`: each is so many devices (`1`), a share of all (`5%`) or a group; after the last one comes everyone. Or the first one as
    `groups` and `percent`. None of them: every device at once. `team`: releases of other models that switch with it on each device, all or
    none. `scope`: whom it is for; each is a condition, all of which a device must meet.
    """

    release: Annotated[str, Field(max_length=100, examples=["digits:4"])]
    team: Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=32)] = []
    waves: Annotated[list[Name], Field(max_length=32, examples=[["1", "5%", "canary", "25%"]])] = []
    groups: Annotated[list[Name], Field(max_length=64)] = []
    scope: Scopes = []
    percent: Annotated[float, Field(gt=0, le=100)] | None = None


class NewRollout(PlannedRollout):
    """`confirm`: wait for promote between waves. `window`: when devices may switch, in their local time. `mode` shadow: devices run it on
    copies of live requests and install nothing. `at_once`: a wave tells all of its devices in one step. `starts`: when it begins, with its
    zone. `max_failures`: how many devices may refuse it or roll it back, on top of `failure_share`. `bake_s`: for how long a wave must have
    passed before the next one. `rate`: devices told in a minute. `failure_share`, `min_share` and `time_limit_s`: instead of what fleet.yaml
    says. `retry`: devices that refused the release before try it again.
    """

    window: Annotated[str, Field(max_length=64, examples=["mon-fri 22:00-05:00"])] | None = None
    mode: Literal["install", "shadow"] = "install"
    confirm: bool = False
    at_once: bool = False
    starts: Annotated[str, Field(max_length=64, examples=["2026-12-24T02:00+01:00"])] | None = None
    max_failures: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    failure_share: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    bake_s: Annotated[float, Field(ge=0, le=365 * 86400)] | None = None
    rate: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    min_share: Annotated[float, Field(ge=0, le=1)] | None = None
    time_limit_s: Annotated[float, Field(ge=1, le=365 * 86400)] | None = None
    retry: bool = False

    @model_validator(mode="before")
    @classmethod
    def _names_of_now(cls, given: Any) -> Any:
        former = next((name for name in RENAMED if isinstance(given, dict) and name in given), None)
        if former is not None:
            raise ValueError(f"{former} is called {RENAMED[former]} now")
        return given


class Superseding(Body):
    """The newer release that takes a rollout's place. `waves` and `confirm`: instead of those of the first."""

    release: Annotated[str, Field(max_length=100, examples=["digits:5"])]
    waves: Annotated[list[Name], Field(max_length=32)] = []
    confirm: bool | None = None


class Rollback(Body):
    """Without `to`: the release that ran before. `forward`: `to` may be newer than what runs."""

    to: Version | None = None
    forward: bool = False
    scope: Scopes = []


class RuleEnd(Body):
    """The scope whose rule ends."""

    scope: Annotated[list[ScopeText], Field(min_length=1, max_length=8)]


class NewBundle(Body):
    """For these devices, or those of a group, or all; with what they should run of these models, or of all."""

    models: Annotated[list[Name], Field(max_length=256)] = []
    devices: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=10_000)] = []
    group: Name | None = None
    valid_days: Annotated[float, Field(gt=0, le=90)] | None = None
