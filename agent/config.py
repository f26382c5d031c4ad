"""agent.yaml → a frozen AgentConfig. Every setting is checked at start, and a wrong one says where it stands and what would be right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from agent.contract.assignment import parse_window
from agent.contract.telemetry import MAX_SECONDS

DEFAULT_PATH = Path("/etc/edge-agent/agent.yaml")

_HOURS = re.compile(r"(?!(\d\d:\d\d)-\1)([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d")
_ADDRESS = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")
_PROXY = re.compile(r"http://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}/?")

RENAMED: Mapping[str, str] = {
    "sync.peers": "sync.neighbours",
    "sync.peer_listen": "sync.neighbour_listen",
    "sync.peer_limit_bytes_per_s": "sync.neighbour_limit_bytes_per_s",
}
"""Settings that had another name in version 0.1.0, and what they are called now."""

AccessClass = Literal["predict", "observe", "control"]


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file and the setting."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: frozen, and a misspelt setting is an error."""


class AccessRule(Settings, frozen=True, kw_only=True):
    """Who gets a class of access. A peer matches by its uid or by any of its groups. `models` restricts predict to the named models."""

    allow: AccessClass
    """predict: infer and metadata of the models named; observe: all metadata, statistics, metrics; control: load, activate, roll back."""
    uids: tuple[int | str, ...] = ()
    """User ids or names."""
    gids: tuple[int | str, ...] = ()
    """Group ids or names."""
    models: tuple[str, ...] = ()
    """Empty: every model."""


class ServeSettings(Settings, frozen=True, kw_only=True):
    """The prediction server. A larger class includes the smaller: control > observe > predict."""

    socket: Path = Path("/run/edge-agent/agent.sock")
    """Where apps connect. Under systemd the socket unit decides; keep the two the same, `sync` and the tools look here."""
    socket_mode: int = 0o666
    """Who may connect at all, when `serve` makes the socket itself; what a peer may do is decided by `access`. YAML reads 0o660."""
    access: tuple[AccessRule, ...] = ()
    """What particular users and groups may do. Root and the user that runs `serve` have control without a rule."""
    everyone: AccessClass | Literal["none"] = "observe"
    """What a peer may do that no rule matches."""
    http_listen: str = ""
    """A port on the loopback besides, such as 127.0.0.1:8000, for clients that know no Unix sockets. Empty: none."""
    http_access: AccessClass = "observe"
    """What whoever connects to that port may do: nothing vouches for who it is."""
    http_origins: tuple[str, ...] = ()
    """Web pages that may ask there from a browser, such as http://localhost:3000. Others are refused."""
    grpc_socket: Path | None = None
    """Where gRPC clients connect; nothing listens when it is not set. Needs the `grpc` extra."""
    grpc_socket_mode: int = 0o660
    """Who may connect for gRPC: it hides which user that is, so all of them have `grpc_access`. YAML reads 0o660."""
    grpc_access: AccessClass = "observe"
    """What everyone on the gRPC socket may do."""
    grpc_streams: int = 64
    """Streams (ModelStreamInfer) open at once on the gRPC socket; one more is refused. Each keeps a thread of the server, and while it is read
    a request of it takes up to `max_body_bytes`."""
    grpc_ping_interval_s: float = 0.5
    """How often a gRPC client may ping (its `keepalive_time_ms`), with or without calls. One that does so more often is disconnected
    with "too_many_pings". 0: as often as it likes."""
    threads: int = 3
    """Threads that take turns at the socket: one listens, the others run what is long. 1 is taken as 2. More help when many slow models run at once. A run of more than 5 ms gives way to shorter ones, where the limit `nice` allows it (`ulimit -e 20`; the unit sets it)."""
    engine_threads: int = 1
    """Threads that one run of a model may use. 0: the engine chooses."""
    load_timeout_s: float = 120.0
    """How long loading a model and its first run may take. What takes longer at a start is not served, and the others are; later the
    watchdog ends the process, and the next one tries that model apart."""
    run_timeout_s: float = 60.0
    """How long one run of a model with a process of its own may take; then that process is ended and started again."""
    max_body_bytes: int = 64 * 1024 * 1024
    """A request larger than this is refused with 413."""
    max_connections: int = 1024
    """Connections beyond this wait to be accepted."""
    max_queue_size: int = 1024
    """Predictions that wait for their run, of all models together; one more is refused with 503. A release bounds its model's own."""
    max_sequences: int = 64
    """Sequences that one version keeps state for at once."""
    sequence_idle_s: float = 60.0
    """A sequence without requests for this long ends."""
    memory_budget_bytes: int = 0
    """What models may take together. Beyond it those that were not used for longest are unloaded, and loaded again when they are asked
    for. 0: no budget."""
    pinned: tuple[str, ...] = ()
    """Models that are never unloaded for the budget."""
    min_residency_s: float = 10.0
    """A model stays at least this long, so that two which do not fit together cannot drive each other out in turns."""
    reload_timeout_s: float = 30.0
    """How long a request without a timeout of its own waits for a model that is being loaded again or replaced."""
    client_memory_bytes: int = 1024 * 1024 * 1024
    """What clients' memfds may add up to; one connection may share a quarter of it. 0: clients share no memfds."""
    access_log: str = ""
    """A line of JSON per request: `journal`, or a file. Empty: none."""
    traces: str = ""
    """Where OpenTelemetry's collector takes traces: http://127.0.0.1:4318/v1/traces, or unix:/path. Empty: none. Needs the `tracing` extra."""
    trace_ratio: float = 0.01
    """The share of requests that are traced, of those whose callers have not decided."""
    shared_memory: Literal["off", "owner"] = "off"
    """Triton's system shared memory extension. owner: a user may register POSIX shared memory that belongs to it."""

    output_sketches: bool = True
    """Whether what models answer is counted for the fleet: the best class, its confidence, values that are no numbers; of ten answers a
    second at most, and nothing of an answer is kept."""
    shadow_max_load: float = 0.9
    """Candidates run on copies of live requests only below this load of the machine: the load average of the last minute, per core. 0: it
    is not looked at."""
    shadow_max_celsius: float = 80.0
    """And only while the hottest thermal zone is below this. 0: it is not looked at."""

    def __post_init__(self) -> None:
        if self.shadow_max_load < 0 or self.shadow_max_celsius < 0:
            raise ValueError("shadow_max_load and shadow_max_celsius must not be negative")
        if self.grpc_streams < 1 or self.grpc_ping_interval_s < 0:
            raise ValueError("grpc_streams must be at least 1, grpc_ping_interval_s not negative")
        if self.threads < 1:
            raise ValueError("threads must be at least 1")
        if self.load_timeout_s <= 0 or self.run_timeout_s <= 0:
            raise ValueError("load_timeout_s and run_timeout_s must be above 0")
        if self.max_queue_size < 1 or self.max_sequences < 1 or self.sequence_idle_s <= 0:
            raise ValueError("max_queue_size and max_sequences must be at least 1, sequence_idle_s above 0")
        if not 0 <= self.trace_ratio <= 1:
            raise ValueError("trace_ratio must be from 0 to 1")
        if self.traces and not self.traces.startswith(("http://", "https://", "unix:/")):
            raise ValueError("traces must be an http address or unix:/path")
        if self.memory_budget_bytes < 0 or self.min_residency_s < 0 or self.reload_timeout_s <= 0:
            raise ValueError("memory_budget_bytes and min_residency_s must not be negative, reload_timeout_s above 0")
        if self.max_body_bytes < 1024:
            raise ValueError("max_body_bytes must be at least 1024")


class SyncSettings(Settings, frozen=True, kw_only=True):
    """The link to the fleet and the updates."""

    identity: Path = Path("/var/lib/edge-agent/identity")
    """The folder that `edge-agent enrol` writes: key, certificate, trusted root, addresses."""
    poll_interval_s: float = 900.0
    """How often to look for news when no poke comes, with jitter."""
    heartbeat_s: float = 60.0
    """How often to report when nothing changes. The fleet server takes three missed ones for silence."""
    telemetry_interval_s: float = 300.0
    """How often the fleet is told how models do here, in numbers: requests, failures, latency, classes, temperature. With the first report
    after so long. 0: never."""
    disk_reserve_bytes: int = 64 * 1024 * 1024
    """Space on the disk of the store that a download leaves free."""
    disk_quota_bytes: int = 0
    """What the store may take on the disk. A release that does not fit even when all that is not needed is deleted is not fetched. 0: no quota."""
    trial_memory_bytes: int = 2 * 1024 * 1024 * 1024
    """What a trial may use at most, whatever the release allows."""
    trial_timeout_s: float = 120.0
    """How long a trial may take at most, whatever the release allows."""
    download_min_bytes_per_s: int = 1024
    """A download slower than this, over a minute, is broken off and tried again later. Waiting for the limit below does not count."""
    bandwidth_limit_bytes_per_s: int = 0
    """What all downloads together may take from the network. 0: no limit."""
    transfer_window: str = ""
    """The hours for downloads, local time, such as 22:00-06:00; outside of them they rest. What is on this machine is used at any time.
    Empty: always."""
    mqtt_transfers: bool = True
    """Whether metadata and files come over the broker while the fleet server cannot be reached otherwise."""
    local_sources: tuple[Path, ...] = ()
    """Folders that may have bundles (`edge-fleet bundle`) or blobs, such as where sticks are mounted. They are asked before any network."""
    neighbours: tuple[str, ...] = ()
    """Neighbours that lend their blobs, ADDRESS:PORT each. They are asked before the fleet server, and nothing from them is believed unhashed."""
    neighbour_listen: str = ""
    """Where this device lends its own blobs to neighbours over plain HTTP, ADDRESS:PORT. Whoever knows the hash of a blob may read it there.
    Empty: nowhere."""
    neighbour_limit_bytes_per_s: int = 8 * 1024 * 1024
    """What neighbours together may take. 0: no limit."""
    mirrors: tuple[str, ...] = ()
    """Addresses (https://…) that serve the fleet's blobs below /blobs/: caches, a CDN. Whichever was of use last is asked first, the fleet
    server among them. They see no certificate of this device."""
    proxy: str = ""
    """The HTTP proxy (http://HOST:PORT) that is asked with CONNECT for the fleet server, its broker and mirrors. What HTTPS_PROXY says is
    not obeyed. Empty: none."""
    proxy_credentials: Path | None = None
    """A file with USER:PASSWORD for the proxy, which only the user of `sync` should be able to read."""
    proxy_except: tuple[str, ...] = ()
    """Hosts that are reached without the proxy, and with a dot before them whole domains, such as .example.org."""
    trial_socket: Path = Path("/run/edge-agent/trial.sock")
    """Where systemd starts trials. When it is not there, trials are children of `sync`."""
    windows: tuple[str, ...] = ()
    """When a new release may begin to serve here, in local time, such as `mon-fri 22:00-05:00`; a rollout's own window has to be open too.
    Empty: always. A rollback never waits."""
    approval: Literal["never", "always"] = "never"
    """always: a new release serves only after somebody here said so (`edge-agent approve`), whatever the release asks for."""
    watch_poll_s: float = 0.5
    """How often `serve` is asked about a release under watch."""
    keep_releases: int = 2
    """Committed releases kept for rollbacks, beside the active one and the one before it."""

    def __post_init__(self) -> None:
        if self.poll_interval_s <= 0 or self.heartbeat_s <= 0 or not 0 <= self.telemetry_interval_s <= MAX_SECONDS / 7:
            raise ValueError("poll_interval_s and heartbeat_s must be above 0, telemetry_interval_s from 0 to 86400")
        if self.watch_poll_s <= 0 or self.trial_timeout_s <= 0 or self.download_min_bytes_per_s < 1:
            raise ValueError("watch_poll_s, trial_timeout_s and download_min_bytes_per_s must be above 0")
        if self.disk_quota_bytes < 0 or self.bandwidth_limit_bytes_per_s < 0 or self.neighbour_limit_bytes_per_s < 0:
            raise ValueError(
                "disk_quota_bytes, bandwidth_limit_bytes_per_s and neighbour_limit_bytes_per_s must not be negative; 0 means none"
            )
        for address in (*self.neighbours, *([self.neighbour_listen] if self.neighbour_listen else [])):
            if not _ADDRESS.fullmatch(address):
                raise ValueError(f"{address!r} in neighbours or neighbour_listen must be ADDRESS:PORT, such as 192.0.2.7:8500")
        if self.proxy and not _PROXY.fullmatch(self.proxy):
            raise ValueError(
                f"proxy is {self.proxy!r}; expected http://HOST:PORT, with user and password in the file that proxy_credentials names"
            )
        if self.proxy_credentials is not None and not self.proxy:
            raise ValueError("proxy_credentials is of use only with a proxy")
        for url in self.mirrors:
            if not url.startswith("https://"):
                raise ValueError(f"{url!r} in mirrors must be an https:// address")
        if self.transfer_window and not _HOURS.fullmatch(self.transfer_window):
            raise ValueError(f"transfer_window is {self.transfer_window!r}; expected hours such as 22:00-06:00")
        for window in self.windows:
            parse_window(window)


class AgentConfig(Settings, frozen=True, kw_only=True):
    """Everything a device can be told in agent.yaml. Every setting has a default that serves."""

    store: Path = Path("/var/lib/edge-agent/store")
    """Blobs, releases and what is selected. `sync` writes it, `serve` reads it."""
    diary: Path | None = None
    """The folder where `serve` notes that it began and that it ended in order, for `sync` to tell a restart from a crash. Not set: `serve`
    beside the store."""
    serve: ServeSettings = ServeSettings()
    """The prediction server."""
    sync: SyncSettings = SyncSettings()
    """The link to the fleet and the updates."""

    @property
    def diary_folder(self) -> Path:
        return self.diary or self.store.parent / "serve"


def load(path: Path | None = None) -> AgentConfig:
    """The configuration in `path`; without one, DEFAULT_PATH when it is there, else the defaults.

    Raises: ConfigError.
    """
    if path is None:
        if not DEFAULT_PATH.exists():
            return AgentConfig()
        path = DEFAULT_PATH
    try:
        raw = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        if isinstance(raw, dict) and isinstance(raw.get(section), dict) and name in raw[section]:
            raise ConfigError(f"{path}: {old} is now called {new}: rename it")
    try:
        return msgspec.convert(raw or {}, AgentConfig, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error


def _decode(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind} from {value!r}")
