"""The power goes at random moments of updates: the device's file system is shut down without flushing anything, all its processes die,
and the disk is mounted again as the journal left it.

After every cut: what is selected is whole, every blob is what its name says, every state can be read. `serve` starts and gives right
answers from a release that may serve. Once the cuts of an update are over it ends as it would have without them.

EDGE_CUTS is how many there are in all; EDGE_SEED makes a run again.
"""

from __future__ import annotations

import os
import random
import threading
import time
import traceback
import uuid
from collections import Counter
from pathlib import Path

import pytest
from processes import command

from agent.store import Selection, Store, hash_file
from agent.sync.updating.states import States
from tests.e2e.world import GOOD, MODEL, TREACHEROUS, WEAK, World
from tests.survival.card import Card

pytestmark = [pytest.mark.survival, pytest.mark.mosquitto, pytest.mark.timeout(1800)]

CUTS = int(os.environ.get("EDGE_CUTS", "300"))
SEED = int(os.environ.get("EDGE_SEED", str(random.randrange(1 << 32))))
WORLDS = 3
"""Side by side, since most of the time is waiting."""

PHASES = ("fetching", "trialing", "shadowing", "canarying", "activating", "watching", "rolling_back")
NEW_BOOT = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
LONGEST_S = 3.0
"""A cut comes within this time of the start of an update, or of the start after the cut before."""


def test_a_cut_loses_what_was_not_synced_and_nothing_else(card: Card) -> None:
    """The tool of this file works: otherwise everything below would pass without saying anything."""
    synced, lost = card.path / "synced", card.path / "lost"
    with synced.open("wb") as out:
        out.write(b"x" * 5000)
        out.flush()
        os.fsync(out.fileno())
    lost.write_bytes(b"y" * 5000)
    card.cut()
    with pytest.raises(OSError, match="Input/output error"):
        synced.read_bytes()
    card.power_up()
    assert synced.read_bytes() == b"x" * 5000
    assert not lost.exists()
    card.check()


def test_power_cuts(tmp_path: Path) -> None:
    print(f"\n{CUTS} cuts, EDGE_SEED={SEED}")
    tables = [Blackouts(tmp_path / f"world-{n}", CUTS // WORLDS, SEED + n) for n in range(WORLDS)]
    threads = [threading.Thread(target=table.run) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuts, ends = Counter[str](), Counter[str]()
    for table in tables:
        cuts += table.cuts
        ends += table.ends
    print(f"cut in: {dict(cuts)}\nupdates ended: {dict(ends)}")
    print(f"answers: {sum(table.answered for table in tables)}, wrong: {sum(len(table.wrong) for table in tables)}")
    assert [table.error for table in tables if table.error] == []
    assert cuts.total() >= CUTS // WORLDS * WORLDS


class Blackouts:
    """A device on a card of its own, its fleet, and the cuts."""

    def __init__(self, folder: Path, cuts: int, seed: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._to_do = cuts
        self._dice = random.Random(seed)
        self.cuts: Counter[str] = Counter()
        """By the phase the disk held afterwards."""
        self.ends: Counter[str] = Counter()
        self.answered = 0
        self.wrong: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with Card(self._folder) as self._card, World(self._folder, home=self._card.path) as self._world:
                self._card.sync()
                self._world.kill("sync")
                self._world.kill("serve")
                self._new_boot()
                self._world.until("serve has a model", lambda: self._world.serving() is not None)
                try:
                    while self.cuts.total() < self._to_do:
                        self._update()
                finally:
                    self._world.traffic.stop()
                    self.answered, self.wrong = self._world.traffic.answered, self._world.traffic.wrong
                    self._world.processes.end()
        except BaseException as error:  # noqa: BLE001 - told by the test, which waits for all threads
            traceback.print_exc()
            self.error = error

    def _update(self) -> None:
        """An update with two or three cuts, and its end."""
        world, dice = self._world, self._dice
        before = world.serving()
        model = dice.choice((GOOD, WEAK, TREACHEROUS))
        release = world.update(model, ballast=dice.random() < 0.25, careful=dice.random() < 0.5)
        for _ in range(dice.choice((2, 3, 3))):
            self._wait(release)
            self._cut()
            assert world.serving() in {before, release}, "a release serves that nobody wanted"
        world.until(f"an answer about release {release}", lambda: world.answer(release) and world.at_rest(), limit_s=60)
        self._ended(release, model, before)

    def _ended(self, release: int, model: str, before: int | None) -> None:
        world = self._world
        answer = world.answer(release)
        if answer["outcome"] == "committed":
            assert model != TREACHEROUS, f"a bad release was committed: {answer}"
            world.until(f"release {release} serves", lambda: world.serving() == release)
        else:
            known = {"error_ratio", "shadow_errors"} if model == TREACHEROUS else set()
            # a machine that goes down in the middle of a watch, an activation or a trial for the fourth time is what a bad release does to it
            assert answer["reason"] in known | {"interrupted_too_often"}, answer
            world.until(f"release {before} serves again", lambda: world.serving() == before)
        self.ends[f"{answer['outcome']} {answer['reason'] or ''}".strip()] += 1
        assert world.traffic.wrong == []

    def _wait(self, release: int) -> None:
        """Until a moment that is worth a cut: any, or one close to where a phase begins."""
        dice, state = self._dice, self._world.state
        end = time.monotonic() + dice.uniform(0, LONGEST_S)
        phase = dice.choice((None, *PHASES))
        while time.monotonic() < end:
            found = state()
            if phase is not None and (found["phase"], found["target"]) == (phase, release):
                time.sleep(dice.uniform(0, 0.1))
                return
            time.sleep(0.0005)

    def _cut(self) -> None:
        world = self._world
        self._power_off()
        self._card.power_up()
        self.cuts[self._check_disk()] += 1
        self._new_boot()
        world.until("serve has a model", lambda: world.serving() is not None)
        answered = world.traffic.answered
        world.until("apps get predictions", lambda: world.traffic.answered > answered)
        assert world.traffic.wrong == []

    def _new_boot(self) -> None:
        """Both parts in what they take for a new boot: a crash of `serve` alone would count against the release. Nothing they started
        outlives them.

        Its mount namespace begins with the cards of the other worlds, which could not be unmounted before it ends, so it lets go of them.
        """
        boot = self._folder / "boot_id"
        boot.write_text(f"{uuid.UUID(int=self._dice.getrandbits(128))}\n")
        others = [str(card) for card in self._folder.parent.glob("*/card") if card.parent != self._folder]
        shell = f'umount {" ".join(others)} 2>/dev/null; mount --bind {boot} /proc/sys/kernel/random/boot_id && exec "$@"'
        for part in ("serve", "sync"):
            line = command("edge-agent", part, "--config", self._world.device.config)
            self._world.processes.start(f"device-{part}", [*NEW_BOOT, "sh", "-c", shell, "sh", *line])

    def _power_off(self) -> None:
        """The disk first: what a process does in its last moments must not reach it."""
        world = self._world
        self._card.cut()
        world.kill("sync")
        world.kill("serve")

    def _check_disk(self) -> str:
        """Nothing torn is trusted. Returns the phase that was on the disk."""
        store = Store(self._world.device.folder / "store")
        for model, selection in store.selections().items():
            assert isinstance(selection, Selection), f"the selection of {model} is damaged: {selection}"
            assert store.release(model, selection.active), "what is selected is not whole"
        for blob in store.blobs.iterdir():
            assert hash_file(blob) == blob.name, "a blob is not what its name says"
        state = States(store.private / "updates").read(MODEL)
        assert state is not None, "the update's state is damaged"
        assert not list(store.root.rglob("*.damaged"))
        return state.phase.value
