"""`edge-agent doctor`: what an update needs, checked one by one, each with what to do when it is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from agent import config as configs
from agent.config import AgentConfig, ConfigError
from agent.contract import enrolment
from agent.contract.addresses import check_url, join
from agent.host import clock as clocks
from agent.host.clock import LastKnownGood, SignedClock, SystemClock
from agent.store import Store, StoreError
from agent.sync import identity, refusals
from agent.sync.fleet import takeovers
from agent.sync.fleet.connecting import Connector, NoBroker
from agent.sync.http import HttpStatus
from agent.sync.identity import Identity, IdentityError
from agent.sync.operator import sources
from agent.sync.operator.findings import Finding
from agent.sync.ports import Clock
from agent.sync.problems import Problem
from agent.sync.proxy import ProxyFailed, Way, ignored
from agent.sync.serving import ServeAway, ServeClient, ServeRefused

DEADLINE_S = 15.0
WARN_CERTIFICATE_DAYS = 30
AHEAD_WARN_S = 8 * 86400.0
"""A fleet server signs the time at least every half day, and nothing online is good for longer than a week."""


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
        yield from sources.examine(config, None, clock, unset=lambda: False)
        return
    yield _identity(config, who, clock)
    signed = SignedClock(clock, LastKnownGood(config.store / "sync" / "trust" / "clock.json", floor=who.not_before))
    yield certificate(who, signed)
    yield machine_clock(clock, signed)
    connector = Connector(who, signed, Way.configured(config.sync))
    yield _addresses(who)
    if (proxy := _proxy(connector.way, who)) is not None:
        yield proxy
    yield _guarded("fleet server", who, lambda: _fleet(who, connector, clock))
    broker = _guarded("broker", who, lambda: _broker(who, connector))
    yield broker
    yield from sources.examine(config, who, signed, unset=signed.unset)
    yield sources.over_the_broker(config.sync, broker)


def _identity(config: AgentConfig, who: Identity, clock: Clock) -> Finding:
    name, message = "identity", f"device {who.device!r} of fleet {who.address.fleet!r}"
    try:
        shared = takeovers.finding(config.store / "sync", clock.wall())
    except OSError as error:
        advice = "ask as the user of `edge-agent sync`: sudo -u edge-agent-sync edge-agent doctor"
        return Finding(name, "warning", f"{message}; whether another device has it too cannot be read: {error}", advice)
    if shared is not None:
        return Finding(name, "failed", f"{message}: {shared}", "how cards are copied: docs/how-to/image-many-devices.md")
    return Finding(name, "ok", message)


def _guarded(name: str, who: Identity, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except HttpStatus as error:
        refusal = refusals.of_status(error.status, error.code)
        if refusal is None:
            advice = f"it is reached, and answers {error.status}: look at the fleet server's log"
            return Finding(name, "failed", str(error), advice)
        return Finding(name, "failed", f"{refusal.says} ({error})", refusal.advice.format(device=who.device))
    except (Problem, OSError) as error:
        refusal = refusals.of_tls(str(error))
        if refusal is None:
            return Finding(name, "failed", str(error), refusals.CHECK_NETWORK)
        text = str(error) if refusal.says in str(error) else f"{refusal.says} ({error})"
        return Finding(name, "failed", text, refusal.advice.format(device=who.device))


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
        return Finding("serve", "failed", str(error), "start `edge-agent serve` (systemctl start edge-agent)")
    except ServeRefused as error:
        return Finding("serve", "failed", str(error), "the user of sync needs the access class `control` in serve.access")
    serving = [f"{name}:{model.active}" for name, model in sorted(status.models.items()) if model.serving]
    silent = sorted(name for name, model in status.models.items() if not model.serving)
    if silent:
        return Finding("serve", "warning", f"not served: {', '.join(silent)}", "see `edge-agent status` for the reason")
    return Finding("serve", "ok", f"serves {', '.join(serving) or 'no model yet'}")


def certificate(who: Identity, clock: Clock) -> Finding:
    """How long the device's certificate is still good for."""
    try:
        who.certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(who.ca_file.read_bytes()))
    except (ValueError, TypeError, InvalidSignature):
        message = "certificate.pem was not issued by ca.pem: they are of two fleets, or of two enrolments"
        return Finding("certificate", "failed", message, refusals.ENROL_AGAIN)
    days = (who.not_after - clock.wall()) / 86400
    message = f"valid until {clocks.text(who.not_after)} ({days:.0f} days)"
    if days <= 0:
        advice = refusals.ALLOW_RENEWAL.format(device=who.device)
        return Finding("certificate", "failed", f"it ended at {clocks.text(who.not_after)}", advice)
    if clock.wall() < who.not_before:
        began = clocks.text(who.not_before)
        return Finding("certificate", "failed", f"it is good from {began} on: the clock is behind", refusals.SET_CLOCK)
    if days < WARN_CERTIFICATE_DAYS:
        return Finding(
            "certificate", "warning", message, "it is renewed by itself when the fleet server or its broker can be reached"
        )
    return Finding("certificate", "ok", message)


def machine_clock(machine: Clock, signed: SignedClock) -> Finding:
    """Whether the machine's clock can be right, by what was signed."""
    now = machine.wall()
    if signed.unset():
        return Finding(
            "clock",
            "warning",
            f"it says {clocks.text(now)}, but it was {clocks.text(signed.known)} already; updates go by the signed time",
            "set it (NTP, timedatectl): maintenance windows and certificates need the right time",
        )
    if now - signed.known > AHEAD_WARN_S:
        return Finding(
            "clock",
            "warning",
            f"it says {clocks.text(now)}, and the last signed time is {clocks.text(signed.known)}: either this device was away for that "
            "long, or the clock is ahead and everything that is signed seems expired",
            "compare it with a watch; if it is ahead, set it (NTP, timedatectl)",
        )
    return Finding("clock", "ok", clocks.text(now))


def _addresses(who: Identity) -> Finding:
    """Where this device goes, since when, and where the fleet says that it should."""
    used, since = who.known.used, who.known.used_since or who.address.enrolled
    message = f"{used.device_url}, broker {used.broker}" + (f", since {clocks.text(since)}" if since else "")
    if (awaited := who.known.awaited) is not None:
        return Finding(
            "addresses",
            "warning",
            f"{message}; the fleet server says that it is at {awaited.device_url}, broker {awaited.broker}, and has not answered there yet",
            "see whether this device reaches that address; until it answers there, the present one is used",
        )
    return Finding("addresses", "ok", message)


def _proxy(way: Way, who: Identity) -> Finding | None:
    """Whether the proxy that agent.yaml names leads to the fleet server; None where there is none."""
    if not way.proxy:
        if not (found := ignored()):
            return None
        advice = "if this device needs it, write sync.proxy into agent.yaml"
        return Finding("proxy", "ok", f"none; {found} is set here, and `edge-agent sync` does not obey it", advice)
    places = (check_url(who.known.used.device_url), (who.known.used.broker_host, who.known.used.broker_port))
    passed = [join(host, port) for host, port in dict.fromkeys(places) if way.proxy_for(host)]
    if not passed:
        return Finding("proxy", "ok", f"{way.proxy}, and sync.proxy_except has the fleet server reached without it")
    try:
        for host, port in dict.fromkeys(places):
            way.connect(host, port).close()
    except ProxyFailed as error:
        return Finding("proxy", "failed", str(error), "without it this device does not reach its fleet server")
    except OSError:
        pass  # what is reached directly has a check of its own
    if (path := way.credentials) is not None and path.stat().st_mode & 0o077:
        advice = f"chmod 600 {path}, and give it to the user of `edge-agent sync`"
        return Finding("proxy", "warning", f"{way.proxy} works; others than its owner may read or change {path}", advice)
    return Finding("proxy", "ok", f"{way.proxy} connects to {' and '.join(passed)}")


def _fleet(who: Identity, connector: Connector, machine: Clock) -> Finding:
    device_url = who.known.used.device_url
    http = connector.http(device_url)
    try:
        http.get(http.url(enrolment.RECORD_PATH), limit_bytes=1 << 20, deadline_s=DEADLINE_S)
    finally:
        http.close()
    server = http.server_time
    if server is not None and abs(machine.wall() - server) > clocks.STEP_BACK_S:
        return Finding(
            "fleet server",
            "warning",
            f"{device_url} knows this device; its clock says {clocks.text(server)}, this one {clocks.text(machine.wall())}",
            "set the clock that is wrong (NTP, timedatectl)",
        )
    return Finding("fleet server", "ok", f"{device_url} knows this device")


def _broker(who: Identity, connector: Connector) -> Finding:
    used = who.known.used
    try:
        version = connector.greet_broker(used.broker_host, used.broker_port)
    except NoBroker as error:
        return Finding(
            "broker",
            "failed",
            str(error),
            "look at the broker's log: it may not take this device's certificate, or be something else",
        )
    return Finding("broker", "ok", f"{used.broker} answers ({version})")
