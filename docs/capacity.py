"""What a fleet of a given size needs: messages, bytes, processors, memory, rows, money. Arithmetic from stated inputs, nothing else.

python docs/capacity.py                                     the tables of docs/explanation/a-million-devices.md
python docs/capacity.py devices=250000 heartbeat_s=120      another fleet; any input can be given
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

KINDS = ("measured", "read", "assumed", "default")


class Input(NamedTuple):
    """A number that everything is computed from. `kind`: one of KINDS; `source`: how it was found, or why it was taken."""

    value: float
    unit: str
    kind: str
    source: str


INPUTS = {
    "devices": Input(100_000, "devices", "assumed", "how large the fleet is"),
    "heartbeat_s": Input(60, "s", "default", "`sync.heartbeat_s`: a device reports as often when nothing changes"),
    "poll_interval_s": Input(900, "s", "default", "`sync.poll_interval_s`: it looks as often when no poke comes"),
    "events_per_day": Input(5, "per device", "assumed", "updates, restarts, what people read"),
    "report_bytes": Input(1545, "bytes", "measured", "a signed report with one model and the hardware; 2 869 with three models"),
    "event_bytes": Input(593, "bytes", "measured", "a signed event"),
    "packet_bytes": Input(120, "bytes", "assumed", "TCP, IP, TLS and MQTT around a message, the topic included"),
    "look_bytes": Input(12_000, "bytes", "assumed", "a handshake and six answers of which most say 304"),
    "poke_bytes": Input(4_000, "bytes", "measured", "1 to 4 KB in the fleets of [the fleet link](../decisions/fleet-link.md)"),
    "stored_per_core_s": Input(4057, "reports", "measured", "`make bench-fleet`, 10 000 devices: what a second of the server's processor stores"),
    "verified_per_core_s": Input(9784, "reports", "measured", "[by change](../decisions/by-change.md): the signatures alone"),
    "look_ms": Input(5.5, "ms of a core", "measured", "[the fleet link](../decisions/fleet-link.md): a device that asks the server"),
    "rollout_ms": Input(3.8, "ms of a core", "measured", "`make bench-fleet`: the server's, for each device of a rollout"),
    "connect_ms": Input(2.2, "ms of a core", "measured", "`make bench-fleet`: the broker's, for each device that connects"),
    "mosquitto_kb": Input(28, "KB", "measured", "`make bench-fleet`: 284 MB with 10 000 devices connected"),
    "rabbitmq_kb": Input(320, "KB", "measured", "RabbitMQ 3.10.8, 2 000 TLS connections with three subscriptions each, beyond 92 MB of a node alone; 3.12 and newer need less (read)"),
    "per_node": Input(50_000, "connections", "assumed", "what one node of a RabbitMQ cluster is given, with one of three down"),
    "device_bytes": Input(3_640, "bytes", "measured", "of the database, for a device with certificate, record and a report of one model; 1 000 devices, SQLite"),
    "event_row_bytes": Input(240, "bytes", "measured", "of the database, for an event"),
    "events_kept": Input(100_000, "events", "default", "`events_kept`"),
    "model_bytes": Input(14_000_000, "bytes", "assumed", "a release, such as a MobileNet"),
    "changed_share": Input(0.1, "of the bytes", "assumed", "what differs from the release before"),
    "delta_factor": Input(1.05, "×", "measured", "[blocks](../decisions/blocks.md): what is fetched for each byte that changed"),
    "releases_per_month": Input(2, "releases", "assumed", "that every device gets"),
    "load": Input(0.5, "of a core", "assumed", "how busy a processor is to be when nothing happens"),
    "core_price": Input(25, "a month", "assumed", "a processor of a server"),
    "gb_price": Input(3, "a month", "assumed", "a GB of its memory"),
    "disk_price": Input(0.12, "a month", "assumed", "a GB of the database"),
    "line_price": Input(0.05, "each", "assumed", "a GB out of the servers; into them it costs nothing"),
    "cdn_price": Input(0.02, "each", "assumed", "a GB from the CDN"),
}  # fmt: skip

MONTH_S = 30 * 86400
GB = 1e9

SCENARIOS: tuple[tuple[str, dict[str, float]], ...] = (
    ("100 000 devices", {}),
    ("a million", {"devices": 1e6}),
    ("a million, a report each five minutes, a look each hour", {"devices": 1e6, "heartbeat_s": 300, "poll_interval_s": 3600}),
)


class Row(NamedTuple):
    """One result."""

    name: str
    value: float
    unit: str


def needs(given: dict[str, float]) -> list[Row]:
    """What a fleet needs, for inputs that differ from INPUTS in what is given.  Raises: KeyError for one that there is not."""
    unknown = given.keys() - INPUTS.keys()
    if unknown:
        raise KeyError(f"there is no input {', '.join(sorted(unknown))}; there are {', '.join(INPUTS)}")
    of = {name: one.value for name, one in INPUTS.items()} | given
    devices = of["devices"]
    reports = devices / of["heartbeat_s"]
    events = devices * of["events_per_day"] / 86400
    looks = devices / of["poll_interval_s"]
    acknowledged = (reports + events) * of["packet_bytes"]
    up = reports * (of["report_bytes"] + of["packet_bytes"]) + events * (of["event_bytes"] + of["packet_bytes"])
    down = acknowledged + looks * of["look_bytes"]

    ingest = (reports + events) / of["stored_per_core_s"] / of["load"]
    api = looks * of["look_ms"] / 1000 / of["load"]
    alone = 1 / of["stored_per_core_s"] - 1 / of["verified_per_core_s"]  # s for each report in which nobody else writes
    writing = (reports + events) * alone

    nodes = max(3, math.ceil(devices / of["per_node"]) + 1)
    rabbit_gb = devices * of["rabbitmq_kb"] * 1000 / GB
    disk_gb = (devices * of["device_bytes"] + of["events_kept"] * of["event_row_bytes"]) / GB
    release_gb = devices * of["model_bytes"] * of["changed_share"] * of["delta_factor"] / GB
    down_gb = down * MONTH_S / GB
    cores = ingest + api + nodes
    memory_gb = rabbit_gb / (nodes - 1) * nodes + math.ceil(ingest) + math.ceil(api)
    money = {
        "processors": cores * of["core_price"],
        "memory": memory_gb * of["gb_price"],
        "database": disk_gb * of["disk_price"],
        "line": down_gb * of["line_price"],
        "CDN": release_gb * of["releases_per_month"] * of["cdn_price"],
    }
    return [
        Row("reports", reports, "a second"),
        Row("events", events, "a second"),
        Row("looks without a poke", looks, "a second"),
        Row("from devices", up * 8 / 1e6, "Mbit/s"),
        Row("to devices, without files", down * 8 / 1e6, "Mbit/s"),
        Row("a poke to all", devices * of["poke_bytes"] / GB, "GB"),
        Row("processors that store (`ingest`)", ingest, "cores"),
        Row("partitions, each stored by one of them at a time", max(1, math.ceil(ingest)), ""),
        Row("processors that answer looks (`api`)", api, "cores"),
        Row("time in which one transaction at a time writes", 100 * writing, "% (above 70 it does not fit)"),
        Row("a rollout to all, on the one that decides", devices * of["rollout_ms"] / 60_000, "minutes of a core"),
        Row("one mosquitto's memory", devices * of["mosquitto_kb"] * 1000 / GB, "GB"),
        Row("everybody connects anew to it", devices * of["connect_ms"] / 60_000, "minutes of a core"),
        Row("RabbitMQ nodes, one of them to spare", nodes, ""),
        Row("memory of all connections to them", rabbit_gb, "GB"),
        Row("database", disk_gb, "GB"),
        Row("a release, all of it to every device", devices * of["model_bytes"] / GB, "GB"),
        Row("a release, the blocks that changed", release_gb, "GB"),
        *(Row(f"money: {name}", amount, "a month") for name, amount in money.items()),
        Row("money: all of it", sum(money.values()), "a month"),
    ]


def number(value: float) -> str:
    """Three digits that matter, and no more."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, 2 - math.floor(math.log10(abs(value)))):,.{min(digits, 3)}f}".replace(",", " ")


def inputs() -> str:
    """The table of inputs."""
    lines = ["| input | value | | |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {one.value:g} {one.unit} | {one.kind} | {one.source} |" for name, one in INPUTS.items()]
    return "\n".join(lines)


def results(scenarios: tuple[tuple[str, dict[str, float]], ...] = SCENARIOS) -> str:
    """The table of what follows; every number in it is computed."""
    columns = [needs(given) for _, given in scenarios]
    lines = ["| computed | " + " | ".join(name for name, _ in scenarios) + " | |", "|---" * (len(scenarios) + 2) + "|"]
    lines += [
        f"| {rows[0].name} | " + " | ".join(number(row.value) for row in rows) + f" | {rows[0].unit} |"
        for rows in zip(*columns, strict=True)
    ]
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with its tables as they are computed now."""
    for name, table in (("inputs", inputs()), ("results", results())):
        before, begin, rest = page.partition(f"<!-- {name}: python docs/capacity.py -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        assert begin and end, f"the page has no place for its {name}"  # noqa: PT018 - one says as much as the other
        page = f"{before}{begin}{table}\n{end}{after}"
    return page


if __name__ == "__main__":
    try:
        wanted = {name: float(value) for name, _, value in (word.partition("=") for word in sys.argv[1:])}
        print(results((("this fleet", wanted),) if wanted else SCENARIOS))
    except (KeyError, ValueError) as error:
        sys.exit(f"{error.args[0]}; say for example devices=250000 heartbeat_s=120")
