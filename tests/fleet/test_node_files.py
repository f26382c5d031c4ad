"""The files of a cluster's nodes: as the page about them shows them, and what fleet.yaml must say for there to be any."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import yaml
from cryptography import x509

from agent.contract.codec import convert
from fleet_server.broker import node_files
from fleet_server.config import FleetConfig
from fleet_server.devices import pki
from fleet_server.errors import Invalid

PAGE = (Path(__file__).parents[2] / "docs/how-to/use-rabbitmq.md").read_text()


def block(kind):
    """The page's block of this kind."""
    return re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL).group(1)


def config(**broker):
    raw = {"fleet": "demo", **yaml.safe_load(block("yaml"))}
    raw["broker"].update(broker)
    return convert(raw, FleetConfig)


def test_the_page_shows_what_is_written():
    node = config().broker.rabbitmq.nodes[0]
    assert node_files.conf(config(), node, "/etc/rabbitmq").rstrip() == block("ini").rstrip()
    assert node_files.advanced(config(), "/etc/rabbitmq").rstrip() == block("erlang").rstrip()
    for plugin in node_files.PLUGINS:
        assert plugin in PAGE


def test_each_node_gets_a_certificate_of_its_own_names(tmp_path):
    (tmp_path / "pki").mkdir()
    authority = pki.Authority.create(tmp_path / "pki", "demo", ("fleet.example.com",))
    folders = node_files.write(config(), authority, tmp_path / "out", "/etc/rabbitmq")
    assert [folder.name for folder in folders] == ["rabbit@r1", "rabbit@r2", "rabbit@r3"]
    certificate = x509.load_pem_x509_certificate((folders[1] / "node.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"mqtt.example.com", "r2.example.com"}
    assert pki.is_broker_node(certificate)
    assert (folders[1] / "node.key").stat().st_mode & 0o777 == 0o600


def test_a_server_with_a_mosquitto_has_no_nodes(tmp_path):
    with pytest.raises(Invalid, match=r"broker\.kind"):
        node_files.write(config(kind="mosquitto"), None, tmp_path, "/etc/rabbitmq")


WRONG = [
    ({"rabbitmq": {}}, r"needs rabbitmq\.nodes"),
    ({"rabbitmq": {"nodes": [{"name": "r1", "amqp": "a:1", "mqtt": "a:2"}]}}, "rabbit@host"),
    ({"rabbitmq": {"nodes": [{"name": "rabbit@r1", "amqp": "a", "mqtt": "a:2"}]}}, "amqp of node rabbit@r1"),
    ({"rabbitmq": {"nodes": [{"name": "rabbit@r1", "amqp": "a:1", "mqtt": "a:2"}] * 2}}, "the same name"),
    ({"rabbitmq": {"partitions": 0}}, "partitions"),
    ({"kind": "emqx"}, "emqx"),
]


@pytest.mark.parametrize(("broker", "words"), WRONG)
def test_what_fleet_yaml_must_not_say(broker, words):
    with pytest.raises(msgspec.ValidationError, match=words):
        config(**broker)


def test_devices_must_be_told_where_the_cluster_is():
    raw = {"fleet": "demo", **yaml.safe_load(block("yaml"))}
    with pytest.raises(msgspec.ValidationError, match=r"public\.broker"):
        convert({**raw, "public": {}}, FleetConfig)
    with pytest.raises(msgspec.ValidationError, match="shared_port"):
        convert({**raw, "shared_port": 443}, FleetConfig)
