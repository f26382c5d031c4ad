"""What the nodes of a RabbitMQ cluster are answered about who connects: every kind of question, with what a hostile device would try."""

from __future__ import annotations

import asyncio
from typing import get_args
from urllib.parse import urlencode

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.contract import topics
from fleet_server.broker import rules
from fleet_server.broker.authorization import Authorization
from fleet_server.broker.questions import MAX_BYTES, Questions
from fleet_server.devices import pki
from fleet_server.errors import Unavailable
from fleet_server.ingest import routing
from tests.fleet.stand import make_csr

DEVICES = {"d1", "d.2", "fleet-server-2"}


def authorization(admitted=DEVICES.__contains__, *, ready=True):
    return Authorization(admitted, lambda: ready, "/fleet")


def device(**fields):
    return {"username": "d1", "vhost": "/fleet", "client_id": "d1", **fields}


def server(**fields):
    return {"username": pki.SERVER_CN, "vhost": "/fleet", **fields}


def topic(permission, key, **fields):
    return device(resource="topic", name="amq.topic", permission=permission, routing_key=key, **fields)


def queue(name, permission="read", **fields):
    return device(resource="queue", name=name, permission=permission, **fields)


ANSWERS = [
    # kind, question, whether it is allowed
    ("user", device(), True),
    ("user", device(username="d3"), False),
    ("user", device(password=""), False),
    ("user", device(password="x"), False),
    ("user", server(), True),
    ("user", server(password=""), False),
    ("user", {"username": "guest", "password": "guest"}, False),
    ("user", {"username": pki.BROKER_NODE_CN}, False),
    ("user", {"username": "all"}, False),
    ("user", {}, False),
    ("vhost", device(), True),
    ("vhost", device(client_id="d.2"), False),
    ("vhost", {"username": "d1", "vhost": "/fleet"}, False),  # AMQP has no client id
    ("vhost", device(vhost="/"), False),
    ("vhost", device(username="d3", client_id="d3"), False),
    ("vhost", server(), True),
    ("vhost", server(client_id="d1"), True),
    ("vhost", server(vhost="/"), False),
    ("resource", queue("mqtt-subscription-d1qos0"), True),
    ("resource", queue("mqtt-subscription-d1qos1", "configure"), True),
    ("resource", queue("mqtt-subscription-d.2qos1"), False),
    ("resource", queue("mqtt-subscription-d1qos2"), False),
    ("resource", queue(routing.partition(0)), False),
    ("resource", queue(routing.ASKS), False),
    ("resource", device(resource="exchange", name="amq.topic", permission="write"), True),
    ("resource", device(resource="exchange", name="amq.topic", permission="configure"), False),
    ("resource", device(resource="exchange", name=routing.REPORTS, permission="write"), False),
    ("resource", device(resource="exchange", name="", permission="write"), False),
    ("resource", queue("mqtt-subscription-d1qos0", vhost="/"), False),
    ("resource", server(resource="queue", name=routing.partition(0), permission="configure"), True),
    ("topic", topic("write", "v1.d.d1.up.state"), True),
    ("topic", topic("write", "v1.d.d1.up.blocks"), True),
    ("topic", topic("write", "v1.d.d1.up.other"), False),
    ("topic", topic("write", "v1.d.d1.up"), False),
    ("topic", topic("write", "v1.d.d1.up.state.x"), False),
    ("topic", topic("write", "v1.d.d1.down.poke"), False),
    ("topic", topic("write", "v1.all.poke"), False),
    ("topic", topic("write", "v1.d.d3.up.state"), False),
    ("topic", topic("write", "v1.d.*.up.state"), False),
    ("topic", topic("write", ""), False),
    ("topic", topic("write", "v1.d.d/2.up.state", username="d.2"), True),  # a dot of the topic is a slash of the key
    ("topic", topic("write", "v1.d.d.2.up.state", username="d.2"), False),
    ("topic", topic("read", "v1.d.d1.down.poke"), True),
    ("topic", topic("read", "v1.d.d1.down.blocks.*"), True),
    ("topic", topic("read", "v1.d.d1.down.#"), True),
    ("topic", topic("read", "v1.all.poke"), True),
    ("topic", topic("read", "#"), False),
    ("topic", topic("read", "v1.d.*.down.poke"), False),
    ("topic", topic("read", "v1.d.d3.down.poke"), False),
    ("topic", topic("read", "v1.d.d1.up.#"), False),
    ("topic", topic("read", "v1.d.d1.down.1234"), False),  # each costs the broker memory
    ("topic", topic("read", "$share.x.v1.d.d1.down.poke"), False),
    ("topic", topic("configure", "v1.d.d1.up.state"), False),
    ("topic", topic("write", "v1.d.d1.up.state", vhost="/"), False),
    ("topic", {**topic("write", "v1.d.d1.up.state"), "name": "amq.direct"}, False),
    ("topic", server(name="amq.topic", permission="write", routing_key="v1.d.d1.down.poke"), True),
]


@pytest.mark.parametrize(("kind", "asked", "allowed"), ANSWERS)
def test_who_may_what(kind, asked, allowed):
    assert getattr(authorization(), kind)(asked) is allowed


def test_nobody_comes_in_before_there_are_queues():
    early = authorization(ready=False)
    assert (early.user(device()), early.vhost(device()), early.user(server())) == (False, False, True)


def test_the_access_list_of_mosquitto_says_the_same():
    written = {line.split()[-1] for line in rules.mosquitto_acl("$CONTROL").splitlines() if line.startswith("pattern write")}
    assert {topic.replace("%u", "d1") for topic in written} == {
        topic for topic in written_by("d1") if rules.may_write("d1", topic)
    }


def written_by(name):
    return {topics.up(name, kind) for kind in (*get_args(topics.Upward), "other")}


@pytest.mark.parametrize("name", ["d1", "d.2", "a_b-c..d"])
def test_a_topic_and_its_key(name):
    for one in (topics.up(name, "state"), topics.down_blocks(name, "+"), topics.UP_FILTER):
        assert routing.topic_of(routing.key_of(one)) == one
    assert routing.key_of(topics.up(name, "state")).split(".")[-2:] == ["up", "state"]


# -- the application around it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Of a node, of a device, and of the server itself."""
    authority = pki.Authority.create(tmp_path_factory.mktemp("pki"), "test", ("127.0.0.1",))
    node, _ = authority.issue_broker_node(("127.0.0.1",))
    from cryptography.hazmat.primitives.asymmetric import ec

    csr = x509.load_pem_x509_csr(make_csr(ec.generate_private_key(ec.SECP256R1())).encode())
    return {
        "node": x509.load_pem_x509_certificate(node).public_bytes(Encoding.DER),
        "device": authority.issue_device("d1", csr, 86400.0).public_bytes(Encoding.DER),
        "server": x509.load_pem_x509_certificate(authority.client_cert.read_bytes()).public_bytes(Encoding.DER),
        "nobody": None,
    }


def ask(may, certificate, path="/broker/user", body=b"username=d1", method="POST"):
    """The status and the words of the answer."""
    said = []
    scope = {
        "type": "http", "path": path, "method": method, "state": {"client_certificate_der": certificate, "connection": {}},
    }  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        said.append(message)

    asyncio.run(Questions(may)(scope, receive, send))
    return said[0]["status"], said[1]["body"]


@pytest.mark.parametrize("who", ["device", "server", "nobody"])
def test_only_nodes_are_answered(who, certificates):
    assert ask(authorization(), certificates[who])[0] == 403


BODIES = [
    (b"username=d1", (200, b"allow")),
    (b"username=d3", (200, b"deny")),
    (b"username=d1&password=", (200, b"deny")),
    (b"username=d3&username=d1", (200, b"deny")),
    (b"username=%E2%98%83", (200, b"deny")),
    (b"\xff\xfe", (400, b"the question cannot be read")),
    (b"x" * (MAX_BYTES + 1), (413, b"the question is too long")),
    (urlencode({f"f{n}": "x" for n in range(100)}).encode(), (400, b"the question cannot be read")),
]


@pytest.mark.parametrize(("body", "answer"), BODIES)
def test_what_a_node_is_answered(body, answer, certificates):
    assert ask(authorization(), certificates["node"], body=body) == answer


def test_other_paths_and_methods(certificates):
    assert ask(authorization(), certificates["node"], path="/broker/other")[0] == 404
    assert ask(authorization(), certificates["node"], path="/api/v1/devices")[0] == 404
    assert ask(authorization(), certificates["node"], method="GET")[0] == 404


def test_a_database_that_does_not_answer_lets_nobody_in(certificates):
    def gone(_device):
        raise Unavailable("no database")

    assert ask(authorization(gone), certificates["node"])[0] == 503
