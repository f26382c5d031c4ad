"""The whole story on one machine: enrol, publish, pull, predict, switch, refuse, roll back.

Real parts: `edge-fleet serve` with a real mosquitto, three devices of two processes each, and an app on each that never stops asking.
Everything lives in one temporary folder and on 127.0.0.1, and is gone afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from device import Device
from fleet import Fleet
from processes import StepFailed, processes
from rich.panel import Panel
from screen import Screen
from story import STEPS, Story

DEVICES = ("camera-1", "camera-2", "press-7")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--once", action="store_true", help="end by itself; exit status 0 only if every step went as told")
    parser.add_argument("--stay", action="store_true", help="leave everything running at the end, until Ctrl-C")
    parser.add_argument("--plain", action="store_true", help="lines instead of a live picture")
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="use this folder, which must not exist yet, and keep it: logs, stores, keys"
    )
    return parser.parse_args()


def stay(story: Story) -> None:
    """Shows where to look until somebody has seen enough."""
    fleet, device = story.fleet, story.devices[0]
    story.screen.console.print(
        Panel(
            f"dashboard   {fleet.dashboard}\ntoken       {fleet.token}\n"
            f"predict     curl --unix-socket {device.socket} http://edge/v2/models/digits\n"
            f"operate     EDGE_FLEET_PROFILE={story.processes.environment['EDGE_FLEET_PROFILE']} edge-fleet device list\n"
            f"logs        {story.processes.logs}",
            title="still running; Ctrl-C ends it",
            border_style="cyan",
        ),
        soft_wrap=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            story.tick()
            time.sleep(0.5)


def tell(folder: Path, options: argparse.Namespace) -> int:
    environment = {"EDGE_FLEET_PROFILE": str(folder / "profile.yaml"), "PYTHONUNBUFFERED": "1"}
    with processes(folder / "logs", environment) as running, Screen(STEPS, list(DEVICES), plain=options.plain) as screen:
        devices = [Device(name, folder, running) for name in DEVICES]
        watched = sys.stdin.isatty() and sys.stdout.isatty() and not options.once
        story = Story(Fleet(folder, running, screen.say, lambda: None), devices, running, screen)
        started = time.monotonic()
        well = story.run(pause_s=2.0 if watched else 0.0)
        screen.stop()
        screen.console.print(screen.summary())
        style, word = ("bold green", "as told") if well else ("bold red", "not as told")
        screen.console.print(f"[{style}]{word}[/], in {time.monotonic() - started:.0f} s")
        if well and (options.stay or watched):
            stay(story)
        return 0 if well else 1


def main() -> int:
    options = arguments()
    if options.keep:
        options.keep.mkdir(parents=True)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="edge-demo-"))
    try:
        return tell(folder.resolve(), options)
    except KeyboardInterrupt:
        return 130
    except StepFailed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
