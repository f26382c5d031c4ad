"""The broker's supervisor meets what it did not expect: it goes on, or the server ends as a whole."""

import asyncio
import time

import pytest

from fleet_server.broker import supervisor
from fleet_server.broker.supervisor import Supervisor
from fleet_server.errors import Unavailable
from fleet_server.running import until_stopped


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "BACKOFF_FIRST_S", 0.01)
    (tmp_path / "broker").mkdir()
    return tmp_path


def broker(folder, body):
    path = folder / "fake-broker"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return Supervisor(str(path), folder / "broker" / "mosquitto.conf", folder)


async def _while_running(made, condition):
    task = asyncio.create_task(made.run())
    try:
        deadline = time.monotonic() + 20
        while not condition():
            assert not task.done(), task.exception()
            assert time.monotonic() < deadline, list(made.last_lines)
            await asyncio.sleep(0.01)
    finally:
        await made.stop()
        await task


def test_a_line_without_end(folder):
    made = broker(folder, "head -c 300000 /dev/zero | tr '\\0' x >&2; echo >&2; echo 'after it' >&2; exec sleep 60")
    asyncio.run(_while_running(made, lambda: "after it" in made.last_lines))


def test_a_disk_that_takes_no_pid_file(folder):
    (folder / "broker" / "mosquitto.pid").mkdir()
    made = broker(folder, "echo up >&2; exec sleep 60")
    asyncio.run(_while_running(made, lambda: "up" in made.last_lines))


def test_a_process_that_cannot_be_made(folder, monkeypatch):
    made, works, tries = broker(folder, "echo up >&2; exec sleep 60"), asyncio.create_subprocess_exec, []

    async def at_the_second_try(*command, **options):
        tries.append(command)
        if len(tries) == 1:
            raise OSError(11, "Resource temporarily unavailable")
        return await works(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", at_the_second_try)
    asyncio.run(_while_running(made, lambda: "up" in made.last_lines))
    assert "it could not be started: [Errno 11] Resource temporarily unavailable" in made.last_lines


def test_a_part_that_ends_by_itself_ends_the_server():
    async def fails():
        raise RuntimeError("out of order")

    async def story():
        stop = asyncio.Event()
        with pytest.raises(Unavailable, match="the broker ended: out of order"):
            await until_stopped(stop, [asyncio.create_task(fails(), name="broker")])
        stop.set()
        forever = asyncio.create_task(asyncio.Event().wait(), name="listener")
        await until_stopped(stop, [forever])
        forever.cancel()

    asyncio.run(story())
