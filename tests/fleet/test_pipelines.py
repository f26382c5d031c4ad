"""The command line where nobody sits: doing a thing again, limits of time, secrets and addresses from the environment, stable exit codes."""

from __future__ import annotations

import json
import threading

import pytest
import yaml

from fleet_server.releases import keys
from tests import warm
from tests.fleet.stand import environment
from tests.fleet.test_keys import describe


def cli(server, *arguments, stdin="", profile=True, **variables):
    """`edge-fleet …` as a pipeline runs it: no terminal, and only these variables."""
    named = ["--profile", str(server.profile)] if profile else []
    return warm.run("fleet_server.cli", [*named, *map(str, arguments)], stdin=stdin, env=environment(**variables))


def publish(server, path, *more):
    return cli(server, "publish", path, "--key", server.releases_key, "--yes", *more)


def test_the_very_release_again_is_a_success(server, tmp_path):
    path = describe(tmp_path, "again", 1)
    assert publish(server, path).returncode == 0
    before = server.get("/publishing", params={"model": "again"})["releases"]

    again = publish(server, path)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "again:1 is published already, and the same")
    told = json.loads(publish(server, path, "--json").stdout)
    assert (told["release"], told["already_published"]) == ("again:1", True)
    unasked = cli(server, "publish", path, "--key", server.releases_key)
    assert unasked.returncode == 0, "nothing is signed, so nobody has to agree"
    assert server.get("/publishing", params={"model": "again"})["releases"] == before

    (tmp_path / "weights.bin").write_bytes(b"other bytes")
    other = publish(server, path)
    assert other.returncode != 0
    assert "larger" in other.stderr


def test_two_pipelines_with_the_very_release_at_once(server, tmp_path):
    path = describe(tmp_path, "twice", 1)
    done = []
    threads = [threading.Thread(target=lambda: done.append(publish(server, path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert len(server.get("/releases", params={"model": "twice"})) == 1


def test_a_withdrawal_again_is_a_success(server):
    server.publish_simple("gone", 1)
    first, again = (cli(server, "withdraw", "gone:1", "--yes") for _ in range(2))

    assert (first.returncode, again.returncode, "already" in again.stdout) == (0, 0, True)


@pytest.mark.parametrize(
    "arguments", [("withdraw", "ask:1"), ("device", "delete", "nobody"), ("device", "revoke", "nobody")], ids=" ".join
)
def test_where_nobody_can_be_asked(arguments, server):
    if arguments[0] == "withdraw":  # it shows first what it would do, so there must be one
        server.publish_simple("ask", 1)
    done = cli(server, *arguments)

    assert done.returncode == 1
    assert "say --yes" in done.stderr


def test_watching_has_an_end(server):
    server.publish_simple("watched", 1)
    begun = json.loads(cli(server, "rollout", "start", "watched:1", "--json").stdout)
    late = cli(server, "rollout", "show", begun["id"], "--watch", "--timeout", "1s")
    assert (late.returncode, "is not over after 1 s" in late.stderr) == (4, True)
    assert f"{begun['id']}" in late.stdout
    server.post(f"/rollouts/{begun['id']}/abort")
    over = cli(server, "rollout", "show", begun["id"], "--watch", "--timeout", "1m")
    assert over.returncode == 1, "it was aborted"
    assert cli(server, "rollout", "show", begun["id"], "--timeout", "1m").returncode == 2
    assert cli(server, "rollout", "show", begun["id"], "--watch", "--timeout", "soon").returncode == 2


def test_a_server_that_is_away_while_a_rollout_is_watched(own_server):
    running = own_server.start()
    running.publish_simple("m", 1)
    begun = json.loads(cli(running, "rollout", "start", "m:1", "--json").stdout)
    running.stop()
    done = cli(running, "rollout", "show", begun["id"], "--watch", "--timeout", "2s")

    assert done.returncode == 4, "it is waited for, as long as the limit allows"
    assert cli(running, "rollout", "show", begun["id"]).returncode == 1


WHERE = [
    # name, variables, exit status, what stderr says
    ("everything", {"URL": True, "TOKEN": True, "CA": True}, 0, ""),
    ("no CA that counts", {"URL": True, "TOKEN": True}, 1, "cannot prove"),
    ("an address without a token", {"URL": True, "CA": True}, 1, "EDGE_FLEET_TOKEN"),
    ("nothing at all", {}, 1, "EDGE_FLEET_URL"),
    ("a token that is none", {"URL": True, "TOKEN": "x", "CA": True}, 3, "bad_token"),
]


@pytest.mark.parametrize(("name", "variables", "code", "says"), WHERE, ids=[row[0] for row in WHERE])
def test_address_and_token_from_the_environment(name, variables, code, says, server, tmp_path):
    known = {"URL": server.url, "TOKEN": server.token, "CA": str(server.ca)}
    given = {f"EDGE_FLEET_{name}": known[name] if value is True else value for name, value in variables.items()}
    done = cli(server, "status", "--json", profile=False, XDG_CONFIG_HOME=str(tmp_path), **given)

    assert (done.returncode, says in done.stderr) == (code, True), done.stderr


def test_a_token_of_the_environment_stands_over_that_of_the_profile(server):
    operator = server.make_token("operator")
    done = cli(server, "access", "list", profile=False, EDGE_FLEET_PROFILE=str(server.profile), EDGE_FLEET_TOKEN=operator)
    assert done.returncode == 3, "an operator may not see access tokens, the profile's admin may"
    named = cli(server, "access", "list", EDGE_FLEET_TOKEN=operator)
    assert named.returncode == 0, "a profile that is named on the command line stands over the environment"


def test_a_token_never_goes_to_another_address(server, tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"url": "https://127.0.0.1:1", "token": "secret"}))
    done = cli(server, "status", profile=False, EDGE_FLEET_PROFILE=str(profile), EDGE_FLEET_URL=server.url)

    assert (done.returncode, "for another server" in done.stderr) == (1, True)


SECRETS = [
    ("the variable", {"EDGE_FLEET_KEY_SECRET": "long enough"}, ""),
    ("a file", {"EDGE_FLEET_KEY_SECRET_FILE": "FILE"}, ""),
    ("standard input", {"EDGE_FLEET_KEY_SECRET_FILE": "-"}, "long enough\n"),
]


@pytest.mark.parametrize(("name", "variables", "stdin"), SECRETS, ids=[row[0] for row in SECRETS])
def test_passphrases_of_new_keys_come_from_where_those_of_old_ones_do(name, variables, stdin, own_server, tmp_path):
    (tmp_path / "secret").write_text("long enough\nand a line that does not count\n")
    given = {name: str(tmp_path / "secret") if value == "FILE" else value for name, value in variables.items()}
    path = tmp_path / "root-2.key"
    made = cli(own_server, "keys", "make", path, "--passphrase", stdin=stdin, **given)

    assert made.returncode == 0, made.stderr
    assert keys.is_encrypted(path)
    assert keys.load(path, passphrase="long enough").public_key.keyid[:12] in made.stdout
    shown = cli(own_server, "keys", "public", path, stdin=stdin, **given)
    assert json.loads(shown.stdout)["keyid"].startswith(made.stdout[:12])


@pytest.mark.parametrize("variables", [{"EDGE_FLEET_KEY_SECRET": ""}, {"EDGE_FLEET_KEY_SECRET_FILE": "/dev/null"}])
def test_an_empty_passphrase_makes_no_key(variables, own_server, tmp_path):
    done = cli(own_server, "keys", "make", tmp_path / "k.key", "--passphrase", **variables)

    assert (done.returncode, "protects nothing" in done.stderr) == (1, True)
    assert not (tmp_path / "k.key").exists()
