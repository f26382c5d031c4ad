"""Documents are decoded from many threads at once, also when nobody has decoded such a document before."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

MANY_FIRST_USES = """
from __future__ import annotations

import sys
import threading
import msgspec
from agent.contract.codec import convert, decode

DOCUMENT = {"inner": [{"a": 1, "b": {"k": 2.0}}], "other": {"a": 1, "b": {}}, "text": "x"}
DATA = msgspec.json.encode(DOCUMENT)

def make(n):
    inner = msgspec.defstruct(f"Inner{n}", [("a", "int"), ("b", "dict[str, float]")], module="__main__")
    globals()[f"Inner{n}"] = inner
    fields = [("inner", f"tuple[Inner{n}, ...]"), ("other", f"Inner{n} | None"), ("text", "str")]
    return msgspec.defstruct(f"Outer{n}", fields, module="__main__")

sys.setswitchinterval(1e-6)
for n in range(200):
    kind = make(n)
    start = threading.Barrier(4)
    seen = []
    def use(n):
        start.wait()
        found = decode(DATA, kind, limit_bytes=1000) if n % 2 else convert(DOCUMENT, kind)
        seen.append(found.inner[0].b["k"])
    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [2.0] * 4, seen
print("done")
"""


def test_the_first_use_of_a_type_may_be_in_several_threads() -> None:
    """msgspec alone dies of it with a segmentation fault, so this runs in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MANY_FIRST_USES], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_nothing_decodes_into_a_type_but_through_the_codec() -> None:
    """Decoders made while a module is imported are fine; `agent.config` is read before there are threads."""
    allowed = {"agent/contract/codec.py", "agent/config.py"}
    sources = [path for part in ("agent", "fleet_server") for path in (ROOT / part).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources
        if str(path.relative_to(ROOT)) not in allowed
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _decodes_into_a_type(node)
    ]
    assert found == [], "use agent.contract.codec.decoder or convert"


def _decodes_into_a_type(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    typed = len(call.args) > 1 or any(keyword.arg == "type" for keyword in call.keywords)
    return name == "msgspec.convert" or (name in {"msgspec.json.decode", "msgspec.msgpack.decode"} and typed)
