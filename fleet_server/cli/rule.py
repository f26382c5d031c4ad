"""`edge-fleet rule …`."""

from __future__ import annotations

import click

from fleet_server.cli import rollout_tables
from fleet_server.cli.command import Group, agreed, connected, reports_errors, segment, show, with_json, with_scope
from fleet_server.errors import Invalid


@click.group(cls=Group)
def rule() -> None:
    """Scopes that have a release of a model of their own. A rule comes to be when a rollout with --scope completes.

    edge-fleet rule list
    """


@rule.command("list")
@click.option("--model", help="Only this model.")
@with_json
@click.pass_context
@reports_errors
def rule_list(ctx: click.Context, model: str | None, *, as_json: bool) -> None:
    """Lists the rules of each model in the order in which devices look at them; the last one is everyone's.

    edge-fleet rule list --model digits
    """
    with connected(ctx) as client:
        found = [one for one in client.get("/models") if model in {None, one["model"]}]
    show(found, as_json, rollout_tables.rules)


@rule.command("remove")
@click.argument("model")
@with_scope
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_json
@click.pass_context
@reports_errors
def rule_remove(ctx: click.Context, model: str, scopes: tuple[str, ...], *, yes: bool, as_json: bool) -> None:
    """Ends a rule: its devices follow the next one at once, in the end what everyone does.

    edge-fleet rule remove digits --scope group:kiosk
    """
    if not scopes:
        raise Invalid("say which rule with --scope; `edge-fleet rule list` shows them")
    agreed(f"Let {' and '.join(scopes)} follow the next rule of {model} at once?", yes=yes)
    with connected(ctx) as client:
        done = client.post(f"/models/{segment(model)}/rules/remove", {"scope": list(scopes)})
    show(
        done,
        as_json,
        lambda data: click.echo(f"{rollout_tables.scope(data['scope'])} follows the next rule of {data['model']}"),
    )
