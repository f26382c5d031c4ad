"""Makes a release of this project: `make release VERSION=0.2.0` (ARGS="--no-checks" leaves out `.ci/run`, which takes most of the time).

1. Nothing may be uncommitted, the version's section in CHANGELOG.md must stand first and say "(unreleased)", and its tag must be new.
2. `.ci/run` must pass.
3. The version goes into pyproject.toml, today's date into CHANGELOG.md, both into one commit.
4. The sdist and the wheel are built into dist/, and the wheel is installed into a fresh environment, whose commands must tell the version.
5. The commit is tagged. Pushing it is left to a person.

A step that fails leaves nothing: the commit is taken back, and there is no tag.
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+(?:rc\d+)?")
COMMANDS = ("edge-agent", "edge-fleet")


class NotReady(Exception):
    """Why there can be no release now, and what to do."""


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def check_ready(root: Path, version: str) -> None:
    """Raises: NotReady."""
    if not VERSION.fullmatch(version):
        raise NotReady(f"{version!r} is not a version: MAJOR.MINOR.PATCH, or MAJOR.MINOR.PATCHrcN")
    if changed := _git(root, "status", "--porcelain"):
        raise NotReady(f"there are uncommitted changes; commit or remove them first:\n{changed}")
    if _git(root, "tag", "--list", f"v{version}"):
        raise NotReady(f"the tag v{version} exists: a released version never changes; choose the next one")
    heading = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if heading is None or heading[1] != f"{version} (unreleased)":
        found = heading[1] if heading else "no section"
        raise NotReady(f"CHANGELOG.md begins with {found!r}; its first section must be '## {version} (unreleased)'")


def write_version(root: Path, version: str, today: dt.date) -> None:
    """The version into pyproject.toml and the date into the changelog."""
    project = root / "pyproject.toml"
    project.write_text(re.sub(r'^version = ".*"$', f'version = "{version}"', project.read_text(), count=1, flags=re.MULTILINE))
    changes = root / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace(f"## {version} (unreleased)", f"## {version} ({today.isoformat()})", 1))


def build(root: Path, version: str) -> list[Path]:
    """The sdist and the wheel, in dist/; the wheel was tried.  Raises: NotReady, subprocess.CalledProcessError."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", "dist", "."], cwd=root, check=True, stdout=subprocess.DEVNULL)
    made = sorted((root / "dist").glob(f"edge_inference_agent-{version}*"))
    wheel = next(path for path in made if path.suffix == ".whl")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin_ = Path(folder) / "bin"
        subprocess.run([bin_ / "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[fleet]"], check=True)
        for command in COMMANDS:
            told = subprocess.run([bin_ / command, "--version"], check=True, capture_output=True, text=True).stdout
            if version not in told:
                raise NotReady(f"{command} --version of the wheel says {told.strip()!r}, not {version}")
    return made


def release(root: Path, version: str, today: dt.date, *, checks: bool = True) -> list[Path]:
    """Makes the release. Returns the files that were built.  Raises: NotReady, subprocess.CalledProcessError."""
    check_ready(root, version)
    if checks:
        subprocess.run([root / ".ci" / "run"], cwd=root, check=True)
    before = _git(root, "rev-parse", "HEAD")
    write_version(root, version, today)
    try:
        _git(root, "commit", "--all", "--message", f"Version {version}")
        made = build(root, version)
        _git(root, "tag", "--annotate", f"v{version}", "--message", f"Version {version}")
    except BaseException:
        _git(root, "reset", "--hard", before)
        raise
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a release: checks, version, changelog, packages, tag.")
    parser.add_argument("version", help="such as 0.2.0")
    parser.add_argument("--no-checks", action="store_true", help="leave out .ci/run")
    chosen = parser.parse_args()
    try:
        made = release(ROOT, chosen.version, dt.datetime.now(dt.timezone.utc).date(), checks=not chosen.no_checks)
    except NotReady as reason:
        print(f"no release: {reason}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as failed:
        print(f"no release: {failed}\n{failed.stderr or ''}", file=sys.stderr)
        return 1
    print(*made, sep="\n")
    print(f"publish it with: git push origin HEAD v{chosen.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
