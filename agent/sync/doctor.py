"""`edge-agent doctor`: what an update needs, checked one by one, each with what to do when it is not there."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from agent import config as configs
from agent.config import AgentConfig, ConfigError
from agent.contract import enrolment
from agent.host import clock as clocks
from agent.host.clock import LastKnownGood, SystemClock
from agent.store import Store, StoreError
from agent.sync import identity, link
from agent.sync.http import FleetHttp
from agent.sync.identity import Identity, IdentityError
from agent.sync.ports import Clock
from agent.sync.problems import Problem
from agent.sync.serving import ServeAway, ServeClient, ServeRefused

DEADLINE_S = 15.0
WARN_CERTIFICATE_DAYS = 30

Level = Literal["ok", "warning", "failed", "skipped"]


class Finding(msgspec.Struct, frozen=True):
    """One check. `advice` says what to do about it; empty when all is well."""

    name: str
    level: Level
    message: str
    advice: str = ""


def examine(config_path: Path | None, clock: Clock | None = None) -> Iterator[Finding]:
    """Every check in order; what depends on a failed one is skipped. Changes nothing."""
    clock = clock or SystemClock()
    try:
        config = configs.load(config_path)
    except ConfigError as error:
        yield Finding("configuration", "failed", str(error), "correct the file; every other check needs it")
        return
    yield Finding("configuration", "ok", str(config_path or configs.DEFAULT_PATH))
    yield _store(config)
    yield _disk(config)
    yield _serve(config)
    try:
        who = identity.load(config.sync.identity)
    except IdentityError as error:
        yield Finding("identity", "failed", str(error), "ask the operator of the fleet for an enrolment string")
        for name in ("certificate", "clock", "fleet server", "broker"):
            yield Finding(name, "skipped", "needs an identity")
        return
    yield Finding("identity", "ok", f"device {who.device!r} of fleet {who.address.fleet!r}")
    yield certificate(who, clock)
    yield _clock(config, who, clock)
    yield _guarded("fleet server", lambda: _fleet(who, clock))
    yield _guarded("broker", lambda: _broker(who))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (Problem, OSError) as error:
        return Finding(name, "failed", str(error), "check the network, the firewall, and that the fleet server runs")


def _store(config: AgentConfig) -> Finding:
    try:
        Store(config.store).check_format()
        names = sorted(Store(config.store).selections())
    except (StoreError, OSError) as error:
        return Finding("store", "failed", str(error), "start `edge-agent sync` once; check the owner of the folder")
    return Finding("store", "ok", f"{config.store}: {len(names)} models selected")


def _disk(config: AgentConfig) -> Finding:
    folder = next((path for path in (config.store, *config.store.parents) if path.exists()), Path("/"))
    free, reserve = shutil.disk_usage(folder).free, config.sync.disk_reserve_bytes
    message = f"{free // 2**20} MiB free on the disk of {folder}, {reserve // 2**20} MiB are kept in reserve"
    if free <= reserve:
        return Finding("disk", "failed", message, "free some space, or lower sync.disk_reserve_bytes")
    return Finding("disk", "ok", message)


def _serve(config: AgentConfig) -> Finding:
    try:
        status = ServeClient(config.serve.socket).status()
    except ServeAway as error:
        return Finding("serve", "failed", str(error), "start `edge-agent serve` (systemctl start edge-agent-serve)")
    except ServeRefused as error:
        return Finding("serve", "failed", str(error), "the user of sync needs the access class `control` in serve.access")
    serving = [f"{name}:{model.active}" for name, model in sorted(status.models.items()) if model.serving]
    silent = sorted(name for name, model in status.models.items() if not model.serving)
    if silent:
        return Finding("serve", "warning", f"not served: {', '.join(silent)}", "see `edge-agent status` for the reason")
    return Finding("serve", "ok", f"serves {', '.join(serving) or 'no model yet'}")


def certificate(who: Identity, clock: Clock) -> Finding:
    """How long the device's certificate is still good for."""
    days = (who.not_after - clock.wall()) / 86400
    message = f"valid until {clocks.text(who.not_after)} ({days:.0f} days)"
    if days <= 0:
        return Finding("certificate", "failed", f"it ended at {clocks.text(who.not_after)}", "enrol again with --force")
    if days < WARN_CERTIFICATE_DAYS:
        return Finding("certificate", "warning", message, "it is renewed by itself when the fleet server can be reached")
    return Finding("certificate", "ok", message)


def _clock(config: AgentConfig, who: Identity, clock: Clock) -> Finding:
    known = LastKnownGood(config.store / "sync" / "trust" / "clock.json", floor=who.not_before)
    now = clock.wall()
    if known.believable(now):
        return Finding("clock", "ok", clocks.text(now))
    return Finding(
        "clock",
        "failed",
        f"it says {clocks.text(now)}, but it was {clocks.text(known.time)} already",
        "set it (NTP, timedatectl)",
    )


def _fleet(who: Identity, clock: Clock) -> Finding:
    http = FleetHttp(who.address.device_url, clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file)
    try:
        http.get(http.url(enrolment.RECORD_PATH), limit_bytes=1 << 20, deadline_s=DEADLINE_S)
    finally:
        http.close()
    return Finding("fleet server", "ok", f"{who.address.device_url} knows this device")


def _broker(who: Identity) -> Finding:
    address = (who.address.broker_host, who.address.broker_port)
    context = link.tls_context(str(who.ca_file), str(who.certificate_file), str(who.key_file))
    with (
        socket.create_connection(address, timeout=DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as secured,
    ):
        version = secured.version() or "TLS"
    return Finding("broker", "ok", f"{address[0]}:{address[1]} ({version})")
