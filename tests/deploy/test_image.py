"""The image and the Compose files in deploy/ fit those who read them, and this server's own command line.

compose-spec.json is the schema of the Compose Specification (Apache-2.0), as the PyPI package check-jsonschema 0.39.0 has it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import click
import jsonschema
import pytest
import yaml

from fleet_server.cli import main

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = {path.stem: yaml.safe_load(path.read_text()) for path in (DEPLOY / "compose").glob("*.yaml") if path.stem != "fleet"}


def parsed(words, folder):
    """`edge-fleet WORDS`, as far as the command line reads them.  Raises: click.UsageError."""
    words = [str(folder) if word == "/srv/fleet" else word.replace("$(POD_IP)", "192.0.2.7") for word in words]
    command = main.commands[words[0]]
    command.make_context(words[0], list(words[1:]), parent=click.Context(main))


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_takes_it(name):
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.validate(COMPOSE[name])
    wrong = json.loads(json.dumps(COMPOSE[name]))
    next(iter(wrong["services"].values()))["comand"] = []
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(wrong)


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_starts_what_there_is(name, tmp_path):
    services = COMPOSE[name]["services"]
    ours = {key: one for key, one in services.items() if one["image"] == "edge-fleet"}
    assert ours
    for key, one in ours.items():
        parsed(one["command"], tmp_path)
        assert one["read_only"] is True
        assert one["cap_drop"] == ["ALL"]
        keys = any("deciding" in volume or volume.startswith("./fleet:") for volume in one["volumes"])
        assert keys == (one["command"][0] in {"decide", "serve"}), key
    named = {
        volume.partition(":")[0] for one in services.values() for volume in one.get("volumes", []) if not volume.startswith(".")
    }
    assert named == set(COMPOSE[name].get("volumes", {}))
    for one in services.values():
        assert set(one.get("depends_on", [])) <= set(services)


# -- the image ---------------------------------------------------------------------------------------------------------------


def test_the_image_is_made_of_what_there_is():
    text = (DEPLOY / "Containerfile").read_text()
    ignored = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (DEPLOY.parent / source).exists(), source
            assert f"!{source}" in ignored, f"{source} is kept out of the build"
    user = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    assert user == ["10001:10001"]
    assert re.findall(r"--uid (\d+)", text) == ["10001"]


@pytest.fixture
def begin(tmp_path):
    """The entry point, with an `edge-fleet` that shows what it was called with."""
    given, folder, programs = tmp_path / "given", tmp_path / "folder", tmp_path / "bin"
    for path in (given / "pki", given / "keys", folder, programs):
        path.mkdir(parents=True)
    (programs / "edge-fleet").write_text('#!/bin/sh\necho "$@"\n')
    (programs / "edge-fleet").chmod(0o755)
    (given / "fleet.yaml").write_text("one")
    (given / "pki/server.crt").write_text("certificate")
    (given / "keys/snapshot.key").write_text("key")

    def called_with(*words, **more):
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "EDGE_FLEET_FROM": str(given),
            "EDGE_FLEET_FOLDER": str(folder),
            **more,
        }
        done = subprocess.run(
            [DEPLOY / "entrypoint.sh", *words], env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    called_with.given, called_with.folder = given, folder
    return called_with


def test_what_is_mounted_comes_into_the_folder(begin):
    assert begin("api", "/srv/fleet") == "api /srv/fleet"
    assert (begin.folder / "fleet.yaml").read_text() == "one"
    assert (begin.folder / "pki/server.crt").read_text() == "certificate"
    assert (begin.folder / "keys/snapshot.key").stat().st_mode & 0o077 == 0
    (begin.given / "pki/server.crt").write_text("another")
    begin("api")
    assert (begin.folder / "pki/server.crt").read_text() == "another", "where nothing is decided, what is mounted counts"


def test_whoever_decides_keeps_what_it_has(begin):
    begin("decide", EDGE_FLEET_KEEP="1")
    (begin.folder / "keys/snapshot.key").write_text("rotated")
    (begin.given / "fleet.yaml").write_text("two")
    (begin.given / "pki/ca.crt").write_text("new here")
    begin("decide", EDGE_FLEET_KEEP="1")
    assert (begin.folder / "keys/snapshot.key").read_text() == "rotated"
    assert (begin.folder / "fleet.yaml").read_text() == "two", "settings are always the mounted ones"
    assert (begin.folder / "pki/ca.crt").read_text() == "new here"


def test_without_anything_mounted_the_folder_counts(begin):
    shutil.rmtree(begin.given)
    assert begin("serve", "/srv/fleet") == "serve /srv/fleet"
    assert list(begin.folder.iterdir()) == []
