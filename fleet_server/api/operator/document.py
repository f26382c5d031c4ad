"""The OpenAPI document: FastAPI's account of paths, parameters and bodies, with the types of all answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI

from fleet_server.api.http import ErrorAnswer
from fleet_server.api.operator.routes import Raw, Route

REF = "#/components/schemas/{name}"
JSON = "application/json"
ERRORS = {
    400: "The request breaks a rule.",
    401: "The caller is not known.",
    403: "The caller may not do this, or what was sent is not trusted.",
    404: "There is no such thing.",
    408: "The body did not come in time.",
    409: "It does not fit what is already so.",
    411: "The request does not say how long it is.",
    413: "The body is too large.",
    429: "The caller tries too often; Retry-After says when to try again.",
    500: "The server failed.",
    503: "The server cannot do it now; Retry-After says when to try again.",
    507: "The server's disk is full.",
}


def install(app: FastAPI, described: Sequence[tuple[str, str, Route]]) -> None:
    """Adds the types of the answers to the document of `app`. `described`: (path, method, route) of each operation."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = plain()
            _add_answers(found, described)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _add_answers(document: dict[str, Any], described: Sequence[tuple[str, str, Route]]) -> None:
    answered = [route.answered for _, _, route in described]
    kinds = [kind for kind in [*answered, *(route.body for _, _, route in described)] if kind is not None]
    typed = [kind for kind in kinds if not isinstance(kind, Raw)]
    schemas, components = msgspec.json.schema_components([*typed, ErrorAnswer], ref_template=REF)
    _add_components(document["components"]["schemas"], components)
    content: dict[int, dict[str, Any]] = {
        id(kind): {JSON: {"schema": schema}} for kind, schema in zip(typed, schemas, strict=False)
    }
    content |= {id(kind): {kind.media_type: {"schema": kind.schema}} for kind in kinds if isinstance(kind, Raw)}
    failed = {JSON: {"schema": {"$ref": REF.format(name=ErrorAnswer.__name__)}}}
    for (path, method, route), kind in zip(described, answered, strict=True):
        operation = document["paths"][path][method]
        if method == "head":  # its answers have no body
            operation["responses"] = {"200": {"description": "It is here."}, "404": {"description": "It is not here."}}
            continue
        operation["responses"] = {
            "200": {"description": "It is done.", "content": content[id(kind)]},
            **{str(status): {"description": text, "content": failed} for status, text in ERRORS.items()},
        }
        if route.body is not None:
            operation["requestBody"] = {"required": True, "content": content[id(route.body)]}


def _add_components(known: dict[str, Any], found: dict[str, Any]) -> None:
    for unused in ("HTTPValidationError", "ValidationError"):  # what FastAPI answers where nobody handles its errors
        known.pop(unused, None)
    for name in set(known) & set(found):  # an enumeration may stand in bodies and in answers
        same = known[name].get("enum") is not None and sorted(known[name]["enum"]) == sorted(found[name].get("enum", ()))
        assert same, f"two types of the API are called {name}"
    known.update(found)
