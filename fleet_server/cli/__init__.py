"""edge-fleet: makes and runs the fleet server, and is its operators' command line. Exit codes: 0 ok, 1 failed, 2 usage, 3
refused by the server, 4 the time ran out, 5 a person must decide.
"""

from __future__ import annotations

from pathlib import Path

import click

from fleet_server.cli import (
    access,
    backup,
    build,
    bundle,
    ca,
    describe,
    device,
    evidence,
    exclusion,
    group,
    hands,
    journal,
    keys,
    processes,
    rabbitmq,
    release,
    rollout,
    rollout_status,
    rule,
    server,
    simulate,
    token,
)
from fleet_server.cli.command import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="Where the server and your token stand [env: EDGE_FLEET_PROFILE]; or both from the environment: EDGE_FLEET_URL, EDGE_FLEET_TOKEN, EDGE_FLEET_CA (a file).",
)
@click.version_option(package_name="edge-inference-agent")
def main(profile: Path | None) -> None:
    """Runs a fleet of edge inference devices: signed releases, staged rollouts, rollback.

    edge-fleet init /srv/fleet --fleet demo --host fleet.example.com
    edge-fleet serve /srv/fleet
    edge-fleet token create --group canary        # the string a device enrols with
    edge-fleet publish RELEASE.yaml --key releases.key
    edge-fleet rollout start digits:4 --group canary
    """
    del profile  # read from the context by `connected`


for command in (
    server.init, server.serve, processes.api, processes.ingest, processes.decide, processes.gather,
    server.doctor, server.renew_root, backup.backup, backup.restore,
    build.build, release.publish, release.release, release.withdraw, release.reinstate,
    keys.keys, keys.publisher, ca.ca,
    rollout.rollout, rollout.rollback, exclusion.exclusion, rule.rule, bundle.bundle, simulate.simulate,
    device.device, group.group, token.token, journal.events, access.access, journal.audit, server.status,
    rabbitmq.rabbitmq_files, describe.openapi, describe.completion,
):  # fmt: skip
    main.add_command(command)
for command in (rollout_status.status, hands.supersede, hands.complete, hands.retry):
    rollout.rollout.add_command(command)
rollout.rollout.add_command(evidence.rollout_evidence)
