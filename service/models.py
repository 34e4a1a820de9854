"""Which models are served, in OpenAI's shape with what a budget needs to know beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict

from service.context import Here  # noqa: TC001 (fastapi reads the annotations at run time)
from service.errors import UnknownModelError
from service.openapi import problems

if TYPE_CHECKING:
    from service.context import Context
    from worker.contract import WorkerStatus

router = APIRouter(tags=["models"])


class ModelView(BaseModel):
    """A model with a worker. `workers` counts those that are warm."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """What `model` in a request names."""
    object: str = "model"
    created: int
    """When this was told, in Unix seconds."""
    owned_by: str = "prismprune"
    family: str
    """The adapter that serves it, such as `llava`; empty until a worker is warm."""
    modalities: tuple[str, ...]
    """`image`, `video`."""
    methods: tuple[str, ...]
    """What `method` in a request may be."""
    default_token_budget: int | str
    """Visual tokens of a request that names no budget, or `all`."""
    quantization: str | None
    """How weights are stored, where not as published."""
    revision: str | None
    """The checkpoint's, where one is pinned."""
    workers: int
    """Warm workers: 0 answers nothing yet."""


class ModelList(BaseModel):
    """Every model with a worker that was seen lately."""

    object: str = "list"
    data: list[ModelView]


@router.get("/v1/models", summary="Models served", response_model=ModelList, responses=problems(401, 503))
async def list_models(here: Here) -> ModelList:
    """Methods, families, modalities and default budgets, from the workers' heartbeats."""
    return ModelList(data=await _models(here))


@router.get(
    "/v1/models/{model:path}",
    summary="One of the models served",
    response_model=ModelView,
    responses=problems(401, 404, 503),
)
async def read_model(
    model: Annotated[str, Path(openapi_examples={"the demo": {"value": "prism-demo"}})], here: Here
) -> ModelView:
    """404 if no worker of the model was seen lately."""
    models = await _models(here)
    for one in models:
        if one.id == model:
            return one
    raise UnknownModelError(f"No such model; served here: {', '.join(one.id for one in models) or 'none'}.")


async def _models(here: Context) -> list[ModelView]:
    by_model: dict[str, list[WorkerStatus]] = {}
    for status in await here.workers.fresh():
        by_model.setdefault(status.model, []).append(status)
    return [_view(model, workers) for model, workers in sorted(by_model.items())]


def _view(model: str, workers: list[WorkerStatus]) -> ModelView:
    """What a warm worker says, where there is one: the others do not know their family yet."""
    first = max(workers, key=lambda status: status.warm)
    fields: dict[str, Any] = first.model_dump(include=set(ModelView.model_fields))
    return ModelView(id=model, created=int(time.time()), workers=sum(w.warm for w in workers), **fields)
