"""The tables. Plain types only, so that the same schema serves SQLite now and PostgreSQL later; times are seconds since the
epoch.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# A counter column: 64 bits everywhere, and SQLite's own row number where that is what counts.
Sequence = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON, list[Any]: JSON, int: BigInteger}


class Setting(Base):
    """Single values, such as the version of the assignment that is wanted."""

    __tablename__ = "settings"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class Device(Base):
    """One device: what it was given, and the last thing it said about itself."""

    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created: Mapped[float] = mapped_column(Float)
    groups: Mapped[list[str]] = mapped_column(JSON, default=list)
    groups_by_scope: Mapped[list[Any] | None] = mapped_column(JSON)
    """Those of its groups that it is in because it meets their scopes; see `devices.grouping`."""
    labels: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    serial: Mapped[int] = mapped_column(default=1)
    record: Mapped[str | None] = mapped_column(Text)
    record_expires: Mapped[float] = mapped_column(Float, default=0.0)
    revoked: Mapped[bool] = mapped_column(Boolean, default=False)
    counter: Mapped[int] = mapped_column(default=-1)
    last_seen: Mapped[float | None] = mapped_column(Float)
    present: Mapped[bool] = mapped_column(Boolean, default=False)
    session: Mapped[int] = mapped_column(default=-1)
    hardware: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    state: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    runs: Mapped[list[str]] = mapped_column(JSON, default=list)
    """The words of its agent's last processes; see `devices.shared_identity`."""
    shared: Mapped[float | None] = mapped_column(Float)
    """When it last showed itself to be several machines."""
    retries: Mapped[list[Any] | None] = mapped_column(JSON)
    """The releases that it alone is to try again, and in which attempt (`Retry` of the contract)."""
    late_until: Mapped[float | None] = mapped_column(Float)
    """Until when it may renew a certificate that has ended."""
    change: Mapped[int] = mapped_column(default=0, server_default="0", index=True)
    """The number of the transaction that last changed what rollouts know of it; see `storage.changes`."""
    said: Mapped[str | None] = mapped_column(String(32))
    """A digest of what seldom differs from one report to the next."""
    # Of its last report, and of its certificates, what devices are searched and counted by:
    hardware_class: Mapped[str | None] = mapped_column(String(512), index=True)
    agent_version: Mapped[str | None] = mapped_column(String(64))
    stale_groups: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """What the scopes of groups ask about has changed since its groups were worked out."""
    problem: Mapped[str | None] = mapped_column(String(256), index=True)
    trouble: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    expires: Mapped[float | None] = mapped_column(Float)
    """When the last of its certificates ends that were not revoked."""
    __table_args__ = (
        Index("ix_devices_seen", "revoked", "present", "last_seen"),
        Index("ix_devices_trouble", "trouble", "id"),
        Index("ix_devices_expires", "revoked", "expires"),
        Index("ix_devices_shared", "shared"),
        Index("ix_devices_stale_groups", "stale_groups", "id"),
    )


class DeletedDevice(Base):
    """A device that was deleted, with the number of the change that did it: whoever follows changes forgets it."""

    __tablename__ = "deleted_devices"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    change: Mapped[int] = mapped_column(index=True)


class Counter(Base):
    """A number that only grows. Whoever adds to it holds its row until the end of the transaction."""

    __tablename__ = "counters"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[int]


class DeviceModel(Base):
    """One model on one device, out of its last signed report: what the rollout gates and the tables are made from."""

    __tablename__ = "device_models"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    serving: Mapped[int | None]
    sha256: Mapped[str | None] = mapped_column(String(64))
    variant: Mapped[str | None] = mapped_column(String(128))
    phase: Mapped[str] = mapped_column(String(32))
    answers: Mapped[list[Any]] = mapped_column(JSON, default=list)
    held: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    __table_args__ = (
        Index("ix_device_models_serving", "model", "serving", "device"),
        Index("ix_device_models_phase", "phase", "model", "device"),
    )


class Certificate(Base):
    """Every client certificate the CA issued. `serial` is its serial number in hex."""

    __tablename__ = "certificates"
    serial: Mapped[str] = mapped_column(String(64), primary_key=True)
    device: Mapped[str] = mapped_column(String(64), index=True)
    pem: Mapped[str] = mapped_column(Text)
    issued: Mapped[float] = mapped_column(Float)
    expires: Mapped[float] = mapped_column(Float)
    revoked: Mapped[float | None] = mapped_column(Float)
    authority: Mapped[str | None] = mapped_column(String(64))
    """The CA that issued it: the sha256 of the CA's certificate."""
    __table_args__ = (Index("ix_certificates_authority", "authority", "device"),)


class EnrolmentToken(Base):
    """What lets a device join. Only the hash of the token is kept."""

    __tablename__ = "enrolment_tokens"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    device: Mapped[str | None] = mapped_column(String(64))
    groups: Mapped[list[str]] = mapped_column(JSON, default=list)
    labels: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    uses_left: Mapped[int] = mapped_column(Integer)
    created: Mapped[float] = mapped_column(Float)
    created_by: Mapped[str] = mapped_column(String(128))
    expires: Mapped[float] = mapped_column(Float)
    revoked: Mapped[bool] = mapped_column(Boolean, default=False)


class AccessToken(Base):
    """What lets a person or a program use the API. Only the hash of the token is kept."""

    __tablename__ = "access_tokens"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    created: Mapped[float] = mapped_column(Float)
    revoked: Mapped[bool] = mapped_column(Boolean, default=False)


class BrowserSession(Base):
    """A signed-in browser. It ends with its access token."""

    __tablename__ = "browser_sessions"
    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    token: Mapped[str] = mapped_column(ForeignKey("access_tokens.id", ondelete="CASCADE"))
    expires: Mapped[float] = mapped_column(Float)


class ReleaseRow(Base):
    """A published release. The truth is the signed metadata; this is its index, rebuilt from it at start."""

    __tablename__ = "releases"
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    manifest: Mapped[str] = mapped_column(Text, deferred=True)
    """Read only when it is asked for: it may have megabytes."""
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int]
    published: Mapped[float] = mapped_column(Float)
    signers: Mapped[list[str]] = mapped_column(JSON, default=list)
    withdrawn: Mapped[bool] = mapped_column(Boolean, default=False)
    deleted: Mapped[bool] = mapped_column(Boolean, default=False)
    """Its files are gone; its manifest is not."""


class ModelRow(Base):
    """What the whole fleet runs of a model, and what it ran before."""

    __tablename__ = "models"
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    release: Mapped[int | None]
    previous: Mapped[int | None]


class RuleRow(Base):
    """What the devices of a scope run of a model, in place of what everyone does, and what they ran before."""

    __tablename__ = "rules"
    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    model: Mapped[str] = mapped_column(String(64))
    scope: Mapped[str] = mapped_column(Text)
    release: Mapped[int | None]
    previous: Mapped[int | None]
    __table_args__ = (UniqueConstraint("model", "scope", name="uq_rules_scope"),)


class RolloutRow(Base):
    """A staged change: its waves and where it stands."""

    __tablename__ = "rollouts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(index=True)
    model: Mapped[str] = mapped_column(String(64), index=True)
    release: Mapped[int]
    previous: Mapped[int | None]
    waves: Mapped[list[Any]] = mapped_column(JSON)
    wave: Mapped[int] = mapped_column(Integer, default=0)
    state: Mapped[str] = mapped_column(String(16), index=True)
    confirm: Mapped[bool] = mapped_column(Boolean, default=False)
    max_failures: Mapped[int] = mapped_column(Integer, default=0)
    """Read only where `rules` is null."""
    mode: Mapped[str] = mapped_column(String(16), default="install")
    team: Mapped[str | None] = mapped_column(String(64), index=True)
    window: Mapped[str | None] = mapped_column(String(64))
    created: Mapped[float] = mapped_column(Float)
    created_by: Mapped[str] = mapped_column(String(128))
    updated: Mapped[float] = mapped_column(Float)
    reason: Mapped[str] = mapped_column(Text, default="")
    rules: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """What its waves must keep to pass (`rollouts.gates.Rules`), as it was when the rollout began; null: begun before that was kept."""
    reach: Mapped[int | None] = mapped_column(Integer)
    """The slot up to which its wave tells its devices by now; null: all of them."""
    grows: Mapped[float | None] = mapped_column(Float)
    """When more of its devices may be told, by its rate."""
    passed: Mapped[float | None] = mapped_column(Float)
    """When its wave passed its gate; the bake time counts from then."""
    starts: Mapped[float | None] = mapped_column(Float)
    """When it is to begin; null: at once."""
    approved_by: Mapped[str | None] = mapped_column(String(128))
    attempt: Mapped[int] = mapped_column(default=0, server_default="0")
    """What devices refused in an attempt with a lower number is tried again; see `rollouts.retries`."""
    kept: Mapped[list[Any] | None] = mapped_column(JSON)
    """The rollouts that it superseded, the latest first, and whom they had reached (`Reach` of the contract)."""
    scope: Mapped[str] = mapped_column(Text, default="", server_default="")
    """Whom it is for (`rollouts.rules.stored`); empty: everyone."""
    health: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """What the health of its release must keep (`rollouts.health.HealthRules`), as it was when the rollout began."""


class ToldDevice(Base):
    """A device that was there at a moment at which its wave of the rollout had begun, and when that was first seen."""

    __tablename__ = "told_devices"
    rollout: Mapped[str] = mapped_column(ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True)
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    at: Mapped[float] = mapped_column(Float)


class SkippedDevice(Base):
    """A device that an operator took out of the rollout's count."""

    __tablename__ = "skipped_devices"
    rollout: Mapped[str] = mapped_column(ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True)
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    by: Mapped[str] = mapped_column(String(128))


class ExclusionRow(Base):
    """A hardware class that does not run a release, with the devices that refused it. One that was ended is kept: the class is
    not excluded again.
    """

    __tablename__ = "exclusions"
    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    model: Mapped[str] = mapped_column(String(64), index=True)
    release: Mapped[int]
    hardware: Mapped[str] = mapped_column(String(512))
    instead: Mapped[int | None]
    rollout: Mapped[str] = mapped_column(String(64))
    at: Mapped[float] = mapped_column(Float)
    count: Mapped[int]
    reason: Mapped[str] = mapped_column(Text)
    devices: Mapped[list[Any]] = mapped_column(JSON, default=list)
    ended: Mapped[float | None] = mapped_column(Float)
    ended_by: Mapped[str | None] = mapped_column(String(128))


class VerdictRow(Base):
    """What a gate said about a wave, with the counts and the devices behind it. Kept whenever it changes."""

    __tablename__ = "verdicts"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    rollout: Mapped[str] = mapped_column(ForeignKey("rollouts.id", ondelete="CASCADE"), index=True)
    wave: Mapped[int] = mapped_column(Integer)
    at: Mapped[float] = mapped_column(Float)
    verdict: Mapped[str] = mapped_column(String(16))
    why: Mapped[str] = mapped_column(Text)
    counts: Mapped[dict[str, Any]] = mapped_column(JSON)
    evidence: Mapped[list[Any]] = mapped_column(JSON, default=list)
    health: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """What the devices' health said, where something was known of it (`rollouts.vitals.Vitals`)."""


class EventRow(Base):
    """What happened, said by a device or by the server itself (`device` is null then)."""

    __tablename__ = "events"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(128), unique=True)
    device: Mapped[str | None] = mapped_column(String(64), index=True)
    at: Mapped[float] = mapped_column(Float)
    received: Mapped[float] = mapped_column(Float)
    name: Mapped[str] = mapped_column(String(128))
    message: Mapped[str] = mapped_column(Text)
    model: Mapped[str | None] = mapped_column(String(64))
    release: Mapped[int | None]
    reason: Mapped[str | None] = mapped_column(String(128))


class AuditRow(Base):
    """Every change somebody made: who, when, what."""

    __tablename__ = "audit"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float)
    who: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(256))
    detail: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)


class DocumentRow(Base):
    """A signed document, where the server is several processes; see `storage.documents`."""

    __tablename__ = "documents"
    name: Mapped[str] = mapped_column(String(512), primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)
    digest: Mapped[str] = mapped_column(String(64))
    size: Mapped[int]
    written: Mapped[float] = mapped_column(Float)
    change: Mapped[int] = mapped_column(index=True)
    """The number of the transaction that stored it."""


class LeaderRow(Base):
    """Who decides and signs; see `storage.leadership`."""

    __tablename__ = "leaders"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int]
    """The fencing number: it grows with each leader."""
    holder: Mapped[str] = mapped_column(String(128))
    address: Mapped[str] = mapped_column(String(256))
    since: Mapped[float] = mapped_column(Float)
    until: Mapped[float] = mapped_column(Float)
    """When its lease ends, by the database's clock; 0 when it gave it back."""


class ProcessRow(Base):
    """A process of the server that lives, or lived a moment ago; see `storage.processes`."""

    __tablename__ = "processes"
    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    version: Mapped[str] = mapped_column(String(64))
    since: Mapped[float] = mapped_column(Float)
    seen: Mapped[float] = mapped_column(Float)
    """By the database's clock, as `since` is."""
    detail: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)


class DoneRequest(Base):
    """A request that changed something, by its idempotency key and whose it was; see `storage.once`."""

    __tablename__ = "done_requests"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    at: Mapped[float] = mapped_column(Float, index=True)
