"""What is inside a TFLite file: its operators, its weights, and which provider would take which of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtimes.contract import Description
from runtimes.tflite_graph import read_operators, read_weights_bytes
from runtimes.tflite_model import allocate


def outline(path: Path) -> Description:
    """What the file itself says, without any engine."""
    return Description("TFLite", _named_operators(path), read_weights_bytes(path))


def describe(path: Path) -> Description:
    """The outline, and what the installed engine makes of the file."""
    found = outline(path)
    operators, providers = _assigned(path)
    return replace(found, operators=found.operators or operators, providers=providers)


def _named_operators(path: Path) -> dict[str, int]:
    """As the file has them, in all subgraphs; empty where no schema is at hand that has their names."""
    try:
        from ai_edge_litert.schema_py_generated import BuiltinOperator
    except ImportError:
        return {}
    names = {number: name for name, number in vars(BuiltinOperator).items() if isinstance(number, int)}
    return {
        name if isinstance(name, str) else names.get(name, f"operator {name}"): count
        for name, count in read_operators(path).items()
    }


def _assigned(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """What the engine has of operators in the first subgraph, and which provider takes how many of these."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        from tflite_runtime.interpreter import Interpreter, OpResolverType

    plain = Interpreter(model_path=str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    operators = _operators(plain)
    delegated = Interpreter(model_path=str(path))
    allocate(delegated)
    steps = _operators(delegated)
    left = sum(count for name, count in steps.items() if name != "DELEGATE" and name in operators)
    providers = {"XNNPACK": max(0, sum(operators.values()) - left) if "DELEGATE" in steps else 0, "CPU": left}
    return operators, providers


def _operators(interpreter: Any) -> dict[str, int]:
    tell = getattr(interpreter, "_get_ops_details", None)  # the only way that the engine's Python interface has
    return dict(Counter(step["op_name"] for step in tell())) if tell is not None else {}
