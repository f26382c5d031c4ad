"""`make release` in a clone of the checkout: what it makes, what it refuses, and that a failure leaves nothing."""

import datetime as dt
import importlib.util
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.checkout import ROOT, copy_to

TODAY = dt.date(2030, 5, 17)
GIT = ("git", "-c", "user.name=tests", "-c", "user.email=tests@localhost")


def git(checkout, *arguments):
    return subprocess.run([*GIT, *arguments], cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def releasing():
    spec = importlib.util.spec_from_file_location("release", ROOT / "packaging/release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """A repository of the files as they are here, whose changelog begins with an unreleased 9.9.0."""
    folder = copy_to(tmp_path / "checkout")
    changes = folder / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("\n## ", "\n## 9.9.0 (unreleased)\n\n- Something new.\n\n## ", 1))
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "tests")
    git(folder, "config", "user.email", "tests@localhost")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all of it")
    return folder


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_release(releasing, checkout):
    made = releasing.release(checkout, "9.9.0", TODAY, checks=False)
    assert [path.name for path in made] == ["edge_inference_agent-9.9.0-py3-none-any.whl", "edge_inference_agent-9.9.0.tar.gz"]
    with zipfile.ZipFile(made[0]) as wheel, tarfile.open(made[1]) as sdist:
        for package in ("agent", "runtimes", "fleet_server"):
            assert f"{package}/py.typed" in wheel.namelist()
            assert f"edge_inference_agent-9.9.0/{package}/py.typed" in sdist.getnames()
    assert git(checkout, "describe", "--exact-match") == "v9.9.0"
    assert git(checkout, "status", "--porcelain") == ""
    assert "## 9.9.0 (2030-05-17)" in (checkout / "CHANGELOG.md").read_text()
    with pytest.raises(releasing.NotReady, match=r"the tag v9\.9\.0 exists"):
        releasing.release(checkout, "9.9.0", TODAY, checks=False)


@pytest.mark.parametrize(
    ("version", "message"),
    [("9.9", "is not a version"), ("v9.9.0", "is not a version"), ("9.9.1", "must be '## 9.9.1 \\(unreleased\\)'")],
)
def test_what_is_refused(releasing, checkout, version, message):
    with pytest.raises(releasing.NotReady, match=message):
        releasing.release(checkout, version, TODAY, checks=False)


def test_uncommitted_changes(releasing, checkout):
    (checkout / "new.py").write_text("")
    with pytest.raises(releasing.NotReady, match="uncommitted changes"):
        releasing.release(checkout, "9.9.0", TODAY, checks=False)


@pytest.mark.parametrize("step", ["checks", "build"])
def test_a_failure_leaves_nothing(releasing, checkout, monkeypatch, step):
    before = git(checkout, "rev-parse", "HEAD")
    if step == "checks":
        (checkout / ".ci/run").write_text("#!/bin/sh\nexit 3\n")
        git(checkout, "commit", "-qam", "checks that fail")
        before = git(checkout, "rev-parse", "HEAD")
    else:
        monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(subprocess.CalledProcessError):
        releasing.release(checkout, "9.9.0", TODAY, checks=step == "checks")
    assert git(checkout, "rev-parse", "HEAD") == before
    assert git(checkout, "tag") == ""
    assert git(checkout, "status", "--porcelain") == ""
