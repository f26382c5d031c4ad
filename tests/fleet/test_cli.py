"""The command line as an operator types it: init, exit codes, output for people and for programs."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from agent.contract.enrolment import EnrolmentString
from fleet_server import config, setup
from fleet_server.cli import main
from fleet_server.client import Profile, default_profile
from fleet_server.config import ConfigError, ExpirySettings, FleetConfig, Folder
from fleet_server.errors import FleetError
from fleet_server.sections import BrokerSettings
from tests.fleet.stand import Server, environment

# -- init ----------------------------------------------------------------------------------------------------------------------


def test_init_makes_everything_with_safe_modes(own_server):
    data = own_server.data
    secret = [*data.glob("keys/*.key"), *data.glob("pki/*.key"), *own_server.offline.glob("*.key"), own_server.profile]
    assert len(secret) == 3 + 3 + 2 + 1
    for path in secret:
        assert path.stat().st_mode & 0o077 == 0, path
    assert not list(data.rglob("root.key"))
    assert config.load(Folder(data)).fleet == "test"


def test_init_refuses_to_overwrite(own_server, tmp_path):
    before = {p: p.read_bytes() for p in own_server.data.rglob("*") if p.is_file()}
    for extra in ([], ["--keys", tmp_path / "other-keys"]):
        done = own_server.cli("init", own_server.data, *extra)
        assert (done.returncode, "not empty" in done.stderr) == (1, True)
    done = own_server.cli("init", tmp_path / "second", "--keys", own_server.offline)
    assert (done.returncode, "root.key exists" in done.stderr) == (1, True)
    done = own_server.cli("init", tmp_path / "second", "--keys", tmp_path / "k")
    assert (done.returncode, "profile" in done.stderr) == (1, True)
    assert {p: p.read_bytes() for p in own_server.data.rglob("*") if p.is_file()} == before


def test_serve_on_a_folder_that_is_none(own_server, tmp_path):
    done = own_server.cli("serve", tmp_path)
    assert (done.returncode, "edge-fleet init" in done.stderr) == (1, True)


def test_offline_keys_with_a_passphrase(tmp_path):
    folder = Folder(tmp_path / "fleet")
    made = setup.init(
        folder, FleetConfig(fleet="x", hosts=("h",)), offline_keys=tmp_path / "k", profile=tmp_path / "p", passphrase="long enough"
    )  # fmt: skip
    assert b"ENCRYPTED" in made.root_key.read_bytes()
    assert b"ENCRYPTED" in made.releases_key.read_bytes()


# -- fleet.yaml ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loopback_address": "0.0.0.0"}, "127.0.0.1"), ({"loopback_address": "192.0.2.1"}, "127.0.0.1"), ({"loopback_address": "localhost"}, "127.0.0.1"),
        ({"surprise": 1}, "surprise"), ({"operator_port": "x"}, "operator_port"), ({"hosts": []}, "hosts"), ({"fleet": "../x"}, "fleet"),
        ({"expiry": {"timestamp_s": 1}}, "60 seconds"), ({"rollouts": {"tick_s": 0}}, "tick_s"),
    ],
)  # fmt: skip
def test_a_setting_that_is_wrong(tmp_path, change, says):
    good = {"fleet": "x", "hosts": ["h"]}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(ConfigError, match=says):
        config.load(Folder(tmp_path))


def test_what_init_writes_is_read_back(tmp_path):
    made = FleetConfig(
        fleet="x", hosts=("a", "::1"), broker=BrokerSettings(port=1), expiry=ExpirySettings(timestamp_s=100), loopback_port=5
    )
    (tmp_path / "fleet.yaml").write_bytes(config.dump(made))
    assert config.load(Folder(tmp_path)) == made


def test_ipv6_hosts_stand_in_brackets():
    assert FleetConfig(fleet="x", hosts=("::1",)).device_url == "https://[::1]:8444"


# -- commands ------------------------------------------------------------------------------------------------------------------

LISTINGS = (
    ["device", "list"],
    ["release", "list"],
    ["rollout", "list"],
    ["exclusion", "list"],
    ["group", "list"],
    ["token", "list"],
    ["access", "list"],
    ["events"],
    ["audit"],
)


@pytest.mark.parametrize("command", LISTINGS, ids=" ".join)
def test_listings(server, command):
    plain, machine = server.cli(*command), server.cli(*command, "--json")
    assert (plain.returncode, machine.returncode) == (0, 0), plain.stderr + machine.stderr
    assert plain.stdout.strip()
    assert isinstance(json.loads(machine.stdout), list)


def test_a_token_is_alone_on_stdout(server):
    done = server.cli("token", "create", "--group", "canary", "--ttl", "2h")
    assert done.returncode == 0
    string = EnrolmentString.parse(done.stdout)
    assert (done.stdout, string.port) == (f"{string}\n", server.operator)
    made = server.cli("access", "create", "--role", "viewer", "wall")
    assert made.stdout.startswith("ef_")
    assert made.stdout.count("\n") == 1


def test_the_whole_story(server, tmp_path):
    device = server.enrol("cli-1")
    assert "cli-1" in server.cli("device", "list").stdout
    assert "canary" in server.cli("device", "group", "cli-1", "canary").stdout
    assert json.loads(server.cli("device", "show", "cli-1", "--json").stdout)["groups"] == ["canary"]
    server.publish_simple("story", 1)
    server.publish_simple("story", 2)
    started = json.loads(server.cli("rollout", "start", "story:1", "--group", "canary", "--confirm", "--json").stdout)
    assert [w["groups"] for w in started["waves"]] == [["canary"], []]
    assert "canary (now)" in server.cli("rollout", "show").stdout
    assert "paused" in server.cli("rollout", "pause", started["id"]).stdout
    assert "running" in server.cli("rollout", "resume", started["id"]).stdout
    promoted = server.cli("rollout", "promote", started["id"])
    assert (promoted.returncode, "illegal_transition" in promoted.stderr) == (3, True)
    assert "aborted" in server.cli("rollout", "abort", started["id"]).stdout
    watched = server.cli("rollout", "show", started["id"], "--watch")
    assert watched.returncode == 1
    assert server.cli("withdraw", "story:2", "--yes").returncode == 0
    assert "withdrawn" in server.cli("release", "list", "--model", "story").stdout
    assert server.cli("rollback", "story").returncode == 3
    assert server.cli("device", "revoke", "cli-1", "--yes").returncode == 0
    assert device.get("/record").status_code == 403
    assert server.cli("device", "delete", "cli-1", "--yes").returncode == 0
    assert server.cli("device", "show", "cli-1").returncode == 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nonsense"], 2), (["rollout", "start"], 2), (["token", "create", "--ttl", "soon"], 2), (["token", "create", "--uses", "0"], 2),
        (["rollout", "start", "digits"], 3), (["withdraw", "digits", "--yes"], 1), (["device", "show", "nobody"], 3), (["release", "show", "nothing:1"], 3),
        (["rollout", "show", "nobody"], 3), (["token", "revoke", "nobody"], 3),
    ],
)  # fmt: skip
def test_exit_codes(server, arguments, code):
    done = server.cli(*arguments)
    assert done.returncode == code
    assert done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "now"),
    [
        (["devices"], "device list"), (["devices", "show", "dev-1"], "device show"), (["releases", "--model", "x"], "release list"),
        (["rollout", "stopped"], "exclusion list"), (["rollout", "lift", "3"], "exclusion end"),
        (["rollout", "start", "a:1", "--hold"], "--confirm"), (["rollout", "start", "a:1", "b:1", "--together"], "--team"),
    ],
)  # fmt: skip
def test_what_was_called_otherwise_is_named(own_server, arguments, now):
    done = own_server.cli(*arguments)
    assert done.returncode == 2
    assert f"{now}` now" in done.stderr or f"{now} now" in done.stderr


def test_a_setting_that_was_called_otherwise_is_named(tmp_path):
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({"fleet": "x", "hosts": ["h"], "rollouts": {"class_stop": 3}}))
    with pytest.raises(ConfigError, match=r"rollouts\.class_stop is called rollouts\.exclude_after now"):
        config.load(Folder(tmp_path))


def test_a_server_that_is_not_there(own_server):
    done = own_server.cli("device", "list")
    assert (done.returncode, "edge-fleet serve" in done.stderr) == (1, True)


def test_another_authority_is_not_trusted(server, tmp_path):
    other = Server(tmp_path, fresh=True)
    profile = yaml.safe_load(server.profile.read_text())
    wrong = {**profile, "ca": str(other.ca)}
    other.profile.write_text(yaml.safe_dump(wrong))
    assert "names" in other.cli("device", "list").stderr
    other.profile.write_text(yaml.safe_dump({k: v for k, v in wrong.items() if k != "ca_sha256"}))
    done = other.cli("device", "list")
    assert (done.returncode, "cannot prove" in done.stderr) == (1, True)


def test_what_devices_say_cannot_move_the_cursor(server):
    from fleet_server.cli.tables import event_line, safe

    assert "\x1b" not in safe("\x1b[2Jgone[red]")
    event = {"received": 0, "device": "d", "name": "x", "message": "\x1b]0;title\x07\r\nfake line"}
    assert not {"\x1b", "\r", "\n", "\x07"} & set(event_line(event))


def test_people_are_shown_what_programs_get(server, capsys):
    """Of every listing, and of the views of one thing: what its JSON is known by stands in what is printed."""
    from fleet_server.cli import rollout_tables, tables

    server.enrol("shown-1", ["shown"])
    server.publish_simple("shown", 1)
    server.enrolment_string(groups=["shown"])
    begun = server.post("/rollouts", {"release": "shown:1", "waves": ["1", "shown", "50%"]})
    planned = server.post("/rollouts/plan", {"release": "shown:1", "waves": ["1", "shown", "50%"]})
    views = [
        (tables.status, server.get("/status"), server.get("/status")["device_url"]),
        (tables.devices, server.get("/devices")["devices"], "shown-1"),
        (tables.device, server.get("/devices/shown-1"), "shown-1"),
        (tables.groups, server.get("/groups"), "by hand"),
        (tables.group, server.get("/groups/shown"), begun["id"]),
        (tables.releases, server.get("/releases"), "shown"),
        (tables.release, server.get("/releases/shown/1"), "shown"),
        (tables.events, server.get("/events"), "rollout_started"),
        (tables.audit, server.get("/audit"), "rollout.start"),
        (tables.tokens, server.get("/enrolment-tokens"), "shown"),
        (tables.access_tokens, server.get("/access-tokens"), "admin"),
        (tables.authorities, server.get("/ca"), server.get("/status")["ca_sha256"][:8]),
        (rollout_tables.rollouts, server.get("/rollouts"), begun["id"]),
        (rollout_tables.rollout, begun, "wave 2: shown"),
        (rollout_tables.standings, server.get(f"/rollouts/{begun['id']}/devices")["devices"], "offline"),
        (rollout_tables.previews, planned, "group shown"),
        (rollout_tables.exclusions, [], "no"),
    ]
    for show, data, word in views:
        show(data)
        assert word in capsys.readouterr().out, show.__name__
    server.post(f"/rollouts/{begun['id']}/abort")


MESSAGE = "the share of failed requests rose from 0.000 to 0.412 over 120 requests " * 4


def test_nothing_is_folded_in_a_pipe(capsys):
    """One fact, one line: what grep and awk are given does not depend on the width of a terminal that is not there."""
    from fleet_server.cli import rollout_tables, tables

    answer = {"release": 4, "outcome": "rolled_back", "reason": "error_ratio", "message": MESSAGE, "at": 0.0}
    model = {"serving": 3, "variant": "cpu", "phase": "rolling_back", "wanted": 4, "answers": [answer]}
    device = {
        "id": "d" * 60, "revoked": False, "online": True, "last_seen": None, "groups": [f"group-{n}" for n in range(30)], "record_serial": 1, "labels": {"site": "b" * 60},
        "agent_version": "1", "hardware": None, "problem": MESSAGE, "models": {"digits": model},
    }  # fmt: skip
    tables.device(device)
    shown = capsys.readouterr().out
    assert f"rolled back: error_ratio {MESSAGE} (" in shown
    assert f"problem {MESSAGE}\n" in shown
    assert "serves 3 (cpu), rolling back, wanted 4\n" in shown
    tables.devices([device, {**device, "id": "short"}])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["DEVICE", "d" * 60, "short"]
    assert "group-0, group-1, " in lines[2]
    assert lines[2].rstrip().endswith("never")
    witness = {"device": "dev-1", "standing": "rolled_back", "reason": "error_ratio", "message": MESSAGE}
    verdict = {"verdict": "fail", "why": "1 rolled back; none allowed", "counts": {"rolled_back": 1}, "evidence": [witness]}
    rollout = {
        "team": [], "window": None, "mode": "install", "exclusions": [],
        "id": "r1-0000", "model": "digits", "release": 4, "previous": 3, "state": "aborted", "reason": "", "wave": 0, "verdict": verdict, "waits_for": None,
        "waves": [{"groups": [], "permille": 1000, "count": 0}],
    }  # fmt: skip
    rollout_tables.rollout(rollout)
    shown = capsys.readouterr().out
    assert f"    dev-1 rolled back: error_ratio {MESSAGE}\n" in shown
    assert "(1 rolled back)" in shown


def test_where_the_profile_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGE_FLEET_PROFILE", str(tmp_path / "mine"))
    assert default_profile() == tmp_path / "mine"
    monkeypatch.delenv("EDGE_FLEET_PROFILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_profile() == tmp_path / "edge-fleet" / "profile.yaml"
    with pytest.raises(FleetError, match="does not exist"):
        Profile.read(tmp_path / "none")
    (tmp_path / "bad").write_text("- not a profile")
    with pytest.raises(FleetError, match="cannot be used"):
        Profile.read(tmp_path / "bad")


def commands(group, path=()):
    for name, command in group.commands.items():
        yield [*path, name]
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands(main)), ids=" ".join)
def test_every_help_has_an_example(path):
    from click.testing import CliRunner

    done = CliRunner().invoke(main, [*path, "--help"])
    assert done.exit_code == 0
    group = path in (["rollout"], ["token"], ["access"], ["device"], ["release"], ["exclusion"], ["ca"])
    assert group or f"\n  edge-fleet {' '.join(path)}" in done.output, "an example stands on a line of its own"
    assert not {"\\", "\b"} & set(done.output)


def test_the_help_shows_one_example_in_a_line():
    from click.testing import CliRunner

    lines = CliRunner().invoke(main, ["--help"]).output.splitlines()
    assert sum(line.startswith("  edge-fleet ") for line in lines) == 5


def test_help_needs_none_of_the_heavy_modules():
    heavy = {"requests", "rich", "fastapi", "sqlalchemy", "tuf", "numpy", "fleet_server.simulation"}
    code = f"import sys, fleet_server.cli; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True, env=environment()
    )
    assert done.stdout == "\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    done = subprocess.run(
        [sys.executable, "-m", "fleet_server.cli", "completion", shell], capture_output=True, text=True, timeout=30, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0
    assert "_EDGE_FLEET_COMPLETE" in done.stdout


def test_openapi_needs_no_server(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fleet_server.cli", "openapi"], capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert json.loads(done.stdout)["info"]["title"]


def test_a_team_of_rollouts(server):
    for model in ("left", "right"):
        server.publish_simple(model, 1)
    alone = server.cli("rollout", "start", "left:1", "right:1")
    assert alone.returncode == 2
    assert "--team goes with two or more" in alone.stderr
    begun = server.cli("rollout", "start", "left:1", "right:1", "--team", "--window", "sat,sun 02:00-05:00")
    assert begun.returncode == 0, begun.stderr
    assert "in a team with right:1" in begun.stdout
    assert "sat,sun 02:00-05:00" in begun.stdout
    found = server.get("/rollouts")
    assert {one["team"][0]["model"] for one in found if one["model"] in {"left", "right"}} == {"left", "right"}
    assert "no hardware class is excluded" in server.cli("exclusion", "list").stdout
    assert server.cli("exclusion", "end", "7").returncode == 3
    assert server.cli("rollout", "abort", found[0]["id"]).returncode == 0
    assert {one["state"] for one in server.get("/rollouts") if one["model"] in {"left", "right"}} == {"aborted"}
