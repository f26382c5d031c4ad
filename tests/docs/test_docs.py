"""What the documentation says is true: commands run as written, links lead somewhere, generated pages are current."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from agent.config import ServeSettings
from agent.serving.app import assemble

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(generator().PAGES))
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generator().PAGES[name](), f"docs/{name} is stale: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_dependency_has_a_line_that_says_why() -> None:
    required = importlib.metadata.requires("edge-inference-agent") or []
    names = {re.split(r"[^\w-]", line, maxsplit=1)[0].lower() for line in required} - {"edge-inference-agent"}
    said = (ROOT / "docs/decisions/dependencies.md").read_text().lower()
    assert len(names) > 15
    assert not sorted(name for name in names if name not in said and not name.startswith("types-"))


def marked_block(kind: str) -> str:
    found = re.search(rf"<!-- tested: {kind} -->\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, f"the README has no block marked `tested: {kind}`"
    return found[1]


@pytest.fixture
def served() -> Iterator[None]:
    """The README's own command, as written there."""
    line = re.search(r"^    (edge-agent run .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line
    command = [str(Path(sys.executable).parent / "edge-agent"), *line[1].split()[1:]]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for shown in process.stdout:
        if "Ctrl-C" in shown:
            break
    yield
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)


def test_the_curl_lines_of_the_readme_work_as_written(served: None) -> None:
    done = subprocess.run(["sh", "-euc", marked_block("curl")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert '"outputs":[{"name":"probs","datatype":"FP32","shape":[1,10]' in done.stdout.replace(" ", "")
    assert "nv_inference_request_success" in done.stdout


def test_the_predict_line_of_the_readme_works_as_written(served: None) -> None:
    line = re.search(r"^    (edge-agent predict .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line
    command = [str(Path(sys.executable).parent / "edge-agent"), *line[1].split()[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "probs" in done.stdout


def test_every_setting_is_described() -> None:
    for name in ("reference/agent-config.md", "reference/fleet-config.md"):
        rows = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("| `")]
        assert rows
        assert not [row for row in rows if row.endswith("|  |")], f"docs/{name}: describe these with a string after the setting"


def test_every_route_of_the_local_api_is_documented() -> None:
    said = (ROOT / "docs/reference/local-api.md").read_text()
    routes = assemble(None, ServeSettings()).routes
    assert len(routes) > 15
    for route in routes:
        path = re.sub(r"\{(\w+):[^/]*\}", r"{\1}", route.pattern)
        row = f"| `{route.method} {path}` | {route.access} |"
        assert row in said, f"docs/reference/local-api.md lacks: {row}"
