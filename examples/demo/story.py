"""The story: six steps, each with what is expected beforehand and what was seen afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from device import Device, accuracies
from fleet import MODEL, Fleet
from processes import Processes, StepFailed, wait_for
from screen import Screen, Step

RELEASES = Path(__file__).parents[1] / "digits/releases"
ENDED = ("completed", "aborted")
UPDATE_LIMIT_S = 60
QUIET_S = 3.0

STEPS = [
    Step(
        "a fleet: three devices enrol, release 1 reaches them",
        "every device serves release 1; accuracy 0.77 (it is weak on purpose)",
    ),
    Step("a better release arrives while apps predict", "every device serves release 2; accuracy 0.98; 0 failed requests"),
    Step(
        "a bad release: trained on shuffled labels",
        "every device refuses release 3 in its trial and says why; 0 failed requests",
    ),
    Step(
        "a treacherous release: passes its trial, fails real requests",
        "the first device rolls release 4 back; the others never run it",
    ),
    Step("fleet server and broker are killed, and come back", "predictions go on, 0 failed; every device reconnects by itself"),
]


@dataclass
class Story:
    """Everything the steps need. `tick` keeps the screen current."""

    fleet: Fleet
    devices: list[Device]
    processes: Processes
    screen: Screen
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    _looked: float = 0.0

    def run(self, *, pause_s: float = 0.0) -> bool:
        """Every step in order, with time to look in between; the first that goes wrong ends the story.  False when one did."""
        for step, told in zip(self.screen.picture.steps, (self.one, self.two, self.three, self.four, self.five), strict=True):
            self.screen.say(step.title, style="bold cyan")
            started = time.monotonic()
            step.seconds = 0.0
            try:
                step.seen, step.ok = told(), True
            except (StepFailed, requests.RequestException) as error:
                step.seen, step.ok = str(error), False
            step.seconds = time.monotonic() - started
            self.screen.say(("✓ " if step.ok else "✗ ") + step.seen, style="green" if step.ok else "red")
            if not step.ok:
                return False
            self.rest(pause_s)
        return True

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until("a pause ends", lambda: time.monotonic() >= end, seconds + 5)

    # -- the steps ---------------------------------------------------------------------------------------------------------

    def one(self) -> str:
        self.fleet.init()
        self.fleet.serve()
        self.screen.picture.dashboard = self.fleet.dashboard
        for device in self.devices:
            device.prepare()
            group = ("--group", "canary") if device is self.devices[0] else ()
            device.enrol(
                self.fleet.run("token", "create", "--device", device.name, *group, quiet=device is not self.devices[0]).strip()
            )
            device.start()
        self.screen.say("$ edge-agent enrol 'edge://…'   (once on each device)")
        self.until("every device is online", lambda: all(self.online(device) for device in self.devices), 30)
        self.fleet.publish(RELEASES / "1.yaml")
        rollout = self.fleet.roll_out(1)
        self.ends(rollout, "completed")
        self.expect_serving(1)
        for device in self.devices:
            device.start_app()
        self.until("every app predicts", lambda: all(device.tally["requests"] > 20 for device in self.devices), 20)
        return f"3 devices serve release 1; accuracy {self.expect_accuracy('0.77')}"

    def two(self) -> str:
        before = self.failures()
        started = time.monotonic()
        self.fleet.publish(RELEASES / "2.yaml")
        rollout = self.fleet.roll_out(2)
        self.until("every device serves release 2", lambda: all(self.serving(d) == 2 for d in self.devices), UPDATE_LIMIT_S)
        switched = time.monotonic() - started
        self.ends(rollout, "completed")
        accuracy = self.expect_accuracy("0.98")
        answered = sum(device.tally["requests"] for device in self.devices)
        self.expect_failed(before, 0)
        return f"accuracy {accuracy}; 0 of {answered:,} requests failed; {switched:.1f} s from publish to the last device serving it"

    def three(self) -> str:
        before = self.failures()
        self.fleet.publish(RELEASES / "3.yaml")
        rollout = self.fleet.roll_out(3, "--max-failures", 2)
        self.ends(rollout, "aborted")
        self.until("every device answers release 3", lambda: all(self.answer(device, 3) for device in self.devices), 20)
        answers = [self.answer(device, 3) for device in self.devices]
        wrong = [f"{d.name}: {a}" for d, a in zip(self.devices, answers, strict=True) if not a or a["outcome"] != "refused"]
        if wrong:
            raise StepFailed("expected a refusal, seen " + "; ".join(wrong))
        self.expect_serving(2)
        self.expect_failed(before, 0)
        return f"3 of 3 refused it ({answers[0]['reason']}): {answers[0]['message']}; 0 failed"  # type: ignore[index]

    def four(self) -> str:
        before = self.failures()
        self.fleet.publish(RELEASES / "4.yaml")
        rollout = self.fleet.roll_out(4, "--group", "canary")
        self.ends(rollout, "aborted")
        first, others = self.devices[0], self.devices[1:]
        self.until(f"{first.name} serves release 2 again", lambda: self.serving(first) == 2 and bool(self.answer(first, 4)), 20)
        answer = self.answer(first, 4)
        if not answer or answer["outcome"] != "rolled_back":
            raise StepFailed(f"expected {first.name} to roll back, seen {answer}")
        ran = [device.name for device in others if self.answer(device, 4) or self.tried(device, 4)]
        if ran:
            raise StepFailed(f"{', '.join(ran)} ran release 4 although the rollout should have stopped")
        failed = self.failures()
        if any(failed[device.name] != before[device.name] for device in others):
            raise StepFailed("requests failed on devices that release 4 should never have reached")
        lost = failed[first.name] - before[first.name]
        if not lost:
            raise StepFailed("release 4 did not fail one request: it is not treacherous")
        return f"{first.name} rolled back ({answer['reason']}) after {lost} failed requests; the others never ran it; rollout aborted"

    def five(self) -> str:
        before, asked = self.failures(), self.requests()
        killed = self.fleet.kill()
        self.screen.say(f"$ kill -9   ({', '.join(killed)})")
        self.rest(QUIET_S)
        stalled = [device.name for device in self.devices if device.tally["requests"] - asked[device.name] < 20]
        if stalled:
            raise StepFailed(f"{', '.join(stalled)} stopped answering while the fleet server was away")
        restarted = time.time()
        self.fleet.serve()
        back = self.until(
            "every device is back", lambda: all(self.heard_since(device, restarted) for device in self.devices), 60
        )
        self.expect_failed(before, 0)
        answered = sum(self.requests().values()) - sum(asked.values())
        return f"{answered:,} requests answered meanwhile, 0 failed; all 3 devices back {back:.1f} s after the server"

    # -- looking -----------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Reads what the fleet server knows a few times a second, and draws it."""
        self.processes.check()
        if time.monotonic() - self._looked < 0.25:
            return
        self._looked = time.monotonic()
        try:
            self.seen = self.fleet.devices()
        except (requests.RequestException, StepFailed):
            self.seen = {name: {**device, "online": False} for name, device in self.seen.items()}
        for device in self.devices:
            row = self.screen.device(device.name)
            model = self.model(device)
            serving = model.get("serving")
            row.serving = f"{MODEL}:{serving}" if serving else "–"
            row.phase = model.get("phase") or "–"
            row.online = self.online(device)
            row.requests, row.failed, row.rate = device.tally["requests"], device.tally["failed"], device.rate
            last = max(model.get("answers") or [], key=lambda answer: answer["at"], default=None)
            if last:
                row.note = f"{MODEL}:{last['release']} {last['outcome'].replace('_', ' ')}" + (
                    f" ({last['reason']})" if last["reason"] else ""
                )

    def until(self, what: str, condition: Callable[[], bool], limit_s: float) -> float:
        def looked() -> bool:
            self.tick()
            return condition()

        return wait_for(what, looked, limit_s=limit_s, tick=lambda: None)

    def model(self, device: Device) -> dict[str, Any]:
        models: dict[str, Any] = self.seen.get(device.name, {}).get("models", {})
        return models.get(MODEL) or {}

    def online(self, device: Device) -> bool:
        return bool(self.seen.get(device.name, {}).get("online"))

    def heard_since(self, device: Device, moment: float) -> bool:
        """Whether the fleet server heard the device itself after `moment`, not only remembers it."""
        return self.online(device) and (self.seen[device.name]["last_seen"] or 0.0) > moment

    def serving(self, device: Device) -> int | None:
        return self.model(device).get("serving")

    def answer(self, device: Device, release: int) -> dict[str, Any] | None:
        """The device's last answer to a release."""
        answers = [answer for answer in self.model(device).get("answers") or [] if answer["release"] == release]
        return max(answers, key=lambda answer: answer["at"], default=None)

    def tried(self, device: Device, release: int) -> bool:
        """Whether the device's own store ever held the release."""
        return (device.folder / f"store/releases/{MODEL}/{release}.json").exists()

    def failures(self) -> dict[str, int]:
        self.wait_for_apps()
        return {device.name: device.tally["failed"] for device in self.devices}

    def requests(self) -> dict[str, int]:
        return {device.name: device.tally["requests"] for device in self.devices}

    def wait_for_apps(self) -> None:
        """Waits for the next word of every app, so that what it saw so far is counted."""
        before = {device.name: device.tally for device in self.devices}
        self.until(
            "the apps report", lambda: all(d.tally is not before[d.name] or not d.tally["requests"] for d in self.devices), 10
        )

    # -- expecting ---------------------------------------------------------------------------------------------------------

    def ends(self, rollout: str, state: str) -> None:
        view: dict[str, Any] = {}

        def ended() -> bool:
            view.update(self.fleet.rollout(rollout))
            return view["state"] in ENDED

        self.until(f"rollout {rollout} ends", ended, UPDATE_LIMIT_S)
        if view["state"] != state:
            raise StepFailed(f"expected the rollout to be {state}, it is {view['state']}: {view['reason'] or view['verdict']}")

    def expect_serving(self, release: int) -> None:
        self.until(f"every device serves release {release}", lambda: all(self.serving(d) == release for d in self.devices), 20)

    def expect_accuracy(self, expected: str) -> str:
        found = accuracies(self.devices)
        if found != expected:
            raise StepFailed(f"expected an accuracy of {expected}, measured {found}")
        return found

    def expect_failed(self, before: dict[str, int], count: int) -> None:
        now = self.failures()
        failed = {name: now[name] - before[name] for name in now}
        if any(number != count for number in failed.values()):
            errors = {device.tally["last_error"] for device in self.devices if device.tally["last_error"]}
            raise StepFailed(f"expected {count} failed requests, seen {failed}: {'; '.join(sorted(errors))}")
