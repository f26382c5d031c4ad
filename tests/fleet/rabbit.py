"""RabbitMQ nodes of a fleet server's test stand, from Debian's package, with the files that `edge-fleet rabbitmq-files` writes.

Everything is on loopback and in temporary folders: an epmd of their own, a cookie of their own, no system service.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.fleet.stand import Server, wait_until
from tests.ports import free_ports

PROGRAMS = Path("/usr/lib/rabbitmq/bin")
STARTS_S = 120.0
FRUGAL = "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none"
"""One scheduler for each node, and none that waits busily: three nodes and what is tested share two processors."""


class Node:
    """One node: `start`, `kill`, `stop`, and `start` again."""

    def __init__(self, cluster: Rabbits, number: int) -> None:
        self.name = f"r{number}@localhost"
        self.folder = cluster.folder / self.name
        self.amqp, self.mqtt, self.distribution, self.metrics = free_ports(4)
        self._cluster = cluster
        self.process: subprocess.Popen | None = None

    def settings(self):
        return {"name": self.name, "amqp": f"127.0.0.1:{self.amqp}", "mqtt": f"127.0.0.1:{self.mqtt}"}

    def launch(self):
        files = self._cluster.files / self.name
        conf = files / "rabbitmq.conf"
        port = f"prometheus.tcp.port = {self.metrics}\n"
        if port not in conf.read_text():
            conf.write_text(conf.read_text() + port + "log.console = true\nlog.file = false\n")
        self.folder.mkdir(exist_ok=True)
        environment = {
            **self._cluster.environment, "RABBITMQ_NODENAME": self.name, "RABBITMQ_DIST_PORT": str(self.distribution),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"), "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(conf), "RABBITMQ_ADVANCED_CONFIG_FILE": str(files / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(files / "enabled_plugins"), "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "config"), "RABBITMQ_SCHEMA_DIR": str(self.folder / "schema"),
        }  # fmt: skip
        with (self.folder / "console").open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAMS / "rabbitmq-server"], env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    @property
    def is_up(self):
        """Whether it lets devices in."""
        return self.process is not None and _open(self.mqtt)

    def wait(self):
        """Returns when devices are let in; MQTT is the last that a node begins with."""
        wait_until(self._is_up, f"{self.name} starts; it said {self.console()[-3000:]}", within=STARTS_S)

    def start(self):
        self.launch()
        self.wait()

    def _is_up(self):
        assert self.process.poll() is None, self.console()[-5000:]
        return _open(self.mqtt) and _open(self.amqp)

    def console(self):
        with contextlib.suppress(OSError):
            return (self.folder / "console").read_text(errors="replace")
        return ""

    def kill(self):
        """As a power cut does."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / "pid").read_text()), signal.SIGKILL)
            self.process.wait(20)
            self.process = None


class Rabbits:
    """Nodes of one cluster, and the fleet server that uses them. The server starts first: the nodes ask it who may log in."""

    def __init__(self, folder: Path, count: int, *, make: Callable[..., Server] = Server, **settings) -> None:
        """`make` makes the server from its folder and settings; `settings` are those of `broker.rabbitmq`."""
        self.folder = folder / "rabbits"
        self.files = self.folder / "files"
        self.files.mkdir(parents=True)
        (self.folder / ".erlang.cookie").write_text("a-cookie-of-the-tests")
        (self.folder / ".erlang.cookie").chmod(0o400)
        (epmd,) = free_ports(1)
        self.environment = {
            **os.environ, "HOME": str(self.folder), "ERL_EPMD_PORT": str(epmd), "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": FRUGAL, "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
        }  # fmt: skip
        self._epmd = subprocess.Popen(
            [shutil.which("epmd"), "-port", str(epmd), "-address", "127.0.0.1"], env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.nodes = [Node(self, number) for number in range(1, count + 1)]
        (asks,) = free_ports(1)
        rabbit = {"nodes": [node.settings() for node in self.nodes], "authorization_port": asks, **settings}
        broker = {"kind": "rabbitmq", "rabbitmq": rabbit}
        self.server = make(folder, broker=broker, public={"broker": f"127.0.0.1:{self.nodes[0].mqtt}"})
        done = self.server.cli("rabbitmq-files", self.server.data, self.files, "--place", "PLACE")
        assert done.returncode == 0, done.stderr
        for node in self.nodes:
            for name in ("rabbitmq.conf", "advanced.config"):
                file = self.files / node.name / name
                file.write_text(file.read_text().replace("PLACE", str(self.files / node.name)))
        self.server.broker = self.server.mqtt_front or self.nodes[0].mqtt

    def start(self):
        """One node after the other: those that find no other each begin a cluster of their own, and two that join at once wait long."""
        for node in self.nodes:
            node.start()
        self.server.start()
        return self

    def stop(self):
        self.server.stop()
        for node in self.nodes:
            node.kill()
        self._epmd.kill()
        self._epmd.wait(20)


def _open(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Balancer:
    """HAProxy before the nodes' MQTT listeners: devices come to one address, and go to a node that answers."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        (self.port,) = free_ports(1)
        self._file = folder / "haproxy.cfg"
        servers = "\n".join(f"    server n{number} 127.0.0.1:{port} check inter 500" for number, port in enumerate(ports))
        self._file.write_text(
            "defaults\n    mode tcp\n    timeout connect 3s\n    timeout client 1h\n    timeout server 1h\n    option redispatch\n"
            f"listen mqtt\n    bind 127.0.0.1:{self.port}\n    balance leastconn\n{servers}\n"
        )
        self.process: subprocess.Popen | None = None

    def __enter__(self):
        self.process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(self._file)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: _open(self.port), "the balancer listens")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(20)
