"""Names and ports that devices and operators are told, apart from those listened on."""

import json
import socket
import ssl

import msgspec
import pytest
import yaml
from click.testing import CliRunner
from uvicorn.middleware.proxy_headers import _TrustedHosts

from agent.contract.addresses import Addresses, check_host, check_url, join, split
from agent.contract.enrolment import EnrolmentRequest
from agent.host.clock import LastKnownGood, SignedClock, SystemClock
from agent.sync.fleet.connecting import Connector
from agent.sync.fleet.enrol import enrol
from agent.sync.proxy import Way
from fleet_server import listeners
from fleet_server.access import SERVER
from fleet_server.cli import main
from fleet_server.config import ConfigError, FleetConfig, Folder, PublicSettings, load
from tests.fleet.stand import make_csr, wait_until

NAT = PublicSettings(
    operators="page.example.org:443",
    enrolment="in.example.org:9443",
    devices="[2001:DB8::1]:9444",
    broker="mqtt.example.org:9883",
)


@pytest.mark.parametrize("host", ["a", "fleet.example.org", "fleet.example.org.", "my_host", "192.0.2.7", "2001:db8::1", "::1"])
def test_hosts(host):
    assert check_host(host) == host


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("https://fleet.example.org", "not a URL"), ("fleet.example.org/x", "not a URL"), ("fleet.example.org:8443", "without a port"),
        ("[2001:db8::1]", "without a port or brackets"), ("", "expected a name"), ("a b", "expected a name"), ("-a", "expected a name"),
        ("0.0.0.0", "nobody can connect"), ("::", "nobody can connect"), ("fe80::1%eth0", "zone"), ("300.1.1.1", "expected a name"), ("1.2.3", "expected a name"),
        ("a" * 64, "expected a name"), (".".join(["a" * 60] * 5), "expected a name"), ("ä.org", "expected a name"),
    ],
)  # fmt: skip
def test_what_is_no_host(host, said):
    with pytest.raises(ValueError, match=said):
        check_host(host)


@pytest.mark.parametrize("text", ["a:1", "a.b:65535", "[::1]:443"])
def test_addresses_there_and_back(text):
    assert join(*split(text)) == text
    assert check_url(f"https://{text}") == split(text)


@pytest.mark.parametrize(
    "text", ["a", "a:", ":1", "a:0", "a:65536", "a:99999999999", "a:1x", "::1:443", "[a]:1", "a:1:2", "https://a:1"]
)
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match=r"HOST:PORT|expected a name"):
        split(text)


@pytest.mark.parametrize(
    "url",
    [
        "http://a:1",
        "https://",
        "https://a/b",
        "https://a?b",
        "https://u@a",
        "https://a:0",
        "https://a:x",
        "ftp://a",
        "https://[::1",
    ],
)
def test_what_is_no_address_of_devices(url):
    with pytest.raises(ValueError, match="expected https"):
        Addresses(device_url=url, broker="a:1")


def test_what_is_told_is_what_is_listened_on_unless_said_otherwise():
    config = FleetConfig(fleet="x", hosts=("fleet.example.org", "192.0.2.1"))
    assert config.operator_url == "https://fleet.example.org:8443"
    assert config.enrolment == "fleet.example.org:8443"
    assert config.device_url == "https://fleet.example.org:8444"
    assert config.broker_address == "fleet.example.org:8883"
    shared = msgspec.structs.replace(config, shared_port=443)
    assert {shared.operator_url, shared.device_url} == {"https://fleet.example.org:443"}
    assert (shared.enrolment, shared.broker_address) == ("fleet.example.org:443", "fleet.example.org:443")
    assert (shared.unshared_device_url, shared.unshared_broker) == ("https://fleet.example.org:8444", "fleet.example.org:8883")
    public = msgspec.structs.replace(shared, public=NAT)
    assert public.operator_url == "https://page.example.org:443"
    assert public.enrolment == "in.example.org:9443"
    assert {public.device_url, public.unshared_device_url} == {"https://[2001:DB8::1]:9444"}
    assert {public.broker_address, public.unshared_broker} == {"mqtt.example.org:9883"}
    assert public.own_names == (
        "fleet.example.org", "192.0.2.1", "page.example.org", "in.example.org", "2001:db8::1", "mqtt.example.org"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hosts": ["https://a"]}, "not a URL"), ({"hosts": []}, "at least one host"), ({"public": {"broker": "a"}}, "public.broker is 'a'"),
        ({"public": {"devices": "https://a:1"}}, "public.devices"), ({"shared_port": 70000}, "a port is a number"), ({"public": {"brokers": "a:1"}}, "brokers"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(change, said, tmp_path):
    folder = Folder(tmp_path)
    folder.config.write_text(yaml.safe_dump({"fleet": "x", "hosts": ["a"], **change}))
    with pytest.raises(ConfigError, match=said):
        load(folder)


def test_init_refuses_a_host_that_is_none(own_server, tmp_path):
    for host in ("https://fleet.example.org", "fleet.example.org:8443", "0.0.0.0"):
        done = own_server.cli("init", tmp_path / "new", "--host", host, "--keys", tmp_path / "keys")
        assert done.returncode == 2, done.stderr
        assert host in done.stderr
    assert not (tmp_path / "new").exists()


def test_init_warns_of_a_name_that_cannot_be_looked_up(tmp_path, monkeypatch):
    def unknown(host, *_):
        if host == "flete.example.org":
            raise socket.gaierror(socket.EAI_NONAME, "name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    words = [
        "init",
        "--host",
        "flete.example.org",
        "--host",
        "192.0.2.7",
        "--keys",
        str(tmp_path / "keys"),
        str(tmp_path / "new"),
    ]
    done = CliRunner().invoke(main, ["--profile", str(tmp_path / "profile.yaml"), *words])
    assert done.exit_code == 0, done.output
    assert [line.partition(" cannot")[0] for line in done.stderr.splitlines()] == ["warning: flete.example.org"]
    assert load(Folder(tmp_path / "new")).hosts == ("flete.example.org", "192.0.2.7")


def test_the_certificate_names_what_is_told_after_a_restart(fleet):
    fleet.config = msgspec.structs.replace(fleet.config, public=NAT)
    assert fleet.authority.renew_own(fleet.config.own_names)
    assert not fleet.authority.renew_own(fleet.config.own_names)  # however the address was written


def test_devices_are_told_where_the_server_is(fleet, clock):
    fleet.recover()
    first = fleet.assignment.signed()
    assert (first.addresses.device_url, first.addresses.broker) == ("https://127.0.0.1:8444", "127.0.0.1:8883")
    fleet.recover()
    assert fleet.assignment.signed() == first, "a restart is no news"
    fleet.config = msgspec.structs.replace(fleet.config, public=NAT)
    clock.now -= 1000  # the server's clock was set back
    fleet.recover()
    then = fleet.assignment.signed()
    assert then.version > first.version
    assert (then.addresses.broker, then.addresses.since) == ("mqtt.example.org:9883", first.addresses.since + 1)
    assert "addresses.change" in {one.action for one in fleet.journal.audited()}


def test_what_an_enrolment_and_a_renewal_say(fleet):
    fleet.config = msgspec.structs.replace(fleet.config, shared_port=443)
    vars(fleet.enrolment)["_config"] = fleet.config
    fleet.recover()
    string = fleet.enrolment.create_token(SERVER, device=None, groups=[], uses=1, ttl_s=60).string
    assert "@127.0.0.1:443/" in string
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    token = string.removeprefix("edge://").partition("@")[0]
    told = fleet.enrolment.enrol(EnrolmentRequest(token=token, csr_pem=make_csr(key)))
    assert told.addresses == fleet.assignment.signed().addresses
    assert (told.addresses.device_url, told.addresses.broker) == ("https://127.0.0.1:443", "127.0.0.1:443")
    assert (told.device_url, told.broker_host, told.broker_port) == ("https://127.0.0.1:8444", "127.0.0.1", 8883), (
        "as earlier agents read it"
    )


# -- IPv4 and IPv6 ---------------------------------------------------------------------------------------------------------


def test_every_address_is_ipv4_too():
    with listeners.bind("::", 0) as sock:
        port = sock.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=5).close()


def test_a_trusted_proxy_is_known_by_either_way_of_writing_its_address():
    trusted = _TrustedHosts(listeners.as_seen(("10.0.0.0/8", "192.0.2.7", "2001:db8::/32")))
    for host in ("10.1.2.3", "::ffff:10.1.2.3", "192.0.2.7", "::ffff:192.0.2.7", "2001:db8::1"):
        assert host in trusted
    for host in ("11.0.0.1", "::ffff:11.0.0.1", "::ffff:192.0.2.8", "2001:db9::1", "::1"):
        assert host not in trusted


@pytest.mark.long
def test_a_server_at_every_address_is_reached_by_both(own_server, tmp_path):
    path = own_server.data / "fleet.yaml"
    config = yaml.safe_load(path.read_text())
    config["listen"] = config["broker"]["listen"] = "::"
    path.write_text(yaml.safe_dump(config))
    for name, port in (("enrolment", own_server.operator), ("devices", own_server.device), ("broker", own_server.broker)):
        config["public"][name] = f"[::1]:{port}"
    path.write_text(yaml.safe_dump(config))
    own_server.start()
    context = ssl.create_default_context(cafile=str(own_server.ca))
    for port in (own_server.operator, own_server.device, own_server.broker):
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port), timeout=5) as sock, context.wrap_socket(sock, server_hostname=host):
                pass
    assert own_server.get("/status")["broker_connected"]

    who = enrol(str(own_server.enrolment_string()), tmp_path / "identity", SystemClock(), device="d6", hardware=None)
    assert who.known.used.broker == f"[::1]:{own_server.broker}"
    clock = SignedClock(SystemClock(), LastKnownGood(tmp_path / "clock.json", floor=who.not_before))
    assert Connector(who, clock, Way()).answers(who.known.used) == {"https", "mqtt"}


# -- doctor ----------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_doctor_says_what_is_told_and_whether_it_answers(own_server):
    def findings():
        done = own_server.cli("doctor", own_server.data, "--json")
        return {one["name"]: one for one in json.loads(done.stdout)}

    assert "was not tried" in findings()["devices"]["message"]
    own_server.start()
    found = findings()
    for name, port in (
        ("enrolment", own_server.operator),
        ("devices", own_server.device),
        ("broker address", own_server.broker),
    ):
        assert found[name]["level"] == "ok"
        assert f"127.0.0.1:{port}, and this fleet answers" in found[name]["message"]
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = gone.getsockname()[1]
    own_server.set(public={"broker": f"127.0.0.1:{nobody}", "devices": f"localhost:{own_server.device}"})
    found = wait_until(findings, "doctor answers")
    assert found["broker address"]["level"] == "warning"
    assert "not reached from here" in found["broker address"]["message"]
    assert found["devices"]["level"] == "ok"
