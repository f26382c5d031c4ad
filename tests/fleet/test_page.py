"""The page in a real browser: sign in, see the fleet, live changes, and that what devices say is never markup."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time

import pytest

from agent.contract.reports import Event, Outcome
from tests.fleet.stand import DEADLINE_S, answer, model_state, signed_event

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"


class Browser:
    """Chromium over its debugging pipe: JSON messages that end with a zero byte."""

    def __init__(self, folder):
        (theirs_in, self._write), (self._read, theirs_out) = os.pipe(), os.pipe()
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={folder}",
            "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        # The browser looks for its pipe at descriptors 3 and 4.
        wrapper = ["bash", "-c", f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$0" "$@"', *command]
        self._process = subprocess.Popen(
            wrapper, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._held, self.asked = 0, b"", []
        self._timer = threading.Timer(60, self._process.kill)
        self._timer.start()
        target = self.call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        self._session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)["sessionId"]
        self.call("Network.enable")
        self.call("Page.enable")

    def call(self, method, parameters=None, session="page"):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters or {}}
        if session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("method") == "Network.requestWillBeSent":
                self.asked.append(reply["params"]["request"]["url"])
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    def _next(self):
        while b"\0" not in self._held:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser ended"
            self._held += data
        first, self._held = self._held.split(b"\0", 1)
        return json.loads(first)

    def run(self, expression):
        result = self.call("Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, what):
        deadline = time.monotonic() + DEADLINE_S
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"{what}; the page says: {self.run('document.body.innerText')}"
            self.run("new Promise(done => setTimeout(done, 50))")
        return value

    def close(self):
        self._timer.cancel()
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close", session=None)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def browser(tmp_path):
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


def sign_in(browser, server, token):
    browser.call("Page.navigate", {"url": f"http://127.0.0.1:{server.loopback}/"})
    browser.wait("document.getElementById('sign-in') && !document.getElementById('sign-in').hidden", "the sign-in form")
    browser.run(
        f"document.getElementById('token').value = {json.dumps(token)}; document.getElementById('sign-in-form').requestSubmit()"
    )
    browser.wait("!document.getElementById('app').hidden", "signed in")


def says(text, where="document.body"):
    return f"{where}.innerText.includes({json.dumps(text)})"


def search(text):
    return f"filter.value = {json.dumps(text)}; filter.dispatchEvent(new Event('input'))"


def test_the_page(server, browser, connect):
    first, second = server.publish_simple("digits", 1), server.publish_simple("digits", 2)
    device = connect(server.enrol("camera-1", ["canary"]))
    sign_in(browser, server, server.token)
    browser.wait(says("camera-1", "document.getElementById('devices')"), "the device is listed")
    browser.wait(says("live", "document.getElementById('live')"), "the stream is open")

    rollout = server.post("/rollouts", {"release": "digits:1", "groups": ["canary"], "confirm": True})["id"]
    browser.wait(says("Wave 1: canary"), "the rollout appears by itself")
    device.report({"digits": model_state(first, answers=(answer(first, rollout=rollout),))})
    browser.wait(says("waits for confirmation", "document.getElementById('rollouts')"), "the gate's verdict appears by itself")
    browser.run(f"document.querySelector('[data-key=\"{rollout}-promote\"]').click()")
    browser.wait("document.getElementById('dialog').open", "it asks first")
    browser.run("document.getElementById('dialog-form').requestSubmit()")
    browser.wait(says("completed", "document.getElementById('rollouts')"), "promoted by the page")
    assert server.get("/models")[0]["release"] == 1
    browser.run(f"document.querySelector('[data-key=\"{rollout}-committed\"]').click()")
    browser.wait(says("camera-1 committed", "document.getElementById('dialog')"), "which devices stand like that")
    browser.run("document.getElementById('dialog-cancel').click()")
    browser.run(search("nobody"))
    browser.wait(says("No device matches", "document.getElementById('devices')"), "the server was asked")
    browser.run(search("digits:1"))
    browser.wait(says("camera-1", "document.getElementById('devices')"), "who serves it is found")
    browser.run(search(""))

    browser.run("document.querySelector('[data-key=\"roll-digits:2\"]').click()")
    browser.wait("document.getElementById('dialog').open", "what to start")
    browser.run("document.getElementById('start-shadow').click(); document.getElementById('dialog-form').requestSubmit()")
    browser.wait(says("Only tried on copies", "document.getElementById('rollouts')"), "it says what it is")
    tried = server.get("/rollouts")[0]
    assert (tried["mode"], tried["state"]) == ("shadow", "running")
    server.post(f"/rollouts/{tried['id']}/abort")

    bad = answer(second, Outcome.REFUSED, reason=HOSTILE[:60], message=HOSTILE)
    device.report({"digits": model_state(first, answers=(bad,), variant=HOSTILE[:100])}, problem=HOSTILE)
    event = Event(id="1", device="camera-1", at=0, name=HOSTILE, message=HOSTILE, reason=HOSTILE)
    device.send("events", signed_event(event, device.key))
    browser.wait(says(HOSTILE, "document.getElementById('devices')"), "hostile text is shown as text")
    browser.wait(says(HOSTILE, "document.getElementById('events')"), "also in events")
    browser.run("document.querySelector('[data-key=\"device-camera-1\"]').click()")
    browser.wait(says(HOSTILE, "document.getElementById('dialog')"), "also in the details")
    assert browser.run(
        "window.hacked === undefined && document.querySelectorAll('main img, main script, dialog img').length === 0"
    )

    inside = f"http://127.0.0.1:{server.loopback}/"
    assert browser.asked
    assert [url for url in browser.asked if not url.startswith(inside)] == []
    assert browser.run("document.cookie") == ""  # HttpOnly: no script can read the session


def test_signing_in_and_out(server, browser):
    sign_in(browser, server, server.token)
    browser.run("document.getElementById('sign-out').click()")
    browser.wait("!document.getElementById('sign-in').hidden && document.getElementById('app').hidden", "signed out")
    browser.run("document.getElementById('token').value = 'ef_wrong'; document.getElementById('sign-in-form').requestSubmit()")
    browser.wait(says("not known", "document.getElementById('sign-in-error')"), "a wrong token is told")


def test_a_viewer_sees_no_buttons_that_would_be_refused(server, browser):
    server.publish_simple("views", 1)
    sign_in(browser, server, server.make_token("viewer"))
    browser.wait(says("views:1"), "releases are listed")
    assert browser.run("document.querySelectorAll('#releases button, #rollouts button').length") == 0


def test_the_stream_comes_back_after_a_restart(own_server, browser):
    server = own_server.start()
    sign_in(browser, server, server.token)
    browser.wait(says("live", "document.getElementById('live')"), "live")
    server.stop()
    browser.wait(says("reconnecting", "document.getElementById('live')"), "it says so")
    server.start()
    server.enrol("late")
    browser.wait(says("late", "document.getElementById('devices')"), "the page goes on by itself")
