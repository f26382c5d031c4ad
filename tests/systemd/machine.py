"""A machine with a real systemd as PID 1, made in seconds: this system's files under an overlay, booted in a container.

Needs root, systemd-nspawn and an overlay file system. Nothing is written outside the overlay, which lives in memory and goes with the test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
BOOT_LIMIT_S = 100

WRAPPER = """#!/bin/sh
# Runs the checkout with the Python that runs the tests, wherever it lives.
export PYTHONHOME=/opt/python PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/opt/checkout:/opt/packages
exec /opt/python/bin/{python} -W error::ImportWarning -m {module} "$@"
"""

PROBE_UNIT = """[Unit]
After=sockets.target edge-agent.socket edge-agent-trial.socket
Wants=edge-agent.socket edge-agent-trial.socket
[Service]
Type=oneshot
ExecStart=/usr/bin/probe
StandardOutput=file:/var/probe.log
StandardError=inherit
ExecStopPost=/usr/bin/systemctl --no-block poweroff
TimeoutStartSec=80
[Install]
WantedBy=multi-user.target
"""

NOT_NEEDED = """
    mosquitto postgresql prometheus grafana-server apache2 nginx ssh cron rsyslog systemd-networkd systemd-resolved systemd-timesyncd
    networking e2scrub_reap apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer man-db.timer getty@tty1 console-getty docker containerd
""".split()  # noqa: SIM905 - a list of this length reads better as words


class Machine:
    """The root of the machine before it is booted: put files below `root`, then `boot`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def install(self, source: Path, target: str, *, mode: int = 0o644) -> None:
        path = self.root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        path.chmod(mode)

    def write(self, target: str, text: str, *, mode: int = 0o644) -> None:
        path = self.root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def install_product(self) -> None:
        """The units as they are shipped, the two commands, users and folders."""
        units = CHECKOUT / "systemd"
        for unit in (*units.glob("*.service"), *units.glob("*.socket")):
            self.install(unit, f"etc/systemd/system/{unit.name}")
        for kind in ("sysusers.d", "tmpfiles.d"):
            for file in (units / kind).glob("*.conf"):
                self.install(file, f"usr/lib/{kind}/{file.name}")
        self.install(units / "agent.yaml", "etc/edge-agent/agent.yaml")
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for name, module in (("edge-agent", "agent.cli"), ("edge-fleet", "fleet_server.cli"), ("probe", "tests.systemd.probe")):
            self.write(f"usr/bin/{name}", WRAPPER.format(python=python, module=module), mode=0o755)
        self.write("etc/systemd/system/probe.service", PROBE_UNIT)
        self._enable("probe.service", "multi-user.target")

    def make_users_and_folders(self) -> None:
        """What a package's installation does once."""
        for tool in (["systemd-sysusers"], ["systemd-tmpfiles", "--create", "--prefix=/var/lib/edge-agent"]):
            done = subprocess.run([*tool, f"--root={self.root}"], check=True, capture_output=True, text=True)
            assert "not a valid" not in done.stderr, done.stderr

    def _enable(self, unit: str, target: str) -> None:
        wants = self.root / "etc/systemd/system" / f"{target}.wants"
        wants.mkdir(parents=True, exist_ok=True)
        (wants / unit).symlink_to(f"/etc/systemd/system/{unit}")

    def boot(self) -> str:
        """Boots, waits until the probe has run and the machine is off; returns the probe's output.

        Raises: AssertionError with the end of the console when the machine did not shut down by itself.
        """
        packages = sysconfig.get_paths()["purelib"]
        line = [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}", f"--machine=probe-{os.getpid()}",
            "--private-network", "--register=no", "--keep-unit", "--console=pipe",
            f"--bind-ro={sys.base_prefix}:/opt/python", f"--bind-ro={packages}:/opt/packages", f"--bind-ro={CHECKOUT}:/opt/checkout",
            *(f"systemd.mask={unit if '.' in unit else unit + '.service'}" for unit in NOT_NEEDED),
        ]  # fmt: skip
        done = subprocess.run(line, capture_output=True, text=True, timeout=BOOT_LIMIT_S, check=False, stdin=subprocess.DEVNULL)
        log = self.root / "var/probe.log"
        assert log.exists(), f"the probe did not run; the console's end:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
        return log.read_text()


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """A machine below `folder`, gone afterwards."""
    memory = folder / "memory"
    memory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", memory], check=True)
    try:
        upper, work, root = (memory / name for name in ("upper", "work", "root"))
        for path in (upper, work, root):
            path.mkdir()
        options = f"lowerdir=/,upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
        try:
            yield Machine(root)
        finally:
            subprocess.run(["umount", root], check=True)
    finally:
        subprocess.run(["umount", memory], check=True)
