"""The body of `POST /v1/answer` in the OpenAPI document: FastAPI does not see what the route reads itself."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from service.examples import answer_examples
from service.schemas import AnswerRequest, ProblemDetails

if TYPE_CHECKING:
    from fastapi import FastAPI

_REF = "#/components/schemas/{model}"
_BINARY = {"type": "string", "format": "binary"}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers problems with these statuses."""
    problem = {"application/problem+json": {"schema": {"$ref": _REF.format(model=ProblemDetails.__name__)}}}
    return {status: {"content": problem, "description": "Problem"} for status in statuses}


def answer_body() -> dict[str, Any]:
    """`requestBody` of `POST /v1/answer`."""
    ref = {"$ref": _REF.format(model=AnswerRequest.__name__)}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": ref, "examples": answer_examples()},
            "multipart/form-data": {"schema": _form()},
        },
    }


def _form() -> dict[str, Any]:
    schema = _schemas()[AnswerRequest.__name__]
    fields = {name: each for name, each in schema["properties"].items() if name not in ("images", "stream")}
    files = {"image": {"type": "array", "items": _BINARY, "description": "Repeat it for several images."}}
    return {"type": "object", "properties": fields | files | {"video": _BINARY}}


def _schemas() -> dict[str, Any]:
    """The request's models by name."""
    schema = AnswerRequest.model_json_schema(ref_template=_REF)
    return {**schema.pop("$defs", {}), AnswerRequest.__name__: schema}


def install(app: FastAPI) -> None:
    """Adds the models that only this module's parts refer to."""
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        document = deepcopy(generated())
        schemas = document["components"]["schemas"]
        for name, schema in (
            *_schemas().items(),
            (ProblemDetails.__name__, ProblemDetails.model_json_schema()),
        ):
            schemas.setdefault(name, schema)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # fastapi's documented way to extend the document
