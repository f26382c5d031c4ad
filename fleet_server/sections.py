"""The base of every section of fleet.yaml, and some of them; `config` has the others and the whole."""

from __future__ import annotations

import re
import socket
from typing import Literal

import msgspec

from agent.contract import addresses
from fleet_server import freezes

DAY_S = 86400.0
MAX_PARTITIONS = 64
WILDCARDS = {"0.0.0.0", "::", ""}  # noqa: S104 - recognising it, not binding it


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: frozen, and a misspelt setting is an error."""


class RolloutSettings(Settings, frozen=True, kw_only=True):
    """When rollouts are judged, and what their waves must keep to pass."""

    tick_s: float = 5.0
    """Seconds after which rollouts are judged again although no report came: a device may have fallen silent."""
    silence_s: float = 180.0
    """Seconds without a word after which a device counts as offline: three heartbeats."""
    failure_share: float = 0.03
    """Which part of the devices that were told may refuse a release or roll it back. A rollout with more ends, and everybody goes back."""
    min_devices: int = 1
    """How many devices of a wave must serve the release before the wave passes."""
    min_share: float = 0.5
    """And which part of those that were there when they were told, less those that are held or skipped."""
    missing_share: float = 0.1
    """Which part of them may fall silent, or not answer in time. A wave with more does not pass until they are back, or somebody decides."""
    confidence: float = 0.99
    """How sure it must be that more than `failure_share` fail, or more than `missing_share` are missing: of rollouts in which no more do, 1 % is
    ended, or held up, at 0.99.
    """
    time_limit_s: float = DAY_S
    """Seconds that a wave waits for a device from when it was told. A rollout with a window allows a week more."""
    freeze: tuple[str, ...] = ()
    """Times in which no rollout begins, begins a wave or tells more devices: 'mon-fri 08:00-18:00 Europe/Berlin' every week (UTC where no
    zone is named), '2026-12-23T18:00+01:00/2027-01-02T08:00+01:00' once. Aborts, rollbacks and withdrawals are done at any time.
    """
    approval: bool = False
    """Whether another person than the one who started a rollout must approve it before it begins."""
    exclude_after: int = 3
    """How many devices of one hardware class must have quarantined a release for the class to be excluded from it. 0: never."""
    exclude_share: float = 0.02
    """And which part of the class's devices that run or quarantined the release: a few that are broken do not speak for a
    thousand.
    """

    def __post_init__(self) -> None:
        if self.tick_s <= 0 or self.silence_s <= 0 or self.min_devices < 1 or self.exclude_after < 0:
            raise ValueError("tick_s and silence_s must be above 0, min_devices at least 1, exclude_after not negative")
        if not (0 <= self.exclude_share <= 1 and 0 <= self.min_share <= 1 and 0 < self.missing_share < 1):
            raise ValueError("exclude_share and min_share must be from 0 to 1, missing_share above 0 and below 1")
        if not 0 < self.failure_share < 0.5:
            raise ValueError("failure_share must be above 0 and below 0.5")
        for text in self.freeze:
            freezes.parse(text)
        if not (0.5 <= self.confidence < 1 and self.time_limit_s >= 1):
            raise ValueError("confidence must be from 0.5 to below 1, time_limit_s at least 1 second")


class DecideSettings(Settings, frozen=True, kw_only=True):
    """Where `edge-fleet decide` listens for the server's other processes, which show the server's own client certificate there. With
    `edge-fleet serve` nobody listens.
    """

    listen: str = "127.0.0.1"
    """The address of this machine: one that the machines of the other processes reach, where there are several."""
    port: int = 8445
    """The TCP port (HTTPS)."""
    told: str | None = None
    """HOST:PORT by which the others reach this one; without it `listen` and `port`."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError("a port is a number from 1 to 65535")
        if self.told is not None:
            addresses.split(self.told, "decide.told")

    @property
    def address(self) -> str:
        """HOST:PORT by which the others reach this one."""
        host = socket.gethostname() if self.listen in WILDCARDS else self.listen
        return self.told or addresses.join(host, self.port)


class NodeSettings(Settings, frozen=True, kw_only=True):
    """One node of a RabbitMQ cluster."""

    name: str
    """What the node calls itself, such as `rabbit@r1`."""
    amqp: str
    """HOST:PORT of its AMQP listener (TLS), as this server reaches it."""
    mqtt: str
    """HOST:PORT of its MQTT listener (TLS), as this server reaches it. Devices are told `public.broker`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+@[A-Za-z0-9._-]+", self.name):
            raise ValueError(f"a node is called {self.name!r}; a name is like rabbit@host")
        addresses.split(self.amqp, f"amqp of node {self.name}")
        addresses.split(self.mqtt, f"mqtt of node {self.name}")


class RabbitSettings(Settings, frozen=True, kw_only=True):
    """A RabbitMQ cluster that others run, in the place of mosquitto. Only read where `broker.kind` is `rabbitmq`."""

    nodes: tuple[NodeSettings, ...] = ()
    """Its nodes, see below. The server speaks to one, and to the next when that goes."""
    vhost: str = "/"
    """The virtual host of this fleet: one for each."""
    partitions: int = 8
    """In how many queues what devices report is kept; each is stored by one process at a time, so this is how many processes can
    share the work; with a few times as many as processes each has about as much. There may be more of them later, and never fewer.
    """
    queue_messages: int = 200_000
    """How many messages each of these queues keeps. A device is refused what finds no room, and keeps it."""
    queue_bytes: int = 512 * 1024**2
    """The same in bytes."""
    authorization_listen: str = "127.0.0.1"
    """The address of this machine at which the nodes ask who may do what (HTTPS; a node shows its certificate). Nodes on other hosts
    need another than 127.0.0.1.
    """
    authorization_port: int = 8446
    """The TCP port of that."""
    authorization: str | None = None
    """HOST:PORT at which the nodes find it; without it the address and port that it listens at, or the first of `hosts`."""

    def __post_init__(self) -> None:
        if not 1 <= self.partitions <= MAX_PARTITIONS:
            raise ValueError(f"partitions is {self.partitions}; it must be from 1 to {MAX_PARTITIONS}")
        if self.queue_messages < 1000 or self.queue_bytes < 1024**2:
            raise ValueError("queue_messages must be at least 1000 and queue_bytes at least 1 MiB")
        if not 0 < self.authorization_port < 65536:
            raise ValueError("authorization_port must be from 1 to 65535")
        if len({node.name for node in self.nodes}) < len(self.nodes):
            raise ValueError("two nodes have the same name")
        if self.authorization is not None:
            addresses.split(self.authorization, "authorization")


class BrokerSettings(Settings, frozen=True, kw_only=True):
    """The MQTT broker: a mosquitto that the server runs, or a RabbitMQ cluster that others run."""

    kind: Literal["mosquitto", "rabbitmq"] = "mosquitto"
    """Which of them. With `rabbitmq` only `rabbitmq` and `max_packet_bytes` count here, and `public.broker` is required."""
    rabbitmq: RabbitSettings = RabbitSettings()
    """The cluster, see below."""
    listen: str = "0.0.0.0"  # noqa: S104 - devices and operators come from elsewhere
    """The address of this machine that devices connect to; 0.0.0.0 is every IPv4 address it has, `::` every one, IPv6 and IPv4."""
    port: int = 8883
    """The TCP port (MQTT over TLS). Devices are told it, unless `public.broker` or `shared_port` says otherwise."""
    max_packet_bytes: int = 1024 * 1024
    """The largest message that may be sent, in bytes; whoever sends a larger one is disconnected."""
    max_queued_messages: int = 400_000
    """How many messages the broker keeps for one client that does not take them; further ones are dropped. Less than 400000 counts as
    that: it is what the server's own queue needs while a device floods.
    """
    max_connections: int = -1
    """How many clients may be connected at once; -1 is as many as the broker has descriptors for."""
    memory_bytes: int = 1024**3
    """How much memory the broker may have before the server pauses the device that was sent the most lately: one that asks for files
    and reads nothing.
    """
    mosquitto: str | None = None
    """The broker's executable; without it `mosquitto` is looked for in PATH and where distributions put it."""
    dynamic_security: str | None = None
    """mosquitto's plug-in that shuts single devices out of the running broker; without this setting `mosquitto_dynamic_security.so`
    is looked for where distributions put it; `""` is to do without.
    """

    def __post_init__(self) -> None:
        if self.kind == "rabbitmq" and not self.rabbitmq.nodes:
            raise ValueError("kind: rabbitmq needs rabbitmq.nodes: the name, amqp and mqtt address of each node")


HealthTestName = Literal["errors", "unusable", "latency", "classes", "confidence", "agreement"]


class HealthSettings(Settings, frozen=True, kw_only=True):
    """When the health of devices stops a rollout. A test asks whether devices do worse with the release than each of them did before;
    docs/how-to/health-gates.md has what they are.
    """

    abort: tuple[HealthTestName, ...] = ("errors", "unusable", "latency")
    """The tests that take everybody back when they find something."""
    pause: tuple[HealthTestName, ...] = ("classes", "confidence", "agreement")
    """Those that pause the rollout, for a person to look. A test that is in neither is not made."""
    confidence: float = 0.99
    """How sure all tests together must be: of rollouts of good releases, 1 % are stopped falsely at 0.99, however long they take."""
    latency_ratio: float = 1.1
    """How much slower than before the median request of a device may be. More devices than half must be beyond it."""
    error_ratio: float = 1.2
    """How much more frequent than before errors may be, and answers that are no numbers."""
    drift: float = 0.1
    """Which share of a device's answers may be of other classes than before, beyond what changes on it from day to day."""
    disagreement: float = 0.1
    """In mode shadow: which share of a device's compared answers may differ."""
    requests: int = 200
    """How many requests a device must have answered, with the release and before, for its latency to count."""
    rows: int = 200
    """How many of its answers must have been looked at, for its classes, confidence and agreement to count."""
    errors_of: int = 1000
    """How many requests it must have had for its errors to count."""
    patience_s: float = 3600.0
    """After so many seconds of work with the release a tenth of these numbers is enough."""
    devices: int = 3
    """From how many devices on something can be found."""
    require: bool = False
    """Whether a wave waits until as many devices have shown how they do with the release. Devices that tell nothing hold it then."""

    def __post_init__(self) -> None:
        if len({*self.abort, *self.pause}) < len(self.abort) + len(self.pause):
            raise ValueError("a test stands once in abort or once in pause")
        if not (0.5 <= self.confidence < 1 and 1 <= self.latency_ratio <= 100 and 1 <= self.error_ratio <= 100):
            raise ValueError("confidence must be from 0.5 to below 1, latency_ratio and error_ratio from 1 to 100")
        if not (0 <= self.drift < 1 and 0 <= self.disagreement < 1):
            raise ValueError("drift and disagreement must be from 0 to below 1")
        if min(self.requests, self.rows, self.errors_of, self.devices) < 1 or not self.patience_s >= 0:
            raise ValueError("requests, rows, errors_of and devices must be at least 1, patience_s not negative")


class TelemetrySettings(Settings, frozen=True, kw_only=True):
    """What is kept of what devices tell about how their models do."""

    max_age_s: float = DAY_S
    """Telemetry that a device could not deliver for longer is dropped: no rollout is judged by what is that old."""
    window_s: float = DAY_S
    """How long one of the two windows is that a device's past is made of: the present one and the one before. Whole days have the same
    hours in them.
    """
    minutes_kept_s: float = 6 * 3600.0
    """How long figures of five minutes are kept."""
    hours_kept_s: float = 14 * DAY_S
    """How long those of an hour."""
    days_kept_s: float = 400 * DAY_S
    """And those of a day."""

    def __post_init__(self) -> None:
        if self.max_age_s < 60 or self.window_s < 1:
            raise ValueError("max_age_s must be at least 60, window_s at least 1")
        if min(self.minutes_kept_s, self.hours_kept_s, self.days_kept_s) < 0:
            raise ValueError("minutes_kept_s, hours_kept_s and days_kept_s must not be negative; 0 keeps none")
