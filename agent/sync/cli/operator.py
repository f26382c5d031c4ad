"""`edge-agent updates | why | approve | hold | unhold | rollback | quarantine`: an operator on the device itself. All work
without a network.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import click

from agent.store import Store, StoreError
from agent.sync.cli.common import complete_model, config_option, fail, json_option, load, model_argument


@click.command()
@config_option
@json_option
@click.option("--forget", metavar="MODEL:VERSION", help="The same as `edge-agent quarantine clear MODEL VERSION`.")
def updates(config_path: Path | None, forget: str | None, *, as_json: bool) -> None:
    """Show where each model's update stands, what it waits for, its answers, and the releases this device refuses.

    \b
    Examples:
      edge-agent updates
      edge-agent updates --json | jq '.digits.waiting_for'
    """
    config = load(config_path)
    from agent.contract.names import ReleaseRef
    from agent.sync.operator import actions, overview

    store = Store(config.store)
    try:
        if forget is not None:
            ref = ReleaseRef.parse(forget)
            done = actions.clear(store, ref.model, ref.version)
            click.echo(f"{ref} may be tried again" if done else f"{ref} was not refused here")
            return
        models = overview.read(store)
    except (ValueError, OSError) as error:
        fail(str(error))
    if as_json:
        click.echo(json.dumps(models, indent=2))
    else:
        click.echo(overview.text(models), nl=False)


@click.command()
@model_argument
@config_option
@json_option
def why(model: str, config_path: Path | None, *, as_json: bool) -> None:
    """Explain why a model runs what it runs: from the fleet's word over every gate to the bytes that serve.

    \b
    Examples:
      edge-agent why digits
      edge-agent why digits --json | jq '.gates[-1]'
    """
    config = load(config_path)
    from agent.sync.operator import why as explanation
    from agent.sync.operator import why_text

    with _told():
        found = explanation.explain(config, model)
    click.echo(json.dumps(found, indent=2) if as_json else why_text.text(found), nl=as_json)


@click.command()
@model_argument
@click.argument("release", type=int, required=False)
@config_option
@json_option
def approve(model: str, release: int | None, config_path: Path | None, *, as_json: bool) -> None:
    """Let the release that waits for approval serve. RELEASE: only if it is this one.

    It ends when another release is wanted. Exit status 1 when nothing of the model is wanted, or another release is.

    \b
    Examples:
      edge-agent approve digits
      edge-agent approve digits 5
    """
    from agent.sync.operator import actions

    with _told(), _store(config_path) as store:
        version = actions.approve(store, model, release)
    _answer(
        as_json,
        {"model": model, "approved": version},
        f"{model}:{version} may serve here; `edge-agent updates` shows how it gets on",
    )


def _is_unhold(ctx: click.Context, _parameter: click.Parameter, value: object) -> None:
    """`hold --lift` was a second name of `unhold`."""
    if value:
        raise click.UsageError(
            f"`edge-agent hold {ctx.params.get('model', 'MODEL')} --lift` is called `edge-agent unhold` now", ctx
        )


@click.command()
@model_argument
@click.argument("release", type=int, required=False)
@click.option("--lift", is_flag=True, hidden=True, expose_value=False, callback=_is_unhold)
@config_option
@json_option
def hold(model: str, release: int | None, config_path: Path | None, *, as_json: bool) -> None:
    """Keep a model on RELEASE, or on what serves now, whatever the fleet wants. Only a withdrawal is stronger.

    \b
    Examples:
      edge-agent hold digits
      edge-agent hold digits 3
    """
    from agent.sync.operator import actions

    with _told(), _store(config_path) as store:
        version = actions.hold(store, model, release)
    _answer(
        as_json, {"model": model, "held": version}, f"{model} is held on release {version}; `edge-agent unhold {model}` ends it"
    )


@click.command()
@model_argument
@config_option
@json_option
def unhold(model: str, config_path: Path | None, *, as_json: bool) -> None:
    """Let a model follow the fleet again, after `hold` or `rollback`.

    \b
    Example:
      edge-agent unhold digits
    """
    from agent.sync.updating.holds import Holds

    with _told(), _store(config_path) as store:
        done = Holds(store.private / "holds").unhold(model)
    _answer(as_json, {"model": model, "unheld": done}, f"{model} follows the fleet again" if done else f"{model} was not held")


@click.command()
@model_argument
@click.option("--to", "version", type=int, help="The release to roll back to  [default: the last other one committed here].")
@config_option
@json_option
def rollback(model: str, version: int | None, config_path: Path | None, *, as_json: bool) -> None:
    """Roll back to a release that was committed on this device, and stay on it. Works without any network.

    \b
    Examples:
      edge-agent rollback digits
      edge-agent rollback digits --to 2
    """
    from agent.sync.operator import actions

    with _told(), _store(config_path) as store:
        version = actions.roll_back(store, model, version)
    text = f"{model} rolls back to release {version} within seconds, and stays there until `edge-agent unhold {model}`"
    _answer(as_json, {"model": model, "held": version}, text)


@click.group()
def quarantine() -> None:
    """The releases that this device refuses, and why."""


@quarantine.command("list")
@click.argument("model", required=False, shell_complete=complete_model)
@config_option
@json_option
def quarantine_list(model: str | None, config_path: Path | None, *, as_json: bool) -> None:
    """List refused releases, with the reason and its numbers.

    \b
    Examples:
      edge-agent quarantine list
      edge-agent quarantine list digits --json
    """
    import msgspec

    from agent.sync.operator import actions, overview

    with _told(), _store(config_path) as store:
        found = actions.quarantined(store, model)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    elif not found:
        click.echo("this device refuses no release")
    else:
        for name, entries in found.items():
            for entry in entries:
                click.echo(overview.refusal(name, entry))


@quarantine.command("clear")
@model_argument
@click.argument("release", type=int, required=False)
@config_option
@json_option
def quarantine_clear(model: str, release: int | None, config_path: Path | None, *, as_json: bool) -> None:
    """Let a refused release be tried again; without RELEASE all of the model. Exit status 1 when RELEASE was not refused.

    \b
    Examples:
      edge-agent quarantine clear digits 4
      edge-agent quarantine clear digits
    """
    from agent.sync.operator import actions

    with _told(), _store(config_path) as store:
        cleared = actions.clear(store, model, release)
        if release is not None and not cleared:
            raise StoreError(f"{model}:{release} is not refused here; `edge-agent quarantine list` shows what is")
    text = (
        f"may be tried again: {', '.join(f'{model}:{number}' for number in cleared)}"
        if cleared
        else f"nothing of {model} was refused here"
    )
    _answer(as_json, {"model": model, "cleared": cleared}, text)


@contextlib.contextmanager
def _store(config_path: Path | None) -> Iterator[Store]:
    store = Store(load(config_path).store)
    store.check_format()
    yield store


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (StoreError, ValueError, OSError) as error:
        fail(str(error))


def _answer(as_json: bool, data: dict[str, object], text: str) -> None:
    click.echo(json.dumps(data) if as_json else text)
