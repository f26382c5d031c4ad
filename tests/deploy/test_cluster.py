"""The files for several processes in deploy/ fit the schemas of Kubernetes, each other, and this server's own reader and command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from fleet_server import config
from fleet_server.releases.online_keys import ONLINE
from tests.deploy.test_image import COMPOSE, DEPLOY, parsed

KUBERNETES = "1.29"
FILES = sorted(path.name for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
ALL = [one for name in FILES for one in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())]
WORKLOADS = [one for one in ALL if one["kind"] in {"Deployment", "StatefulSet"}]
OURS = [one for one in WORKLOADS if one["metadata"]["labels"]["app"] == "edge-fleet"]


def called(one):
    return f"{one['kind']} {one['metadata']['name']}"


def pod_of(workload):
    return workload["spec"]["template"]["spec"]


def containers(workload):
    return [*pod_of(workload).get("initContainers", []), *pod_of(workload)["containers"]]


def ports(workload):
    return {port["name"]: port["containerPort"] for one in pod_of(workload)["containers"] for port in one.get("ports", [])}


def chosen(labels):
    """The workloads whose pods have these labels."""
    return [one for one in WORKLOADS if labels.items() <= one["spec"]["template"]["metadata"]["labels"].items()]


def loads(text, folder):
    (folder / "fleet.yaml").write_text(text)
    return config.load(config.Folder(folder))


# -- Kubernetes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", ALL, ids=called)
def test_kubernetes_takes_it(one):
    kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_a_misspelt_field_is_found():
    wrong = json.loads(json.dumps(OURS[0]))
    pod_of(wrong)["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_every_file_is_applied():
    assert sorted(yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["resources"]) == FILES
    namespaces = {one["metadata"].get("namespace", one["metadata"]["name"]) for one in ALL}
    assert namespaces == {"edge-fleet"}


def test_the_settings_are_ones_that_the_server_reads(tmp_path):
    (text,) = (one["data"]["fleet.yaml"] for one in ALL if one["kind"] == "ConfigMap")
    found = loads(text, tmp_path)
    services = {one["metadata"]["name"]: one for one in ALL if one["kind"] == "Service"}
    for name, port in re.findall(r"\b([a-z]+)\.edge-fleet\.svc\.cluster\.local(?::(\d+))?", text):
        assert name in services
        (workload,) = chosen(services[name]["spec"]["selector"])
        reached = {each["port"] for each in services[name]["spec"]["ports"]} | set(ports(workload).values())
        assert not port or int(port) in reached, (name, port)
    (rabbit,) = chosen({"app": "rabbitmq"})
    assert len(found.broker.rabbitmq.nodes) == rabbit["spec"]["replicas"]
    (ingest,) = chosen({"component": "ingest"})
    assert ingest["spec"]["replicas"] <= found.broker.rabbitmq.partitions


@pytest.mark.parametrize("one", OURS, ids=called)
def test_kubernetes_starts_what_there_is(one, tmp_path):
    for container in containers(one):
        parsed(container["args"], tmp_path)
        assert container["args"][0] == one["metadata"]["labels"]["component"]


@pytest.mark.parametrize("one", WORKLOADS, ids=called)
def test_nobody_is_root(one):
    pod = pod_of(one)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in containers(one):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} == set(container["resources"])


def secrets(one):
    found = {}
    for volume in pod_of(one)["volumes"]:
        for source in volume.get("projected", {}).get("sources", []):
            if "secret" in source:
                found[source["secret"]["name"]] = {item["path"] for item in source["secret"]["items"]}
    return found


def test_only_where_it_is_decided_are_keys():
    for one in OURS:
        paths = {path for some in secrets(one).values() for path in some}
        keys = {path for path in paths if path.startswith("keys/") or path == "pki/ca.key"}
        decides = one["metadata"]["name"] == "decide"
        assert keys == ({"pki/ca.key", *(f"keys/{role}.key" for role in ONLINE)} if decides else set()), called(one)
        assert {"pki/ca.crt", "pki/server.crt", "pki/server.key", "pki/client.crt", "pki/client.key"} <= paths


def test_what_is_named_is_there():
    mounted = [
        (one, container, mount) for one in WORKLOADS for container in containers(one) for mount in container["volumeMounts"]
    ]
    for one, _, mount in mounted:
        volumes = {volume["name"] for volume in pod_of(one)["volumes"]}
        claimed = {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", [])}
        assert mount["name"] in volumes | claimed, (called(one), mount)
    for one in WORKLOADS:
        for container in containers(one):
            for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
                probe = container.get(kind, {})
                port = probe.get("httpGet", probe.get("tcpSocket", {})).get("port")
                assert port is None or port in {each["name"] for each in container["ports"]}, (called(one), kind)
    for one in (one for one in ALL if one["kind"] == "Service"):
        (workload,) = chosen(one["spec"]["selector"])
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= set(ports(workload)), called(one)
    services = {one["metadata"]["name"]: one["spec"] for one in ALL if one["kind"] == "Service"}
    for one in (one for one in WORKLOADS if one["kind"] == "StatefulSet"):
        assert one["spec"]["serviceName"] in services
    for one in (one for one in ALL if one["kind"] == "PodDisruptionBudget"):
        (workload,) = chosen(one["spec"]["selector"]["matchLabels"])
        assert one["spec"].get("minAvailable", 1) < workload["spec"].get("replicas", 2)
    for one in (one for one in ALL if one["kind"] == "HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        (workload,) = (
            each for each in WORKLOADS if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])
        )
        assert "replicas" not in workload["spec"], "two would set it"
        assert "cpu" in containers(workload)[0]["resources"]["requests"], "or there is nothing to count a share of"


def test_whoever_must_be_reached_is_let_in_and_nobody_else():
    policies = [one for one in ALL if one["kind"] == "NetworkPolicy"]
    assert any(one["spec"]["podSelector"] == {} and "ingress" not in one["spec"] for one in policies), "nobody, at first"
    opened = {}
    for one in policies:
        for rule in one["spec"].get("ingress", []):
            (workload,) = chosen(one["spec"]["podSelector"]["matchLabels"])
            names = {port["port"] for port in rule["ports"]}
            assert names <= set(ports(workload)), called(one)
            opened.setdefault(workload["metadata"]["name"], {}).update(dict.fromkeys(names, rule.get("from")))
    for one in WORKLOADS:
        assert set(opened[one["metadata"]["name"]]) == set(ports(one)), f"every port of {called(one)} has a rule"
    everybody = {(name, port) for name, some in opened.items() for port, whom in some.items() if whom is None}
    assert everybody == {("api", "operators"), ("api", "devices"), ("rabbitmq", "mqtts")}


def test_the_one_that_decides_is_found_by_its_full_name():
    (decide,) = chosen({"component": "decide"})
    full = f"{decide['metadata']['name']}-0.{decide['spec']['serviceName']}.edge-fleet.svc.cluster.local"
    assert pod_of(decide)["setHostnameAsFQDN"] is True
    assert len(full) <= 64, "the kernel knows no longer name of a machine"


# -- Compose ----------------------------------------------------------------------------------------------------------------


def test_the_settings_beside_it_are_ones_that_the_server_reads(tmp_path):
    found = loads((DEPLOY / "compose/fleet.yaml").read_text(), tmp_path)
    services = COMPOSE["cluster"]["services"]
    for node in found.broker.rabbitmq.nodes:
        host = node.name.partition("@")[2]
        assert services[host]["hostname"] == host == node.amqp.partition(":")[0]
        assert any(f"nodes/{node.name}:" in volume for volume in services[host]["volumes"])


def test_haproxy_takes_its_file_and_names_what_there_is():
    path = DEPLOY / "compose/haproxy.cfg"
    done = subprocess.run([haproxy(), "-c", "-f", path], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    named = {(name, int(port)) for name, port in re.findall(r"^\s+server \S+ (\S+):(\d+)", path.read_text(), re.MULTILINE)}
    services = COMPOSE["cluster"]["services"]
    assert {name for name, _ in named} <= set(services)
    assert {name for name in services if name.startswith(("api", "ingest", "rabbitmq"))} == {name for name, _ in named}


def haproxy():
    return shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin") or "haproxy"


def test_the_user_is_the_image_s():
    (user,) = re.findall(r"^USER (\d+):\1$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    assert {pod_of(one)["securityContext"]["runAsUser"] for one in OURS} == {int(user)}
