"""Questions that are answered: JSON and multipart, waiting, polling, and what crosses the queue."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING

import pytest

from service.ids import new_id
from tests.service.conftest import StandInWorker, data_uri, encoded, png, problem, question, serving
from worker.contract import job_key, media_path

if TYPE_CHECKING:
    from pathlib import Path

    import httpx
    from redis import Redis

    from tests.service.conftest import MakeSettings

MP4 = b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(64)


async def test_a_picture_and_a_question_get_an_answer(client: httpx.AsyncClient) -> None:
    """The reply is the contract's, without the members that this kind of answer does not have."""
    response = await client.post("/v1/answer", json=question(token_budget=64))
    assert response.status_code == 200
    body = response.json()
    assert body["answer"] == "red"
    assert body["visual_tokens"] == {
        "original": 576,
        "kept": 64,
        "salient": 32,
        "diverse": 32,
        "budget": 64,
        "method": "prism",
        "newlines": 0,
    }
    assert set(body) == {
        *("id", "model", "answer", "finish_reason", "usage"),
        *("visual_tokens", "timings", "memory", "warnings"),
    }


async def test_every_field_reaches_the_worker(client: httpx.AsyncClient, worker: StandInWorker) -> None:
    """What the request says is what the job says."""
    fields = {
        "model": "prism-demo",
        "keep_ratio": 0.25,
        "method": "prism",
        "prism": {"salient_share": 0.25, "pool_factor": 8},
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["\n"],
        "system": "Be brief.",
        "sampling": {"num_frames": 4, "start_s": 1, "end_s": 2.5},
        "deadline_s": 30,
        "include": ["token_map"],
    }
    response = await client.post("/v1/answer", json=question(**fields), headers={"X-Request-Id": "abc-1"})
    assert response.json()["token_map"][0]["grid"] == [24, 24]
    job = worker.jobs[0]
    assert (job.request_id, job.model, job.keep_ratio, job.method) == ("abc-1", "prism-demo", 0.25, "prism")
    assert (job.prism.salient_share, job.prism.pool_factor) == (0.25, 8)
    assert job.generation.model_dump() == {
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ("\n",),
        "system": "Be brief.",
    }
    assert job.sampling.end_s == 2.5
    assert job.deadline_at - job.created_at == pytest.approx(30)


async def test_several_questions_get_several_answers(client: httpx.AsyncClient) -> None:
    """`questions`, also a list of one, is answered by `answers`."""
    body = (await client.post("/v1/answer", json=question(question=None, questions=["A?"]))).json()
    assert [each["answer"] for each in body["answers"]] == ["red"]
    assert "answer" not in body
    assert "usage" not in body


async def test_absent_parts_of_the_budget_are_null(client: httpx.AsyncClient) -> None:
    """`salient` is null, not missing, where a method does not tell it apart."""
    body = (await client.post("/v1/answer", json=question(method="random"))).json()
    assert body["visual_tokens"]["salient"] is None


async def test_several_images_are_stored_in_order(
    client: httpx.AsyncClient, worker: StandInWorker, media_directory: Path
) -> None:
    """Each image is one file under the hash of its bytes, the same one twice is one file."""
    first, second = png(color="red"), encoded("JPEG")
    images = [data_uri(each) for each in (first, second, first)]
    assert (await client.post("/v1/answer", json=question(image=None, images=images))).status_code == 200
    job = worker.jobs[0]
    assert [ref.media_type for ref in job.media] == ["image/png", "image/jpeg", "image/png"]
    assert [ref.size_bytes for ref in job.media] == [len(first), len(second), len(first)]
    assert (media_directory / media_path(hashlib.sha256(first).hexdigest())).read_bytes() == first
    assert len(list((media_directory / "media").iterdir())) == 2


async def test_stored_media_are_named_by_id(client: httpx.AsyncClient, worker: StandInWorker) -> None:
    """Media that the store has already may be given by the hash of their bytes."""
    await client.post("/v1/answer", json=question())
    image = {"id": hashlib.sha256(png()).hexdigest()}
    assert (await client.post("/v1/answer", json=question(image=image))).status_code == 200
    assert worker.jobs[0].media == worker.jobs[1].media


async def test_a_video_is_taken_as_one(client: httpx.AsyncClient, worker: StandInWorker) -> None:
    """`video` makes a job of that modality."""
    fields = question(video=data_uri(MP4, "video/mp4"))
    del fields["image"]
    assert (await client.post("/v1/answer", json=fields)).status_code == 200
    assert (worker.jobs[0].modality, worker.jobs[0].media[0].media_type) == ("video", "video/mp4")


async def test_multipart_takes_one_file_and_text_fields(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """Numbers, "all" and objects arrive as text and are read as what they are; empty fields are absent."""
    fields = {
        "question": "What color is it?",
        "token_budget": "64",
        "seed": "",
        "temperature": "0.5",
        "prism": '{"salient_share": 0.25}',
        "sampling": '{"num_frames": 4, "start_s": 1}',
        "include": "token_map",
    }
    response = await client.post("/v1/answer", data=fields, files={"image": ("a.png", png(), "image/png")})
    assert response.status_code == 200, response.text
    job = worker.jobs[0]
    assert (job.token_budget, job.generation.seed, job.generation.temperature) == (64, None, 0.5)
    assert (job.prism.salient_share, job.include) == (0.25, ("token_map",))
    assert (job.sampling.num_frames, job.sampling.start_s) == (4, 1)
    assert job.media[0].id == hashlib.sha256(png()).hexdigest()


async def test_multipart_takes_repeated_files_and_questions(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """`image` and `questions` may be repeated; the order is kept."""
    files = [("image", ("a.png", png(color=color))) for color in ("red", "blue")]
    fields = {"questions": ["1?", "2?"], "token_budget": "all"}
    response = await client.post("/v1/answer", data=fields, files=files)
    assert response.status_code == 200, response.text
    assert [ref.id for ref in worker.jobs[0].media] == [
        hashlib.sha256(png(color=color)).hexdigest() for color in ("red", "blue")
    ]
    assert (worker.jobs[0].questions, worker.jobs[0].token_budget) == (("1?", "2?"), "all")


async def test_multipart_takes_a_video_larger_than_memory_spools(
    client: httpx.AsyncClient, worker: StandInWorker, media_directory: Path
) -> None:
    """A file over the spool's size is hashed and stored from disk, byte for byte."""
    video = MP4 + bytes(range(256)) * 12_000
    response = await client.post("/v1/answer", data={"question": "What?"}, files={"video": video})
    assert response.status_code == 200, response.text
    assert (media_directory / media_path(worker.jobs[0].media[0].id)).read_bytes() == video


async def test_respond_async_is_accepted_at_once_and_polled(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """202 with the job's place; the job shows its states and at last the result."""
    sent = question(question="for ever")
    response = await client.post("/v1/answer", json=sent, headers={"Prefer": "wait=5, respond-async"})
    assert (response.status_code, response.headers["preference-applied"]) == (202, "respond-async")
    assert response.headers["retry-after"] == "1"
    body, place = response.json(), response.headers["location"]
    assert (body["state"], place) == ("queued", f"/v1/jobs/{body['id']}")
    assert re.fullmatch(r"job_[0-9A-HJKMNP-TV-Z]{26}", body["id"])
    worker.release.set()
    while (view := (await client.get(place)).json())["state"] in ("queued", "running"):
        assert view["result"] is None
    assert (view["state"], view["attempts"], view["error"]) == ("succeeded", 1, None)
    assert view["result"]["answer"] == "red"
    assert view["created_at"] <= view["started_at"] <= view["finished_at"]


@pytest.mark.parametrize(
    "lines",
    [
        ["wait=5", "respond-async"],
        ["respond-async;foo=1"],
        ["Respond-Async ; foo=1 , wait=5"],
        ["handling=lenient; a=b, respond-async", "wait=1"],
    ],
)
async def test_a_preference_is_found_wherever_it_stands(
    client: httpx.AsyncClient, worker: StandInWorker, lines: list[str]
) -> None:
    """On a line of its own, among others, with parameters (RFC 7240, section 2)."""
    headers = [("Prefer", line) for line in lines]
    response = await client.post("/v1/answer", json=question(question="for ever"), headers=headers)
    worker.release.set()
    assert (response.status_code, response.headers["preference-applied"]) == (202, "respond-async")


async def test_another_preference_is_none_of_ours(client: httpx.AsyncClient) -> None:
    """Only its name counts, not its value or a parameter."""
    headers = [("Prefer", "wait=respond-async"), ("Prefer", "foo; respond-async")]
    assert (await client.post("/v1/answer", json=question(), headers=headers)).status_code == 200


async def test_a_limit_below_a_default_lowers_it(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """Who does not name a field is not refused for it, with a picture or a video."""
    settings = make_settings(max_new_tokens=32, max_sampled_frames=4, deadline_s=20, max_deadline_s=10)
    clip = question(image=None, video=data_uri(MP4, "video/mp4"), sampling={"end_s": 2})
    async with serving(settings) as client:
        for asked in (question(), clip):
            response = await client.post("/v1/answer", json=asked)
            assert response.status_code == 200, response.text
    for job in worker.jobs:
        assert (job.generation.max_new_tokens, job.sampling.num_frames) == (32, 4)
        assert job.deadline_at - job.created_at == pytest.approx(10)
    assert worker.jobs[1].sampling.end_s == 2


async def test_a_picture_has_no_frames_to_limit(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """What `sampling` says concerns videos."""
    del worker
    async with serving(make_settings(max_sampled_frames=4)) as client:
        response = await client.post("/v1/answer", json=question(sampling={"num_frames": 8}))
    assert response.status_code == 200, response.text


async def test_who_does_not_say_waits_no_longer_than_anybody_may(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """`max_timeout_s` bounds the default, too: a wait to the job's end would be 504."""
    async with serving(make_settings(timeout_s=60, max_timeout_s=0.2)) as client:
        response = await client.post("/v1/answer", json=question(question="for ever", deadline_s=5))
    worker.release.set()
    assert response.status_code == 202


async def test_a_wait_that_runs_out_leaves_the_job_running(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """`timeout_s` bounds the call, not the job: 202, and the result comes later."""
    response = await client.post("/v1/answer", json=question(question="for ever", timeout_s=0.2))
    assert response.status_code == 202
    assert "preference-applied" not in response.headers
    worker.release.set()
    while (view := (await client.get(response.headers["location"])).json())["state"] != "succeeded":
        assert view["state"] in ("queued", "running")


async def test_a_job_that_fails_gives_its_status_to_the_waiting_caller(client: httpx.AsyncClient) -> None:
    """A truncated JPEG passes the header's check; the worker finds it and the caller gets 422."""
    truncated = encoded("JPEG", 320, 240)[:900]
    response = await client.post("/v1/answer", json=question(image=data_uri(truncated)))
    assert problem(response, 422, "undecodable-media") == "The image ends early."


async def test_a_failed_job_is_shown_with_its_problem(client: httpx.AsyncClient) -> None:
    """Polling a failed job is 200; the problem inside has the id of the request that made it."""
    headers = {"Prefer": "respond-async", "X-Request-Id": "mine"}
    sent = question(image=data_uri(encoded("JPEG", 320, 240)[:900]))
    place = (await client.post("/v1/answer", json=sent, headers=headers)).headers["location"]
    while (view := (await client.get(place)).json())["state"] in ("queued", "running"):
        pass
    assert (view["state"], view["result"]) == ("failed", None)
    assert view["error"] == {
        "type": "https://prismprune.dev/problems/undecodable-media",
        "title": "Media cannot be decoded",
        "status": 422,
        "detail": "The image ends early.",
        "request_id": "mine",
    }


async def test_an_expired_job_is_504(client: httpx.AsyncClient) -> None:
    """The job's own deadline has a status of its own, also where the worker left no words."""
    problem(await client.post("/v1/answer", json=question(question="expire")), 504, "deadline-exceeded")


@pytest.mark.parametrize("other", ["{unused}", "job_0", "{id}:lease", "{id}%0A", "*"])
async def test_an_unknown_job_is_404(client: httpx.AsyncClient, redis: Redis, other: str) -> None:
    """No job of that id; what is no id at all never becomes part of a key."""
    known = (await client.post("/v1/answer", json=question())).json()["id"]
    redis.set(job_key(known) + ":lease", "a worker's")
    place = other.format(id=known, unused=new_id("job"))
    problem(await client.get(f"/v1/jobs/{place}"), 404, "unknown-job")


async def test_jobs_do_not_stay_for_ever(
    client: httpx.AsyncClient, worker: StandInWorker, redis: Redis
) -> None:
    """A job that no worker ever takes leaves Redis by itself, with its events."""
    await client.post("/v1/answer", json=question(), headers={"Prefer": "respond-async"})
    keys = redis.keys(job_key("*"))
    assert len(keys) == 2  # the job and its events
    assert all(24 * 3600 <= redis.ttl(key) <= 25 * 3600 for key in keys)


async def test_neither_question_nor_media_are_in_the_headers_of_the_queue(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """Workers log a message's headers; what a caller asks belongs to the caller."""
    await client.post("/v1/answer", json=question(question="A secret?"))
    assert "secret" not in str(worker.messages)
    assert base64.b64encode(png()).decode() not in worker.jobs[0].model_dump_json()


async def test_another_model_goes_to_its_own_queue(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis
) -> None:
    """A model that some worker serves is accepted, whatever the default is."""
    worker.beat(model="org/other")
    async with serving(make_settings()) as client:
        sent = question(model="org/other")
        response = await client.post("/v1/answer", json=sent, headers={"Prefer": "respond-async"})
    assert response.status_code == 202
    assert redis.llen("prism.org-other") == 1


def test_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id drawn a millisecond later sorts later; two of the same millisecond differ."""
    drawn = []
    for milliseconds in (1, 1_700_000_000_000, 1_700_000_000_001, 2**48 - 1):
        monkeypatch.setattr("time.time_ns", lambda now=milliseconds: now * 1_000_000)
        drawn.append(new_id("job"))
    assert drawn == sorted(drawn)
    assert {len(each) for each in drawn} == {30}
    assert new_id("job") != new_id("job")
