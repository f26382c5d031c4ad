"""Who is taken for the fleet server: nobody without a certificate of the fleet's own CA, whoever named the address."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli import cli
from agent.contract.addresses import Addresses, join
from agent.host.clock import LastKnownGood, SignedClock
from agent.sync import addresses
from agent.sync.fleet import connecting, renewal
from agent.sync.fleet.connecting import Connector, NoBroker
from agent.sync.http import FleetHttp
from agent.sync.identity import Identity
from agent.sync.problems import Problem
from agent.sync.proxy import ENVIRONMENT, Way
from tests.sync.conftest import FakeClock
from tests.sync.fleet import Authority, Repository, Server, enrolled
from tests.sync.test_enrol import Office
from tests.sync.test_link import Mosquitto
from tests.ways import ConnectProxy

NOTHING = frozenset()


class Place:
    """A fleet server of an authority: what devices look at, and a broker."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.repository = Repository()
        self.repository.files["record"] = b"{}"
        self.server = Server(authority, self.repository, folder / "https")
        self.broker = Mosquitto(folder / "broker", authority)
        self.broker.credentials("localhost", server=True)
        self.broker.start()

    def address(self, **changes: object) -> Addresses:
        return Addresses(
            **{"device_url": self.server.url, "broker": join("localhost", self.broker.port), "since": 1.0, **changes}
        )

    def close(self) -> None:
        self.server.close()
        self.broker.kill()


@pytest.fixture
def place(authority: Authority, tmp_path: Path):
    made = Place(tmp_path, authority)
    yield made
    made.close()


@pytest.fixture
def who(authority: Authority, tmp_path: Path) -> Identity:
    return enrolled(tmp_path / "identity", authority, b"{}", url="https://127.0.0.1:1")


def connector(who: Identity, tmp_path: Path, way: Way | None = None) -> Connector:
    clock = SignedClock(FakeClock(who.not_before + 86400), LastKnownGood(tmp_path / "clock.json", floor=who.not_before))
    return Connector(who, clock, way or Way())


def test_the_fleet_server_by_both_ways(place: Place, who: Identity, tmp_path: Path) -> None:
    assert connector(who, tmp_path).answers(place.address()) == {"https", "mqtt"}


def test_one_way_alone(place: Place, who: Identity, tmp_path: Path) -> None:
    asked = connector(who, tmp_path)
    assert asked.answers(place.address(device_url="https://127.0.0.1:1")) == {"mqtt"}
    assert asked.answers(place.address(broker="localhost:1")) == {"https"}


def test_a_server_of_the_fleet_that_is_no_broker(
    place: Place, who: Identity, tmp_path: Path, authority: Authority, monkeypatch
) -> None:
    """The way to one port may lead to another listener than was meant."""
    monkeypatch.setattr(connecting, "ANSWER_S", 1.0)
    address = place.address(broker=join("127.0.0.1", place.server.port))
    assert connector(who, tmp_path).answers(address) == {"https"}


@pytest.mark.parametrize(
    ("answer", "said"), [(b"", "without a word"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "as a broker does")]
)
def test_what_answers_to_mqtt_and_is_no_broker(
    answer: bytes, said: str, who: Identity, tmp_path: Path, authority: Authority
) -> None:
    (tmp_path / "tls").mkdir()
    context = authority.server_context(tmp_path / "tls")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with context.wrap_socket(listening.accept()[0], server_side=True) as sock:
                sock.recv(100)
                sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NoBroker, match=said):
            connector(who, tmp_path).greet_broker("127.0.0.1", listening.getsockname()[1])
        thread.join(10)


def test_another_authority_is_believed_nothing(who: Identity, tmp_path: Path) -> None:
    """Whoever makes a device hear of an address needs a certificate of the fleet's CA there."""
    (tmp_path / "stranger").mkdir()
    stranger = Place(tmp_path / "stranger", Authority("somebody else's CA"))
    try:
        assert connector(who, tmp_path).answers(stranger.address()) == NOTHING
    finally:
        stranger.close()


def test_a_certificate_for_another_name_is_believed_nothing(place: Place, who: Identity, tmp_path: Path) -> None:
    other = {"other.invalid:443": place.server.port, "other.invalid:8883": place.broker.port}
    with ConnectProxy(other) as proxy:
        address = Addresses(device_url="https://other.invalid:443", broker="other.invalid:8883")
        assert connector(who, tmp_path, Way(proxy.url)).answers(address) == NOTHING
        assert sorted(proxy.connected) == sorted(other)


def test_an_ipv6_address_through_a_proxy(who: Identity, tmp_path: Path) -> None:
    with ConnectProxy({}) as proxy:
        address = Addresses(device_url="https://[2001:db8::7]:9444", broker="[2001:db8::7]:9883")
        assert connector(who, tmp_path, Way(proxy.url)).answers(address) == NOTHING
        assert proxy.refused == ["CONNECT [2001:db8::7]:9444", "CONNECT [2001:db8::7]:9883"]


def test_what_is_no_server(who: Identity, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        listening.close()
        assert (
            connector(who, tmp_path).answers(Addresses(device_url=f"https://127.0.0.1:{port}", broker=f"127.0.0.1:{port}"))
            == NOTHING
        )


@pytest.mark.parametrize(
    ("status", "headers", "found"),
    [(403, {}, NOTHING), (404, {}, NOTHING), (500, {}, NOTHING), (503, {"Retry-After": "5"}, frozenset({"https"}))],
)
def test_a_server_that_refuses_the_device_is_not_its_own_and_a_busy_one_is(
    place: Place, who: Identity, tmp_path: Path, status: int, headers: dict[str, str], found: frozenset
) -> None:
    def refuse(handler) -> bool:
        handler.answer(status, b"{}", headers)
        return True

    place.server.faults["record"] = refuse
    assert connector(who, tmp_path).answers(place.address(broker="localhost:1")) == found


def test_through_a_proxy(place: Place, who: Identity, tmp_path: Path) -> None:
    allowed = {f"127.0.0.1:{place.server.port}": place.server.port, f"localhost:{place.broker.port}": place.broker.port}
    with ConnectProxy(allowed) as proxy:
        assert connector(who, tmp_path, Way(proxy.url)).answers(place.address()) == {"https", "mqtt"}
        assert sorted(proxy.connected) == sorted(allowed)
    with ConnectProxy({}) as proxy:
        asked = connector(who, tmp_path, Way(proxy.url))
        assert asked.answers(place.address()) == NOTHING
        with pytest.raises(
            Problem, match=f"the proxy 127.0.0.1:{proxy.port} does not connect to 127.0.0.1:{place.server.port}: 403"
        ):
            asked.http(place.server.url).get(place.server.url, limit_bytes=10, deadline_s=5)
    with pytest.raises(Problem, match=f"the proxy 127.0.0.1:{proxy.port} cannot be reached"):  # it is closed now
        asked.http(place.server.url).get(place.server.url, limit_bytes=10, deadline_s=5)


@pytest.mark.parametrize("unset", [False, True], ids=["a clock that is set", "a clock in 1970"])
def test_the_machines_own_authorities_are_not_the_fleets(unset: bool, who: Identity, tmp_path: Path, monkeypatch) -> None:
    """Whoever has a certificate of a public authority, or of a company's that the machine trusts, is not the fleet server."""
    stranger = Authority("an authority that the machine trusts")
    trusted = tmp_path / "machine.pem"
    trusted.write_text(stranger.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    repository = Repository()
    repository.files["record"] = b"{}"
    server = Server(stranger, repository, tmp_path / "https")
    server.anonymous()
    http = FleetHttp(server.url, FakeClock(who.not_before + 86400), ca=who.ca_file, unset=lambda: unset)
    public = FleetHttp(server.url, FakeClock(who.not_before + 86400), ca=who.ca_file, unset=lambda: unset, public=True)
    try:
        with pytest.raises(Problem, match="TLS failed"):
            http.get(http.url("/record"), limit_bytes=10, deadline_s=5)
        assert public.get(public.url("/record"), limit_bytes=10, deadline_s=5) == b"{}"  # a mirror
    finally:
        http.close()
        public.close()
        server.close()


# -- what doctor says of the way -----------------------------------------------------------------------------------------------


def findings(tmp_path: Path, **sync: object) -> dict[str, dict[str, str]]:
    config = tmp_path / "agent.yaml"
    settings = {"identity": str(tmp_path / "identity"), **sync}
    config.write_text(
        json.dumps({"store": str(tmp_path / "store"), "serve": {"socket": str(tmp_path / "s.sock")}, "sync": settings})
    )
    said = CliRunner().invoke(cli, ["doctor", "--json", "--config", str(config)])
    return {one["name"]: one for one in json.loads(said.stdout)}


def test_doctor_says_where_the_server_is_and_what_is_awaited(who: Identity, tmp_path: Path) -> None:
    found = findings(tmp_path)["addresses"]
    assert (found["level"], found["message"].partition(",")[0]) == ("ok", "https://127.0.0.1:1")
    assert ", since 20" in found["message"]
    named = Addresses(device_url="https://new.example.org:443", broker="new.example.org:443", since=7.0)
    addresses.write(who.folder, addresses.hear(who.known, named))
    found = findings(tmp_path)["addresses"]
    assert found["level"] == "warning"
    assert (
        "says that it is at https://new.example.org:443, broker new.example.org:443, and has not answered" in found["message"]
    )


def test_doctor_goes_through_the_proxy(place: Place, authority: Authority, tmp_path: Path) -> None:
    enrolled(tmp_path / "identity", authority, b"{}", url=place.server.url, broker_port=place.broker.port)
    secret = tmp_path / "secret"
    secret.write_text("me:secret")
    secret.chmod(0o600)
    ports = (place.server.port, place.broker.port)
    with ConnectProxy({f"127.0.0.1:{port}": port for port in ports}, secret="me:secret") as proxy:
        refused = findings(tmp_path, proxy=proxy.url)["proxy"]
        assert (refused["level"], "407" in refused["message"]) == ("failed", True)
        sync = {"proxy": proxy.url, "proxy_credentials": str(secret)}
        found = findings(tmp_path, **sync)
        assert {found[name]["level"] for name in ("proxy", "fleet server", "broker")} == {"ok"}
        secret.chmod(0o644)
        assert "others than its owner may read" in findings(tmp_path, **sync)["proxy"]["message"]
        direct = findings(tmp_path, proxy=proxy.url, proxy_except=["127.0.0.1"])["proxy"]
        assert "reached without it" in direct["message"]


def test_doctor_names_a_proxy_of_the_environment_that_is_not_obeyed(who: Identity, tmp_path: Path, monkeypatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert "proxy" not in findings(tmp_path)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.org:3128")
    assert "HTTPS_PROXY is set here" in findings(tmp_path)["proxy"]["message"]


def test_a_renewal_brings_the_addresses_along(server: Server, authority: Authority, who: Identity) -> None:
    office = Office(server, authority)
    told: list[Addresses | None] = []
    http = FleetHttp(server.url, FakeClock(who.not_before + 86400), ca=who.ca_file)
    named = Addresses(device_url="https://new.example.org:443", broker="new.example.org:443", since=7.0)
    try:
        renewal.over_https(who, http, told.append)  # of an earlier server
        office.changes = {"addresses": named}
        renewal.over_https(who, http, told.append)
    finally:
        http.close()
    assert told == [None, named]
