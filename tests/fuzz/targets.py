"""What a stranger may send, made up by a coverage-guided fuzzer: `python -m tests.fuzz.targets NAME [libFuzzer's options] [CORPUS]`.

Each target takes bytes and may refuse them in the one way its module promises. Anything else that is raised, and every property
that does not hold, is a crash; libFuzzer adds time and memory. A finding is written to a file that runs it again.
"""

import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"

import atheris

with atheris.instrument_imports(include=["agent.serving", "agent.contract"], enable_loader_override=False):
    import socket

    import numpy as np

    from agent.contract.assignment import Assignment
    from agent.contract.codec import ContractError, decode
    from agent.contract.manifest import parse_manifest
    from agent.contract.reports import StateReport
    from agent.contract.telemetry import Telemetry
    from agent.serving import compression
    from agent.serving.access import Access, Grant
    from agent.serving.answers import Answer, Refusal
    from agent.serving.api import oip_request, oip_response
    from agent.serving.api.tfserving_body import Body
    from agent.serving.api.tfserving_forms import FORMS
    from agent.serving.buffers import BufferPool
    from agent.serving.models.version import Version
    from agent.serving.routes import Route, Router
    from agent.serving.transport.connection import NOTHING, Connection
    from runtimes.contract import TensorSpec
    from runtimes.naming import Interfaces

INPUTS = (
    TensorSpec("x", "FP32", (-1, 4)),
    TensorSpec("t", "BYTES", (-1,)),
    TensorSpec("b", "BOOL", (2, -1)),
    TensorSpec("q", "INT8", (-1,)),
)
OUTPUTS = (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("s", "BYTES", (-1,)))
ARRAYS = (np.ones((3, 2), np.float32), np.array([b"a", b"\xff"], np.object_))
LIMIT = 100_000


def request(data):
    """An inference request: what is understood holds every input in its declared type, and has an answer."""
    choose = atheris.FuzzedDataProvider(data)
    length = choose.ConsumeIntInRange(-1, 300)
    inputs = INPUTS[: choose.ConsumeIntInRange(1, len(INPUTS))]
    body = memoryview(choose.ConsumeBytes(LIMIT))
    if length > len(body):  # refused by whoever calls
        return
    try:
        plan = oip_request.read_request(body, None if length < 0 else length, "m", inputs, OUTPUTS)
        feeds = plan.feeds(body)
    except Refusal as refusal:
        assert refusal.status in (400, 404, 501), refusal.status
        return
    for spec in inputs:
        assert feeds[spec.name].dtype == spec.dtype
        assert feeds[spec.name].flags.c_contiguous
    arrays = [ARRAYS[OUTPUTS.index(spec)] for spec in plan.specs]
    try:
        oip_response.write_response(plan, arrays, "m", "1")
    except Refusal as refusal:
        assert refusal.status == 500, refusal.status


def _handler(_request):
    return Answer()


ROUTER = Router(
    [Route("POST", "/v2/models/{model}/infer", Access.PREDICT, _handler), Route("GET", "/v2", Access.NONE, _handler)]
)


def _requests(pieces):
    """(path's values or the refusal's status, body) of each request in the pieces."""
    peer, sock = socket.socketpair()
    sock.setblocking(False)
    found = []
    connection = Connection(sock, Grant(Access.CONTROL, "fuzzer"), ROUTER, BufferPool(4 * LIMIT), LIMIT)
    try:
        for piece in pieces:
            peer.sendall(piece)
            while connection.receive() not in (NOTHING, 0):
                while (one := connection.next_request()) is not None:
                    found.append((one.match.refusal.status if one.match.refusal else dict(one.match.params), bytes(one.body)))
                    connection.finished()
    finally:
        connection.close()
        peer.close()
    return found


def stream(data):
    """A connection finds the same requests however the bytes were cut on their way."""
    choose = atheris.FuzzedDataProvider(data)
    cuts = sorted(choose.ConsumeIntListInRange(choose.ConsumeIntInRange(0, 6), 0, 2000))
    text = choose.ConsumeBytes(LIMIT)
    whole = _requests([text] if text else [])
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if text[a:b]]
    assert _requests(pieces) == whole


def columns(data):
    """TensorFlow Serving's requests."""
    choose = atheris.FuzzedDataProvider(data)
    version = Version("m", 1, "v", "", "onnx")
    version.inputs, version.outputs = INPUTS[: choose.ConsumeIntInRange(1, len(INPUTS))], OUTPUTS[:1]
    version.interfaces = Interfaces(version.inputs, version.outputs)
    read = tuple(form.read_body for form in FORMS.values())[choose.ConsumeIntInRange(0, 2)]
    try:
        plan = read(version, Body(choose.ConsumeBytes(LIMIT)))
    except Refusal as refusal:
        assert refusal.status == 400, refusal.status
        return
    for spec in version.inputs:
        assert plan.feeds[spec.name].dtype == spec.dtype


def inflated(data):
    """A compressed body is never larger than allowed."""
    coding = (b"gzip", b"deflate")[data[0] % 2] if data else b"gzip"
    try:
        body = compression.inflate(data[1:], coding, LIMIT)
    except Refusal as refusal:
        assert refusal.status in (400, 413), refusal.status
        return
    assert len(body) <= LIMIT
    again = compression.deflate([bytes(body)], coding)
    assert compression.inflate(again, coding, LIMIT) == body


def document(data):
    """What comes from the fleet: valid by construction, or refused as such."""
    for read in (
        parse_manifest,
        lambda text: decode(text, Assignment, limit_bytes=LIMIT),
        lambda text: decode(text, StateReport, limit_bytes=LIMIT),
        lambda text: decode(text, Telemetry, limit_bytes=LIMIT),
    ):
        try:
            read(data)
        except ContractError:
            continue


TARGETS = {one.__name__: one for one in (request, stream, columns, inflated, document)}


def main():
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
