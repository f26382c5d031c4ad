"""fleet.yaml → a frozen FleetConfig, and where everything stands below the data folder."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from agent.contract import addresses, names
from agent.contract.codec import convert
from fleet_server.sections import (
    DAY_S,
    BrokerSettings,
    DecideSettings,
    HealthSettings,
    RolloutSettings,
    Settings,
    TelemetrySettings,
)

FILE_NAME = "fleet.yaml"


RENAMED = {"rollouts.class_stop": "rollouts.exclude_after", "rollouts.class_stop_share": "rollouts.exclude_share"}
"""Settings that were called otherwise → what they are called now."""


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file and the setting."""


class ExpirySettings(Settings, frozen=True, kw_only=True):
    """How long signed metadata is believed. Online metadata is renewed when less than half is left: it is the bound of a
    freeze.
    """

    assignments_s: float = 7 * DAY_S
    """Seconds for which a signed assignment (what the fleet should run) is believed."""
    snapshot_s: float = 7 * DAY_S
    """Seconds for which the signed list of current metadata is believed."""
    timestamp_s: float = 1 * DAY_S
    """Seconds for which the newest signature is believed: a device that is shown old metadata notices after at most this long.
    """
    record_s: float = 30 * DAY_S
    """Seconds for which a device's signed record (its groups and labels) is believed."""
    device_certificate_s: float = 365 * DAY_S
    """Seconds for which a device's certificate is good; devices renew theirs before it ends."""

    def __post_init__(self) -> None:
        if min(self.assignments_s, self.snapshot_s, self.timestamp_s, self.record_s, self.device_certificate_s) < 60:
            raise ValueError("nothing may expire within less than 60 seconds")


class ConnectionSettings(Settings, frozen=True, kw_only=True):
    """How many HTTPS connections there may be at once. A listener that is full ends the connection that has been silent longest,
    of whoever holds most. All together need as many open files as there are connections (`LimitNOFILE` of the unit).
    """

    devices: int = 1000
    """Of the devices' listener."""
    operators: int = 200
    """Of the operators' listener: the page, the command line, enrolment."""
    loopback: int = 100
    """Of the plain listener for this machine, where a reverse proxy holds them."""
    per_device: int = 16
    """Of one device, known by its certificate: it needs one or two."""
    devices_per_address: int = 500
    """At the devices' listener, of one address (an IPv6 network of 64 bits) whose certificates are not known yet. Raise it when
    more devices than that connect at the same moment from behind one NAT.
    """
    operators_per_address: int = 100
    """At the operators' listener, of one address. Raise it when many operators, or many devices that enrol, come from one."""

    def __post_init__(self) -> None:
        if min(msgspec.structs.astuple(self)) < 1:
            raise ValueError("every number of connections must be at least 1")
        if self.devices_per_address > self.devices or self.operators_per_address > self.operators:
            raise ValueError("an address cannot have more connections than its listener")


class KeepSettings(Settings, frozen=True, kw_only=True):
    """What is kept, and for how long. What is too old is removed at the start and every five minutes, a little at a time."""

    uploads_s: float = DAY_S
    """Seconds for which a file, or the part of one, is kept that no release names: an upload that broke off, or was never
    published.
    """
    upload_bytes: int = 64 * 1024**3
    """How many bytes of such files one access token may have here."""
    releases: int = 0
    """How many releases of each model keep their files, the newest; 0: all. What is assigned, in a rollout, served by a device or
    gone back to keeps them in any case.
    """
    audit_s: float = 730 * DAY_S
    """Seconds for which it is kept who changed what."""

    def __post_init__(self) -> None:
        if min(self.uploads_s, self.audit_s) < 60 or self.upload_bytes < 1 or self.releases < 0:
            raise ValueError(
                "uploads_s and audit_s must be at least 60 seconds, upload_bytes at least 1, releases not negative"
            )


class PublicSettings(Settings, frozen=True, kw_only=True):
    """What others are told, where that is not what the server listens on: behind NAT, a load balancer or a reverse proxy, or under
    another name. Each is HOST:PORT. Devices hear of a change by themselves, and follow it.
    """

    operators: str | None = None
    """Where operators find the page and the REST API; without it the first of `hosts` with `shared_port` or `operator_port`."""
    enrolment: str | None = None
    """Where devices enrol: what enrolment strings say. Whatever stands there must hand TLS through. Without it the first of `hosts`
    with `shared_port` or `operator_port`.
    """
    devices: str | None = None
    """Where devices fetch; TLS must be handed through. Without it the first of `hosts` with `shared_port` or `device_port`."""
    broker: str | None = None
    """Where devices find the broker; TLS must be handed through. Without it the first of `hosts` with `shared_port` or `broker.port`."""

    def __post_init__(self) -> None:
        for name, value in msgspec.structs.asdict(self).items():
            if value is not None:
                addresses.split(value, f"public.{name}")


class BlobSettings(Settings, frozen=True, kw_only=True):
    """Where files of releases are kept, and from where devices fetch them."""

    store: str | None = None
    """An object store instead of the folder `blobs`: `s3://BUCKET/PREFIX`, `gs://…`, `az://…`. Who may use it stands in the
    environment, as the provider's tools have it (`AWS_ACCESS_KEY_ID`, …).
    """
    options: dict[str, str] = {}
    """Of the store, as obstore names them, such as `endpoint` and `region` of one that speaks S3."""
    allow_http: bool = False
    """Whether the store may be asked without TLS."""
    hand_out: Literal["through", "signed", "public"] = "through"
    """`through`: devices fetch files from this server, which fetches them from the store. `signed`: the server sends devices to the store
    with a URL that ends. `public`: to `public_url`. Agents of before this setting know `through` only.
    """
    signed_s: float = 3600.0
    """Seconds for which a signed URL is good."""
    public_url: str | None = None
    """Where everybody may fetch the files by their hash, such as a CDN before the store: `https://cdn.example.com/models`."""

    def __post_init__(self) -> None:
        if self.hand_out != "through" and self.store is None and self.public_url is None:
            raise ValueError(f"hand_out: {self.hand_out} needs store or public_url")
        if (self.hand_out == "public") is not (self.public_url is not None):
            raise ValueError("hand_out: public and public_url need each other")
        if self.public_url is not None and not self.public_url.startswith("https://"):
            raise ValueError("public_url must begin with https://")
        if not 60 <= self.signed_s <= 7 * DAY_S:
            raise ValueError("signed_s must be from 60 seconds to 7 days")


class FleetConfig(Settings, frozen=True, kw_only=True):
    """Everything the server can be told in fleet.yaml."""

    fleet: str
    """The fleet's name. Devices remember it and refuse what is signed for another."""
    hosts: tuple[str, ...]
    """Names and addresses that devices and operators reach this server by; the first one is what they are told."""
    listen: str = "0.0.0.0"  # noqa: S104 - devices and operators come from elsewhere
    """The address of this machine that the HTTPS listeners use; 0.0.0.0 is every IPv4 address it has, `::` every one, IPv6 and IPv4."""
    operator_port: int = 8443
    """The TCP port of the page, the REST API and enrolment (HTTPS)."""
    device_port: int = 8444
    """The TCP port where enrolled devices fetch metadata and files (HTTPS with client certificates)."""
    shared_port: int | None = None
    """A TCP port where all of it is reached, page, enrolment, devices and broker, for networks that let nothing but port 443 out.
    Without it there is none. Agents that know nothing of it are told the ports of their own.
    """
    public: PublicSettings = PublicSettings()
    """What others are told instead of that, see below."""
    loopback_port: int | None = None
    """A TCP port for plain HTTP from this machine only (a local browser, a reverse proxy); without it there is none."""
    loopback_address: str = "127.0.0.1"
    """Where the plain HTTP listener is: 127.0.0.1 or ::1, nothing else."""
    trusted_proxies: tuple[str, ...] = ("127.0.0.1", "::1")
    """Addresses or networks of reverse proxies before the operators' listeners. What only they may say is believed: who the
    client is (`X-Forwarded-For`), and that it came over HTTPS (`X-Forwarded-Proto`), which makes cookies `Secure`.
    """
    broker: BrokerSettings = BrokerSettings()
    """The MQTT broker, see below."""
    expiry: ExpirySettings = ExpirySettings()
    """How long what is signed is believed, see below."""
    rollouts: RolloutSettings = RolloutSettings()
    """How rollouts are judged, see below."""
    health: HealthSettings = HealthSettings()
    """When the devices' health stops a rollout, see below."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """What is kept of what devices tell about how their models do, see below."""
    connections: ConnectionSettings = ConnectionSettings()
    """How many HTTPS connections there may be, see below."""
    keep: KeepSettings = KeepSettings()
    """What is kept, and for how long, see below."""
    blobs: BlobSettings = BlobSettings()
    """Where files of releases are kept, see below."""
    decide: DecideSettings = DecideSettings()
    """Where the process that decides is reached, in a server of several processes, see below."""
    database_url: str | None = None
    """Where the database is: `postgresql://USER@HOST/NAME`, and the password in `~/.pgpass`; without it SQLite in the data folder."""
    looks_per_s: float = 50.0
    """How many devices a second ask this server at most because of one poke: those that must ask spread over the time that this
    makes of their number."""
    events_kept: int = 100_000
    """How many events are kept; older ones are deleted, within five minutes, or sooner while events come."""
    session_s: float = 12 * 3600.0
    """Seconds after which a browser must sign in again."""

    def __post_init__(self) -> None:
        names.check(names.GROUP_NAME, self.fleet, "fleet")
        if self.looks_per_s <= 0:
            raise ValueError("looks_per_s must be above 0")
        if not self.hosts:
            raise ValueError("hosts must name at least one host")
        for host in self.hosts:
            addresses.check_host(host, "a host")
        ports = [self.operator_port, self.device_port, self.broker.port, self.shared_port, self.loopback_port]
        if not all(port is None or 0 < port < 65536 for port in ports):
            raise ValueError("a port is a number from 1 to 65535")
        if self.broker.kind == "rabbitmq" and (self.public.broker is None or self.shared_port is not None):
            raise ValueError(
                "broker.kind: rabbitmq needs public.broker, the HOST:PORT at which devices find the cluster, and no shared_port, which "
                "leads to the server's own broker only"
            )
        for proxy in self.trusted_proxies:
            ipaddress.ip_network(proxy)  # says what it does not like of it
        if not is_loopback(self.loopback_address):
            raise ValueError(
                f"loopback_address {self.loopback_address!r} must be 127.0.0.1 or ::1: that listener is not encrypted; "
                "use the operator listener from other machines"
            )

    @property
    def host(self) -> str:
        return self.hosts[0]

    @property
    def operator_url(self) -> str:
        """Where operators are told to go."""
        return f"https://{self.public.operators or self._told(self.operator_port)}"

    @property
    def enrolment(self) -> str:
        """HOST:PORT where devices enrol."""
        return self.public.enrolment or self._told(self.operator_port)

    @property
    def device_url(self) -> str:
        """Where devices are told to fetch."""
        return f"https://{self.public.devices or self._told(self.device_port)}"

    @property
    def broker_address(self) -> str:
        """HOST:PORT where devices are told the broker is."""
        return self.public.broker or self._told(self.broker.port)

    def _told(self, port: int) -> str:
        return addresses.join(self.host, self.shared_port or port)

    @property
    def unshared_device_url(self) -> str:
        """What a device is told that cannot use `shared_port`."""
        return f"https://{self.public.devices or addresses.join(self.host, self.device_port)}"

    @property
    def unshared_broker(self) -> str:
        """HOST:PORT, what a device is told that cannot use `shared_port`."""
        return self.public.broker or addresses.join(self.host, self.broker.port)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Every name and address by which somebody reaches this server: what its certificate must say."""
        public = (*msgspec.structs.astuple(self.public), self.broker.rabbitmq.authorization)
        told = (addresses.split(one)[0] for one in public if one is not None)
        listened = (one for one in (self.listen, self.broker.listen) if not is_wildcard(one))
        return tuple(dict.fromkeys(_as_certified(one) for one in (*self.hosts, *told, *listened)))

    @property
    def authorization(self) -> str:
        """HOST:PORT where the nodes of a RabbitMQ cluster ask who may do what."""
        asked = self.broker.rabbitmq
        here = self.host if is_wildcard(asked.authorization_listen) else asked.authorization_listen
        return asked.authorization or addresses.join(here, asked.authorization_port)

    @property
    def broker_here(self) -> str:
        """The address by which this machine itself reaches the broker."""
        return "127.0.0.1" if is_wildcard(self.broker.listen) else self.broker.listen


def _as_certified(host: str) -> str:
    """As a certificate says it: there is one way to write an IPv6 address in it."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def is_wildcard(address: str) -> bool:
    """Whether who listens there listens on every address of the machine."""
    return address in {"0.0.0.0", "::", ""}  # noqa: S104 - recognising it, not binding it


def is_loopback(address: str) -> bool:
    try:
        return str(ipaddress.ip_address(address)) in {"127.0.0.1", "::1"}
    except ValueError:
        return False


class Folder:
    """Where everything stands below the data folder. Paths only: nothing here touches the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / FILE_NAME
        self.lock = root / "server.lock"
        self.database = root / "database.sqlite3"
        self.pki = root / "pki"
        self.keys = root / "keys"
        self.repository = root / "repository"
        self.metadata = self.repository / "metadata"
        self.targets = self.repository / "targets"
        self.blobs = root / "blobs"
        self.uploads = root / "uploads"
        self.broker = root / "broker"

    def database_url(self, config: FleetConfig) -> str:
        return config.database_url or f"sqlite:///{self.database.absolute()}"

    def directories(self) -> tuple[tuple[Path, int], ...]:
        """Every folder with its mode, in the order to make them. Private keys stand only in `keys`, `pki` and `broker`."""
        return (
            (self.root, 0o750), (self.pki, 0o700), (self.keys, 0o700), (self.metadata, 0o755), (self.targets, 0o755),
            (self.blobs, 0o755), (self.uploads, 0o700), (self.broker, 0o700),
        )  # fmt: skip


def load(folder: Folder) -> FleetConfig:
    """The configuration of a data folder.  Raises: ConfigError that says what is wrong or that the folder was never made."""
    try:
        raw = yaml.safe_load(folder.config.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder.config} does not exist; make the data folder with `edge-fleet init {folder.root}`"
        ) from None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder.config} cannot be read: {error}") from error
    for former, present in RENAMED.items():
        section, _, key = former.partition(".")
        if isinstance(raw, dict) and isinstance(raw.get(section), dict) and key in raw[section]:
            raise ConfigError(f"{folder.config}: {former} is called {present} now; rename it there")
    try:
        return convert(raw or {}, FleetConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{folder.config}: {error}") from error


def dump(config: FleetConfig) -> bytes:
    """The fleet.yaml of `config`, every setting written out so that it can be seen and changed."""
    body = yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)
    return ("# Settings of edge-fleet. Restart the server after a change.\n" + body).encode()
