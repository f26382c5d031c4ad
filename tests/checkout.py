"""The files of this checkout as they are here: those that git knows, and new ones that it does not ignore."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def names():
    """Their paths below `ROOT`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    return [name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def copy_to(folder):
    """Copies all of them into a new folder, which is returned."""
    folder.mkdir()
    subprocess.run(["cp", "--parents", "-p", *names(), folder], cwd=ROOT, check=True)
    return folder
