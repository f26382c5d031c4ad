"""A JPEG or PNG in, labels out: what a release declares about its pictures, done before and after the model.

`POST /v2/models/{model}/picture` takes the bytes of one file. What happens to the pixels is data in the signed release (size,
fit, colour, layout, normalisation), never code. Decoding is the library's, held to two formats and to a number of pixels, and
never done by the thread that polls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qs

import numpy as np

from agent.contract.manifest import Picture
from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal
from agent.serving.api import pixels, tensors
from agent.serving.api.classification import floats, largest
from agent.serving.api.protocol import VERSION
from agent.serving.models.version import Version
from agent.serving.prediction import Form
from agent.serving.routes import Kind, Request, Route
from agent.serving.scheduling.demand import SequenceDemand
from agent.variants import named
from runtimes.contract import Array, TensorSpec

MAX_TOP = 1000


@dataclass(slots=True)
class Plan:
    """A request, understood. `outputs` holds the one that the labels come from."""

    picture: Picture
    input: TensorSpec
    output: TensorSpec
    top: int
    outputs: list[str] = field(default_factory=list)
    priority: int = 0
    timeout_s: float | None = None
    sequence: SequenceDemand | None = None


class PictureForm(Form):
    """A picture as the form of a prediction."""

    def read(self, version: Version, call: Request) -> Plan:
        picture = version.picture
        if picture is None:
            raise Refusal(400, f"model '{version.name}' takes no pictures: its release declares none. Send it tensors")
        interface = version.interfaces.plain
        source = named(picture.input, interface.inputs, interface.required, "input")
        output = named(picture.output, interface.outputs, interface.said_outputs, "output")
        return Plan(picture, source, output, _top(call.match.query, picture.top), [output.name])

    def feeds(self, _version: Version, plan: Plan, call: Request) -> Mapping[str, Array]:
        return {plan.input.name: pixels.read(call.body, plan.picture, plan.input, call.allowance)}

    def write(self, version: Version, plan: Plan, _call: Request, arrays: Sequence[Array]) -> Answer:
        scores = _scores(arrays[0], plan)
        names = version.labels.get(plan.output.name, ())
        labels = [
            {"index": int(i), **({"label": names[i]} if i < len(names) else {}), "score": round(float(scores[i]), 6)}
            for i in largest(scores, min(plan.top, len(scores)))
        ]
        document = {"model_name": version.name, "model_version": str(version.number), "labels": labels}
        return Answer((tensors.finite_or_not(document),))


def _top(query: str, default: int) -> int:
    """How many labels `?top=` asks for.  Raises: Refusal (400)."""
    given = parse_qs(query, keep_blank_values=True).get("top")
    if given is None:
        return default
    if not given[0].isdecimal() or not 1 <= int(given[0][:9]) <= MAX_TOP:
        raise Refusal(400, f"top={given[0][:20]!r}: expected a number from 1 to {MAX_TOP}")
    return int(given[0])


def _scores(array: Array, plan: Plan) -> Array:
    """A float per class; what is quantized is given its real values."""
    values = floats(array) if plan.output.datatype == "BF16" else array
    scores = values.reshape(-1).astype(np.float64)
    quantization = plan.output.quantization
    if quantization is not None and quantization.axis is None and array.dtype.kind in "iu":
        scores = (scores - quantization.zero_points[0]) * quantization.scales[0]
    if plan.picture.scores == "softmax":
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
    return scores


class Predictions(Protocol):
    def infer(self, form: Any, call: Request) -> Answer | None: ...


class Pictures:
    def __init__(self, dataplane: Predictions) -> None:
        self._dataplane = dataplane
        self._form = PictureForm()

    def routes(self) -> list[Route]:
        paths = ("/v2/models/{model}/picture", "/v2/models/{model}/versions/{version:" + VERSION + "}/picture")
        return [Route("POST", path, Access.PREDICT, self._answer, Kind.HEAVY, parks=True) for path in paths]

    def _answer(self, call: Request) -> Answer | None:
        return self._dataplane.infer(self._form, call)
