"""The body of `POST /v1/answer` in the OpenAPI document: FastAPI does not see what the route reads itself."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from service.examples import answer_examples
from service.schemas import AnswerRequest, ChatRequest, OpenAIError, ProblemDetails

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import BaseModel

_REF = "#/components/schemas/{model}"
_BINARY = {"type": "string", "format": "binary"}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers problems with these statuses."""
    problem = {"application/problem+json": {"schema": {"$ref": _REF.format(model=ProblemDetails.__name__)}}}
    return {status: {"content": problem, "description": "Problem"} for status in statuses}


def openai_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """As `problems`, for a route whose callers read OpenAI's errors."""
    error = {"application/json": {"schema": {"$ref": _REF.format(model=OpenAIError.__name__)}}}
    return {status: {"content": error, "description": "Error"} for status in statuses}


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
    schema = _with_parts(AnswerRequest)[AnswerRequest.__name__]
    fields = {name: each for name, each in schema["properties"].items() if name not in ("images", "stream")}
    files = {"image": {"type": "array", "items": _BINARY, "description": "Repeat it for several images."}}
    return {"type": "object", "properties": fields | files | {"video": _BINARY}}


def _with_parts(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of `model` and those that it refers to, by name."""
    schema = model.model_json_schema(ref_template=_REF)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def install(app: FastAPI) -> None:
    """Adds the models that only this module's parts refer to."""
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        document = deepcopy(generated())
        schemas = document["components"]["schemas"]
        for model in (AnswerRequest, ChatRequest, OpenAIError, ProblemDetails):
            for name, schema in _with_parts(model).items():
                schemas.setdefault(name, schema)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # fastapi's documented way to extend the document
