"""The OpenAPI document: every answer has a type, and a client that is generated from it works against a running server."""

from __future__ import annotations

import importlib
import json
import ssl
import subprocess
import sys

import pytest

from fleet_server.api.operator.app import described_api

OPEN = {
    "PublicKey": "kinds of keys have fields of their own, and the server keeps what it is given",
    "AuditView": "what an action notes differs from action to action",
}
"""Schemas with an object that may have any field → why."""


def walked(value, path=()):
    """Every object and list of a document, with the way to it."""
    if isinstance(value, dict):
        yield path, value
        for name, inside in value.items():
            yield from walked(inside, (*path, name))
    elif isinstance(value, list):
        for number, inside in enumerate(value):
            yield from walked(inside, (*path, number))


OPERATIONS = [
    pytest.param(method, operation, id=f"{method} {path}")
    for path, methods in described_api()["paths"].items()
    for method, operation in methods.items()
]


@pytest.mark.parametrize(("method", "operation"), OPERATIONS)
def test_every_answer_has_a_type(method, operation):
    for status, answer in operation["responses"].items():
        if method == "head":
            assert "content" not in answer, "an answer to HEAD has no body"
            continue
        for kind, content in answer["content"].items():
            assert content["schema"], (status, kind)
            assert set(content["schema"]) & {"$ref", "items", "type"}, "and the type says something"
        if not status.startswith("2"):
            assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert [status for status in operation["responses"] if status.startswith("2")] == ["200"]
    assert "422" not in operation["responses"], "what does not fit a route is status 400"


def test_no_object_is_left_open_without_a_reason():
    found = {}
    for path, value in walked(described_api()):
        if "schema" in value:
            assert value["schema"], path
        is_open = value.get("additionalProperties") in (True, {})
        is_free = value.get("type") == "object" and not set(value) & {"properties", "additionalProperties"}
        if is_open or is_free:
            found[path[2]] = path
    assert sorted(found) == sorted(OPEN), found


def test_every_type_that_is_named_is_there():
    document = described_api()
    named = {value["$ref"].rpartition("/")[2] for _, value in walked(document) if isinstance(value.get("$ref"), str)}
    assert named == set(document["components"]["schemas"]), "and no type is there that nothing names"


CONFIG = {
    "post_hooks": [],  # nobody reads it, so it need not be formatted
    "package_name_override": "made_client",
    "content_type_overrides": {"application/x-tar": "application/octet-stream", "application/x-pem-file": "text/plain"},
}

# -- a client made from it ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client_module(tmp_path_factory):
    """A package made from what `edge-fleet openapi` prints."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "openapi.json").write_text(json.dumps(described_api()))
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    made = subprocess.run(
        [
            sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none", "--fail-on-warning",
            "--path", folder / "openapi.json", "--config", folder / "config.yaml", "--output-path", folder / "made_client",
        ],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    sys.path.insert(0, str(folder))
    yield "made_client"
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "made_client"]:
        del sys.modules[name]


def test_a_generated_client_lists_devices_and_starts_a_rollout(client_module, server):
    def part(name):
        return importlib.import_module(f"{client_module}.{name}")

    server.enrol("made-1", groups=["canary"])
    server.publish_simple("made", 1)
    client = part("client").AuthenticatedClient(
        base_url=server.url,
        token=server.token,
        verify_ssl=ssl.create_default_context(cafile=server.ca),
        raise_on_unexpected_status=True,
    )
    models = part("models")
    with client:
        page = part("api.devices.devices").sync(client=client, group="canary")
        assert isinstance(page, models.DevicePage)
        (device,) = page.devices
        assert isinstance(device, models.DeviceView)
        assert (device.id, device.groups, device.certificate.value) == ("made-1", ["canary"], "good")

        body = models.NewRollout(release="made:1", groups=["canary"], confirm=True)
        started = part("api.rollouts.start_rollout").sync(client=client, body=body)
        assert isinstance(started, models.RolloutDetail)
        assert (started.model, started.state.value, started.confirm) == ("made", "running", True)
        assert [wave.permille for wave in started.waves] == [0, 1000]

        refused = part("api.rollouts.start_rollout").sync(client=client, body=body)
        assert isinstance(refused, models.ErrorAnswer)
        assert refused.code == "rollout_active"
