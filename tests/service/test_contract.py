"""The contract's page taken at its word, where no other test does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from service import errors
from service.errors import ServiceError
from service.keys import new_key
from service.settings import MIB
from tests.service.conftest import MODEL, MP4, bearer, data_uri, png, problem, question, serving

if TYPE_CHECKING:
    import httpx

    from tests.service.conftest import MakeSettings, StandInWorker

EXAMPLE: dict[str, Any] = {
    "model": MODEL,
    "question": "What color is the star?",
    "image": data_uri(png()),
    "token_budget": 64,
    "method": "prism",
    "max_new_tokens": 64,
    "temperature": 0,
    "top_p": 1,
    "seed": None,
    "stop": [],
    "system": None,
    "sampling": {"num_frames": 8, "start_s": 0, "end_s": None},
    "timeout_s": 60,
    "deadline_s": 300,
    "stream": False,
    "include": ["token_map"],
}
"""Every field of a question, at its default where it has one."""


async def test_a_question_with_every_field_is_what_it_is_without_the_defaults(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """Written out they change nothing of the job."""
    short = {name: EXAMPLE[name] for name in ("question", "image", "token_budget", "include")}
    for sent in (EXAMPLE, short):
        reply = await client.post("/v1/answer", json=sent)
        assert reply.status_code == 200, reply.text
    own = {"id", "request_id", "created_at", "deadline_at"}
    full, brief = (job.model_dump(exclude=own) for job in worker.jobs)
    assert full == brief
    assert worker.jobs[0].deadline_at - worker.jobs[0].created_at == pytest.approx(300)


async def test_an_answer_has_the_names_of_the_contract(client: httpx.AsyncClient) -> None:
    """All of them, and no others."""
    body = (await client.post("/v1/answer", json=EXAMPLE)).json()
    assert {name: sorted(each) for name, each in body.items() if isinstance(each, dict)} == {
        "usage": ["completion_tokens", "prompt_tokens", "prompt_tokens_details", "total_tokens"],
        "visual_tokens": ["budget", "diverse", "kept", "method", "newlines", "original", "salient"],
        "timings": [
            "decode_ms",
            "generate_ms",
            "prefill_ms",
            "preprocess_ms",
            "queue_ms",
            "select_ms",
            "time_to_first_token_ms",
            "total_ms",
            "vision_ms",
        ],
        "memory": ["device", "kv_cache_bytes", "peak_bytes", "shared_with"],
    }
    assert sorted(body["usage"]["prompt_tokens_details"]) == ["cached_tokens", "image_tokens", "video_tokens"]
    (part,) = body["token_map"]
    assert sorted(part) == ["box", "crop", "diverse", "frame", "grid", "media", "salient", "time_s"]
    rest = {"answer", "finish_reason", "id", "memory", "model", "timings", "token_map", "usage", "warnings"}
    assert set(body) == rest | {"visual_tokens"}


async def test_a_video_comes_as_a_part_of_a_chat(client: httpx.AsyncClient, worker: StandInWorker) -> None:
    """`video_url` with a data URI; the job's media are a video."""
    link = {"type": "video_url", "video_url": {"url": data_uri(MP4, "video/mp4")}}
    message = {"role": "user", "content": [link, {"type": "text", "text": "What happens?"}]}
    reply = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": [message]})
    assert reply.status_code == 200, reply.text
    assert [ref.modality for ref in worker.jobs[0].media] == ["video"]


async def test_nothing_of_anothers_job_can_be_reached(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Neither its state nor its events, and least of all its end."""
    (alice, alices), (bob, bobs) = new_key("alice"), new_key("bob")
    by_alice, by_bob = bearer(alice), bearer(bob)
    async with serving(make_settings(api_keys=f"{alices},{bobs}")) as client:
        later = {"Prefer": "respond-async"}
        sent = question(question="for ever")
        mine = (await client.post("/v1/answer", json=sent, headers=by_alice | later)).headers["location"]
        for method, path in (("GET", mine), ("GET", f"{mine}/events"), ("DELETE", mine)):
            problem(await client.request(method, path, headers=by_bob), 404, "unknown-job")
        assert (await client.get(mine, headers=by_alice)).json()["state"] in ("queued", "running")


def subclasses(error: type[ServiceError]) -> list[type[ServiceError]]:
    """`error` and all that derive from it."""
    return [error, *(each for sub in error.__subclasses__() for each in subclasses(sub))]


LATER = [error for error in subclasses(ServiceError) if error.status in (429, 503)]


@pytest.mark.parametrize("error", LATER)
def test_whoever_is_to_come_again_is_told_when(error: type[ServiceError]) -> None:
    """Every 429 and 503 has `Retry-After`, in whole seconds."""
    words: dict[type[ServiceError], tuple[Any, ...]] = {
        errors.RateLimitedError: (3,),
        errors.QueueFullError: (MODEL, 3),
    }
    assert int(error(*words.get(error, ("Later.",))).headers["Retry-After"]) >= 1


def test_every_error_has_a_slug_of_its_own() -> None:
    """By which programs tell them apart."""
    slugs = [error.slug for error in subclasses(ServiceError)[1:] if error is not errors.JobEndedError]
    assert len(slugs) == len(set(slugs))


def test_the_limits_are_those_of_the_contract(make_settings: MakeSettings) -> None:
    """Each is a setting, and this is its default."""
    names = (
        "max_json_bytes",
        "max_multipart_bytes",
        "max_image_bytes",
        "max_image_pixels",
        "max_video_bytes",
        "max_images",
        "max_questions",
        "max_new_tokens",
        "max_sampled_frames",
        "worker_grace_s",
    )
    settings = make_settings()
    documented = Path(__file__).parents[2].joinpath("docs", "settings.md").read_text()
    assert [getattr(settings, name) for name in names] == [
        *(32 * MIB, 257 * MIB, 32 * MIB, 25_000_000, 256 * MIB),
        *(8, 32, 1024, 64, 120),
    ]
    assert [name for name in names if f"PRISM_{name.upper()}" not in documented] == []
