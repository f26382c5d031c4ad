"""`edge-agent import`: a bundle from a stick, updated from as from the fleet server. `sync` does the work when it runs; else
this process does.

Exit status: 0 it serves (or is under watch, with `sync` running), 1 something here failed, 2 usage, 3 refused: of another
fleet, older than what this device knows, wrongly signed, expired; 4 not a whole bundle; 5 accepted, but this device refused a
release or rolled it back; 6 accepted, and not done yet: it waits for something; 7 no space.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

import click

from agent.sync.cli.common import config_option, fail, json_option, load

if TYPE_CHECKING:
    from agent.config import AgentConfig
    from agent.store import Store
    from agent.sync.fetching.spool import Told
    from agent.sync.identity import Identity

FAILED, REFUSED, NOT_WHOLE, RELEASE_REFUSED, NOT_DONE, NO_SPACE = 1, 3, 4, 5, 6, 7
POLL_S = 0.2
TOLD_WITHIN_S = 120.0
"""`sync` may be asking its server just then, and a network that swallows everything draws that out."""


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--no-wait", is_flag=True, help="Return as soon as the bundle was verified. Only with `sync` running.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=3600.0, show_default=True, metavar="SECONDS", help="How long to wait for the releases.")  # fmt: skip
@config_option
@json_option
def import_(file: Path, config_path: Path | None, timeout_s: float, *, no_wait: bool, as_json: bool) -> None:
    """Update this device from a bundle FILE that `edge-fleet bundle` wrote. Needs no network; everything in it is verified.

    \b
    Examples:
      edge-agent import /media/usb/fleet.bundle
      edge-agent import fleet.bundle --json | jq .models
    Exit status: 0 it serves, 3 the bundle is refused, 4 it is not whole, 5 a release is refused, 6 not done yet, 7 no space.
    """
    from agent.contract.bundle import BundleError
    from agent.store import Store, StoreError
    from agent.sync import identity
    from agent.sync.fetching.folders import open_regular
    from agent.sync.identity import IdentityError
    from agent.sync.problems import Problem

    config = load(config_path)
    try:
        with open_regular(file.resolve()) as opened:
            _become_owner(config.store)
            store = Store.create(config.store)
            who = identity.load(config.sync.identity)
            id_ = _unpack(opened, store, who, config, quiet=as_json)
            _Import(config, who, store, id_, as_json=as_json).run(None if no_wait else timeout_s)
    except BundleError as error:
        _end(NOT_WHOLE, f"{file} is not a whole bundle: {error}", as_json=as_json)
    except Problem as problem:
        code = {"no_space": NO_SPACE, "store_failed": FAILED}.get(problem.reason.value, REFUSED)
        _end(code, problem.message, as_json=as_json, reason=problem.reason.value)
    except (StoreError, IdentityError) as error:
        fail(str(error))
    except OSError as error:
        code = NO_SPACE if error.errno == 28 else FAILED
        _end(code, f"importing {file} failed: {error.strerror or error}", as_json=as_json)


def _become_owner(store: Path) -> None:
    """Root becomes the user that owns the store, so that `sync` can read and remove what it is given."""
    with contextlib.suppress(FileNotFoundError):
        owner = store.stat()
        if os.geteuid() == 0 and owner.st_uid != 0:
            os.setgroups([])
            os.setgid(owner.st_gid)
            os.setuid(owner.st_uid)


def _unpack(file: IO[bytes], store: Store, who: Identity, config: AgentConfig, *, quiet: bool) -> str:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from agent.sync.fetching.spool import Spool

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bars:
        bar = bars.add_task("unpacking", total=None)
        return Spool(store).unpack(
            file, who.address.fleet, who.device, reserve_bytes=config.sync.disk_reserve_bytes,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )  # fmt: skip


class _Import:
    """Follows a bundle that is in the spool until it is known what becomes of it."""

    def __init__(self, config: AgentConfig, who: Identity, store: Store, id_: str, *, as_json: bool) -> None:
        self._config, self._who, self._store, self._id, self._as_json = config, who, store, id_, as_json
        self._shown: dict[str, str] = {}

    def run(self, timeout_s: float | None) -> NoReturn:
        from agent.sync.exclusive import StoreBusy, exclusive

        try:
            with exclusive(self._store):
                self._say("edge-agent sync is not running: this process does the update")
                with self._working():
                    code, message = self._follow(timeout_s or TOLD_WITHIN_S, alone=True)
        except StoreBusy:
            code, message = self._follow(timeout_s, alone=False)
        _end(code, message, as_json=self._as_json, models=self._shown)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        from agent.sync.app import SyncApp

        app = SyncApp(self._config, self._who, self._store, networked=False)
        app.start()
        try:
            yield
        finally:
            app.stop()

    def _follow(self, timeout_s: float | None, *, alone: bool) -> tuple[int, str]:
        from agent.sync.fetching.spool import Spool

        spool, began = Spool(self._store), time.monotonic()
        while (told := spool.told(self._id)) is None:
            if time.monotonic() - began > TOLD_WITHIN_S:
                return NOT_DONE, "sync has not read the bundle yet; it will"
            time.sleep(POLL_S)
        if not told.accepted:
            return REFUSED, f"{told.reason.value if told.reason else 'refused'}: {told.message}"
        if timeout_s is None:
            return 0, f"the bundle is verified ({told.message}); sync does the rest"
        return self._wait(told, began + timeout_s, alone=alone)

    def _wait(self, told: Told, end: float, *, alone: bool) -> tuple[int, str]:
        waiting = dict(told.wanted)
        worst, messages = 0, []
        while waiting and time.monotonic() < end:
            for model, version in list(waiting.items()):
                found = self._outcome(model, version, alone=alone)
                if found is not None:
                    worst = max(worst, found[0])
                    messages.append(found[1])
                    del waiting[model]
            if waiting:
                time.sleep(POLL_S)
        if waiting:
            return NOT_DONE, "; ".join(
                [*messages, *(f"{model}:{version} is not done yet" for model, version in waiting.items())]
            )
        return worst, "; ".join(messages) or "verified; there is nothing new in it for this device"

    def _outcome(self, model: str, version: int, *, alone: bool) -> tuple[int, str] | None:
        """The exit code and a sentence once there is nothing more to wait for here."""
        from agent.contract.reports import Phase
        from agent.store import StoreError
        from agent.sync.updating.holds import Holds
        from agent.sync.updating.states import States

        state = States(self._store.private / "updates").read(model)
        if (held := Holds(self._store.private / "holds").held(model)) is not None and held != version:
            return NOT_DONE, f"{model} is held on release {held} here (edge-agent unhold {model})"
        if state is None:
            return None
        why = f" ({state.failure.message})" if state.phase is Phase.WAITING and state.failure is not None else ""
        self._show(model, state.phase.value + why)
        try:
            selection = self._store.selection(model)
        except StoreError:
            return None
        serves = selection is not None and selection.active.version == version
        if state.phase is Phase.STEADY and serves:
            return 0, f"{model}:{version} serves"
        if state.phase is Phase.WATCHING and serves and not alone:
            return 0, f"{model}:{version} serves and is under watch"
        if state.phase is Phase.QUARANTINED and state.wanted == version:
            last = next((answer for answer in reversed(state.answers) if answer.release == version), None)
            why = f": {last.reason}: {last.message}" if last else ""
            return RELEASE_REFUSED, f"{model}:{version} was refused here{why}"
        if state.target == version and state.phase is Phase.SHADOWING:
            return NOT_DONE, f"{model}:{version} runs beside the one that serves, until the fleet says more"
        if state.target == version and state.phase is Phase.WAITING and state.waiting_for not in {None, "retry"}:
            return NOT_DONE, f"{model}:{version} passed its trial and waits for {state.waiting_for}"
        return None

    def _show(self, model: str, phase: str) -> None:
        if self._shown.get(model) != phase:
            self._shown[model] = phase
            self._say(f"{model}: {phase}")

    def _say(self, text: str) -> None:
        if not self._as_json:
            click.echo(text, err=True)


def _end(
    code: int, message: str, *, as_json: bool, reason: str | None = None, models: dict[str, str] | None = None
) -> NoReturn:
    if as_json:
        click.echo(json.dumps({"status": code, "message": message, "reason": reason, "models": models or {}}, indent=2))
    elif code == 0:
        click.echo(message)
    else:
        click.echo(f"edge-agent: {message}", err=True)
    sys.exit(code)
