"""What FastAPI does not see of the routes for the OpenAPI document: bodies, refusals, headers, keys."""

from __future__ import annotations

import shlex
from copy import deepcopy
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from service.examples import answer_examples
from service.schemas import AnswerRequest, ChatRequest, OpenAIError, ProblemDetails

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import BaseModel

_REF = "#/components/schemas/{model}"
RETRY: dict[str, Any] = {
    "headers": {
        "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
    }
}
"""Of a response that says when to come again."""
_LATER = (429, 503)
_OPEN_ROUTES = ("/livez", "/readyz")
_KEY = "api_key"
_BINARY = {"type": "string", "format": "binary"}


def description(base_url: str, *, guarded: bool) -> str:
    """The document's first words, with a command that works as pasted where `base_url` is the service."""
    key = ' -H "Authorization: Bearer $KEY"' if guarded else ""
    return f"""Ask about images and videos, with a budget of visual tokens per request.

The examples work as they stand, and [the playground](./) asks without any code. With a file of your own:

    curl -s {shlex.quote(f"{base_url}/v1/answer")}{key} \\
      -F image=@examples/scene.png -F 'question=What color is the star?' -F token_budget=64
"""


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers problems with these statuses."""
    problem = {"application/problem+json": {"schema": {"$ref": _REF.format(model=ProblemDetails.__name__)}}}
    return {status: _refusal(status, problem, "Problem") for status in statuses}


def openai_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """As `problems`, for a route whose callers read OpenAI's errors."""
    error = {"application/json": {"schema": {"$ref": _REF.format(model=OpenAIError.__name__)}}}
    return {status: _refusal(status, error, "Error") for status in statuses}


def _refusal(status: int, content: dict[str, Any], description: str) -> dict[str, Any]:
    later = RETRY if status in _LATER else {}
    return {"content": content, "description": f"{description}: {HTTPStatus(status).phrase}", **later}


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


def install(app: FastAPI, *, guarded: bool) -> None:
    """Adds the models that only this module's parts refer to, and the key that `guarded` routes ask for.

    FastAPI's own 422 goes: a route that may refuse a parameter has a problem there, others take any text.
    """
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        document = deepcopy(generated())
        schemas = document["components"]["schemas"]
        _drop_validation_errors(document)
        for model in (AnswerRequest, ChatRequest, OpenAIError, ProblemDetails):
            for name, schema in _with_parts(model).items():
                schemas.setdefault(name, schema)
        if guarded:
            _guard(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # fastapi's documented way to extend the document


def _drop_validation_errors(document: dict[str, Any]) -> None:
    ref = {"$ref": _REF.format(model="HTTPValidationError")}
    for methods in document["paths"].values():
        for operation in methods.values():
            refused = operation["responses"].get("422", {}).get("content", {})
            if refused.get("application/json", {}).get("schema") == ref:
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _guard(document: dict[str, Any]) -> None:
    scheme = {"type": "http", "scheme": "bearer", "description": "A key of `python -m service.keys NAME`."}
    document["components"]["securitySchemes"] = {_KEY: scheme}
    document["security"] = [{_KEY: []}]
    for path in _OPEN_ROUTES:
        for operation in document["paths"][path].values():
            operation["security"] = []
