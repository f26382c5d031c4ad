"""`python -m agent.serving.grpc.compile`: the .proto files beside it → descriptors.py. Needs grpcio-tools, from the `dev`
extra.
"""

from __future__ import annotations

import tempfile
import textwrap
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("inference.proto", "health.proto")
TARGET = HERE / "descriptors.py"


def compiled() -> str:
    """The text of descriptors.py.  Raises: ValueError when a file cannot be compiled."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    lines = ['"""Made from the .proto files by `python -m agent.serving.grpc.compile`; do not edit."""', ""]
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "set"
            includes = (f"-I{HERE}", f"-I{files('grpc_tools') / '_proto'}")
            if protoc.main(["protoc", *includes, f"--descriptor_set_out={out}", source]) != 0:
                raise ValueError(f"{source} cannot be compiled; protoc has said why")
            text = out.read_bytes().hex()
        lines += [f"{Path(source).stem.upper()} = bytes.fromhex(", *(f'    "{part}"' for part in textwrap.wrap(text, 120)), ")"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(compiled())
