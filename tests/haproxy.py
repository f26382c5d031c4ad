"""A HAProxy of a test's own, in the foreground, with a configuration that is given."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

PLACES = ("/usr/sbin/haproxy", "/usr/local/sbin/haproxy")
STARTS_WITHIN_S = 10.0


def executable() -> str:
    found = shutil.which("haproxy") or next((place for place in PLACES if Path(place).is_file()), None)
    assert found is not None, "haproxy is not installed: make test-packages"
    return found


class HAProxy:
    """Between `start` and `stop` the balancer runs."""

    def __init__(self, folder: Path, config: str) -> None:
        self._file, self._log = folder / "haproxy.cfg", folder / "haproxy.log"
        self._file.write_text(config)
        self.process: subprocess.Popen | None = None

    def start(self) -> HAProxy:
        checked = subprocess.run([executable(), "-c", "-f", self._file], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([executable(), "-db", "-f", str(self._file)], stdout=log, stderr=log)
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not self._listens():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)
        return self

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def _listens(self) -> bool:
        """Whether the process has sockets that listen."""
        assert self.process is not None
        inodes = set()
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if (target := str(fd.readlink())).startswith("socket:"):
                    inodes.add(target[8:-1])
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return any(line.split()[3] == "0A" and line.split()[9] in inodes for line in lines)
