"""What the import contracts cannot say of the code's structure: `python -m tests.structure [CHECKOUT]`, part of `make check`.

- No circle of modules in the three packages. An import inside a function or for the type checker alone counts like any other.
- No file over 400 lines, and no class over 25 methods or 400 lines, but for those named here with their reasons.

Exit status 1 and a line for each fault; 0 when there is none.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import grimp

PACKAGES = ("agent", "runtimes", "fleet_server")
MAX_FILE_LINES = 400
MAX_CLASS_LINES = 400
MAX_METHODS = 25

LARGE_FILES: Mapping[str, str] = {}
"""Files that stay above the limit: path → reason."""

LARGE_CLASSES: Mapping[str, str] = {
    "agent/serving/scheduling/scheduler.py:Scheduler": "whoever brings time, room or a thread looks at all three under one lock",
}
"""Classes that stay above a limit: path:name → reason."""


def circles(checkout: Path, packages: Iterable[str] = PACKAGES) -> list[list[str]]:
    """The circles: each a sorted list of modules, all of which import each other by some way. The largest comes first."""
    sys.path.insert(0, str(checkout))
    try:
        graph = grimp.build_graph(*packages, cache_dir=None)
    finally:
        sys.path.remove(str(checkout))
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    return sorted((sorted(one) for one in _components(imports) if len(one) > 1), key=len, reverse=True)


def _components(imports: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """The strongly connected components of a graph (Tarjan's algorithm, without recursion)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    for root in imports:
        if root in index:
            continue
        work = [(root, iter(sorted(imports[root])))]
        index[root] = lowest[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            module, remaining = work[-1]
            for imported in remaining:
                if imported not in index:
                    index[imported] = lowest[imported] = len(index)
                    stack.append(imported)
                    on_stack.add(imported)
                    work.append((imported, iter(sorted(imports[imported]))))
                    break
                if imported in on_stack:
                    lowest[module] = min(lowest[module], index[imported])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[module])
                if lowest[module] == index[module]:
                    component = []
                    while not component or component[-1] != module:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    yield component


def sizes(checkout: Path, packages: Iterable[str] = PACKAGES) -> Iterator[str]:
    """A line for each file and class that is larger than it may be."""
    for path in sorted(path for package in packages for path in (checkout / package).rglob("*.py")):
        name, text = path.relative_to(checkout).as_posix(), path.read_text(encoding="utf-8")
        if name.endswith("_pb2.py"):  # generated
            continue
        lines = text.count("\n")
        if lines > MAX_FILE_LINES and name not in LARGE_FILES:
            yield f"{name} has {lines} lines; a file may have {MAX_FILE_LINES}"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef) or f"{name}:{node.name}" in LARGE_CLASSES:
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            methods = sum(isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)) for one in node.body)
            if length > MAX_CLASS_LINES or methods > MAX_METHODS:
                yield f"{name}: class {node.name} has {methods} methods in {length} lines; it may have {MAX_METHODS} and {MAX_CLASS_LINES}"


def faults(checkout: Path) -> Iterator[str]:
    """Every fault of a checkout, a line each."""
    for circle in circles(checkout):
        yield f"{len(circle)} modules import each other: {', '.join(circle)}"
    yield from sizes(checkout)


def main() -> int:
    found = list(faults(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
    print("\n".join(found) or "no circle of modules, no file and no class too large")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
