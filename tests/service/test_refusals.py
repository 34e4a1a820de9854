"""What the front end refuses, with the status, the slug and the words that it refuses it with."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.datastructures import Headers

from service.app import create_app
from service.body import MAX_PARSED
from service.ids import new_id
from service.middleware import BodyLimit
from service.schemas import AnswerRequest
from service.settings import ServiceSettings
from tests.service.conftest import (
    MP4,
    StandInWorker,
    data_uri,
    encoded,
    exchanged,
    png,
    problem,
    question,
    serving,
    stored,
)
from worker.contract import MAX_TOKEN_BUDGET

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from tests.service.conftest import MakeSettings

ABSENT = object()
FORM = b'--x\r\nContent-Disposition: form-data; name="question"\r\n\r\nWhat?\r\n--x--\r\n'


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG of that size, and an empty picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def replace_by_a_file(directory: Path) -> None:
    """Makes a media store unusable, for root as well."""
    directory.rmdir()
    directory.write_text("a file where a directory should be")


REFUSED_FIELDS: list[tuple[dict[str, Any], int, str, str]] = [
    (
        {"token_budget": 0},
        422,
        "invalid-budget",
        'token_budget: must be a whole number from 1 to 16384, or "all"',
    ),
    ({"token_budget": -1}, 422, "invalid-budget", "token_budget"),
    ({"token_budget": 10**9}, 422, "invalid-budget", "token_budget"),
    ({"token_budget": 1e9}, 422, "invalid-budget", "token_budget"),
    ({"token_budget": 1.5}, 422, "invalid-budget", "token_budget"),
    ({"token_budget": True}, 422, "invalid-budget", "token_budget"),
    ({"token_budget": "many"}, 422, "invalid-budget", "token_budget"),
    ({"token_budget": "64"}, 422, "invalid-budget", "token_budget"),
    ({"token_budget": [64]}, 422, "invalid-budget", "token_budget"),
    ({"keep_ratio": 0}, 422, "invalid-budget", "keep_ratio"),
    ({"keep_ratio": 1.01}, 422, "invalid-budget", "keep_ratio"),
    ({"keep_ratio": "half"}, 422, "invalid-budget", "keep_ratio"),
    ({"token_budget": 64, "keep_ratio": 0.5}, 422, "invalid-budget", "not both"),
    ({"method": "magic"}, 422, "unknown-method", "prism, saliency, uniform, random, fps"),
    ({"method": ["prism"]}, 422, "unknown-method", "method"),
    ({"tokenbudget": 64}, 422, "invalid-request", "tokenbudget: is not a known field"),
    ({"prism": {"share": 1}}, 422, "invalid-request", "prism.share: is not a known field"),
    ({"prism": {"salient_share": 2}}, 422, "invalid-request", "prism.salient_share"),
    ({"prism": {"salient_share": "0.5"}}, 422, "invalid-request", "prism.salient_share"),
    ({"prism": {"pool_factor": True}}, 422, "invalid-request", "prism.pool_factor"),
    ({"method": "divprune", "prism": {"pool_factor": 2}}, 422, "invalid-request", "no other"),
    ({"sampling": {"num_frames": True}}, 422, "invalid-request", "sampling.num_frames"),
    ({"sampling": {"num_frames": "4"}}, 422, "invalid-request", "sampling.num_frames"),
    ({"question": ABSENT}, 422, "invalid-request", "either question or questions"),
    ({"question": "   "}, 422, "invalid-request", "question"),
    ({"question": 7}, 422, "invalid-request", "question"),
    ({"questions": ["a?"]}, 422, "invalid-request", "either question or questions"),
    ({"question": ABSENT, "questions": []}, 422, "invalid-request", "questions"),
    ({"question": ABSENT, "questions": ["a?"] * 33}, 422, "invalid-request", "questions: at most 32"),
    ({"image": ABSENT}, 422, "invalid-request", "exactly one of image, images or video"),
    ({"image": ABSENT, "images": []}, 422, "invalid-request", "images"),
    ({"images": [data_uri(png())]}, 422, "invalid-request", "exactly one of image, images or video"),
    ({"image": ABSENT, "images": [data_uri(png())] * 9}, 422, "invalid-request", "images: at most 8"),
    ({"image": 7}, 422, "invalid-request", "image: must be a data URI"),
    ({"image": {"path": "/etc/passwd"}}, 422, "invalid-request", "image: must be a data URI"),
    ({"image": "https://example.org/a.png"}, 422, "invalid-request", "image: must be a data URI"),
    ({"image": "data:image/png,%89PNG"}, 422, "invalid-request", "image: must be a data URI"),
    (
        {"image": "data:image/png;base64,####"},
        422,
        "invalid-request",
        "image: the data URI is not valid base64",
    ),
    ({"image": {"url": "https://example.org/a.png"}}, 422, "url-not-allowed", "image"),
    ({"image": {"id": "0" * 64}}, 404, "unknown-media", "image"),
    ({"image": {"id": "../../etc/passwd"}}, 422, "invalid-request", "image.id"),
    ({"max_new_tokens": 0}, 422, "invalid-request", "max_new_tokens"),
    ({"max_new_tokens": 1025}, 422, "invalid-request", "max_new_tokens"),
    ({"max_new_tokens": True}, 422, "invalid-request", "max_new_tokens"),
    ({"temperature": 2.1}, 422, "invalid-request", "temperature"),
    ({"seed": 2**63}, 422, "invalid-request", "seed"),
    ({"stop": [""]}, 422, "invalid-request", "stop.0"),
    ({"sampling": {"num_frames": 65}}, 422, "invalid-request", "sampling.num_frames"),
    ({"sampling": {"start_s": 2, "end_s": 1}}, 422, "invalid-request", "sampling.end_s"),
    ({"timeout_s": 601}, 422, "invalid-request", "timeout_s: at most 600"),
    ({"deadline_s": 0}, 422, "invalid-request", "deadline_s"),
    ({"deadline_s": 3601}, 422, "invalid-request", "deadline_s: at most 3600"),
    ({"include": ["everything"]}, 422, "invalid-request", "include.0"),
    ({"stream": "yes"}, 422, "invalid-request", "stream: Input should be a valid boolean"),
    ({"model": "other"}, 404, "unknown-model", "served here: prism-demo"),
]


@pytest.mark.parametrize(("fields", "status", "slug", "words"), REFUSED_FIELDS)
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient,
    worker: StandInWorker,
    *,
    fields: dict[str, Any],
    status: int,
    slug: str,
    words: str,
) -> None:
    """A field out of range, unknown or missing is refused with its name, and nothing is enqueued."""
    sent = {name: value for name, value in question(**fields).items() if value is not ABSENT}
    assert words in problem(await client.post("/v1/answer", json=sent), status, slug)
    assert worker.jobs == []


@given(
    budget=st.one_of(
        st.integers(),
        st.floats(allow_nan=True),
        st.text(max_size=5),
        st.booleans(),
        st.none(),
        st.lists(st.integers(), max_size=2),
        st.sampled_from(["all", 1, MAX_TOKEN_BUDGET, MAX_TOKEN_BUDGET + 1]),
    )
)
def test_a_budget_is_a_whole_number_in_range_or_all(budget: object) -> None:
    """In JSON nothing else is a budget: no text, no fraction, no truth value."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        valid = 1 <= budget <= MAX_TOKEN_BUDGET
    else:
        valid = budget in (None, "all")
    body = json.dumps(question(token_budget=budget))
    if valid:
        assert AnswerRequest.model_validate_json(body).token_budget == budget
    else:
        with pytest.raises(ValidationError):
            AnswerRequest.model_validate_json(body)


@given(ratio=st.floats(allow_nan=True, allow_infinity=True))
def test_a_ratio_is_over_0_and_at_most_1(ratio: float) -> None:
    """Neither NaN nor infinity passes."""
    body = json.dumps(question(keep_ratio=ratio))
    if 0 < ratio <= 1:
        assert AnswerRequest.model_validate_json(body).keep_ratio == ratio
    else:
        with pytest.raises(ValidationError):
            AnswerRequest.model_validate_json(body)


@pytest.mark.parametrize(
    ("data", "status", "slug", "words"),
    [
        (b"just some text", 415, "unsupported-media-type", "image/png, image/jpeg"),
        (b"", 415, "unsupported-media-type", "first bytes"),
        (b"\x00\x00\x00\x20ftypavif" + bytes(32), 415, "unsupported-media-type", "first bytes"),
        (b"\x00\x00\x00\x20ftypisom" + bytes(32), 415, "unsupported-media-type", "video/mp4"),
        (b"II*\x00" + bytes(64), 415, "unsupported-media-type", "first bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported-media-type", "first bytes"),
        (png_header(50_000, 50_000), 413, "media-too-large", "25000000 pixels"),
        (png_header(5_001, 5_000), 413, "media-too-large", "25000000 pixels"),
        (png()[:20], 422, "undecodable-media", "image/png"),
        (b"BM and then some text", 422, "undecodable-media", "image/bmp"),
    ],
)
@pytest.mark.parametrize("multipart", [False, True])
async def test_media_are_judged_by_their_bytes(
    client: httpx.AsyncClient,
    media_directory: Path,
    *,
    data: bytes,
    status: int,
    slug: str,
    words: str,
    multipart: bool,
) -> None:
    """Whatever the declared type and name are; nothing that is refused is stored."""
    if multipart:
        files = {"image": ("a.png", data, "image/png")}
        response = await client.post("/v1/answer", data={"question": "What?"}, files=files)
    else:
        response = await client.post("/v1/answer", json=question(image=data_uri(data)))
    assert words in problem(response, status, slug)
    assert stored(media_directory) == []


async def test_a_picture_is_no_video(client: httpx.AsyncClient) -> None:
    """The field decides what is allowed."""
    files = {"video": ("a.mp4", png(), "video/mp4")}
    response = await client.post("/v1/answer", data={"question": "What?"}, files=files)
    assert "video: image/png is none of video/mp4" in problem(response, 415, "unsupported-media-type")


async def test_a_file_has_a_limit_of_its_own(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """An image over its limit is refused within a body that is not, in both encodings."""
    async with serving(make_settings(max_image_bytes=1000)) as client:
        large = encoded("BMP")
        by_json = await client.post("/v1/answer", json=question(image=data_uri(large)))
        by_form = await client.post("/v1/answer", data={"question": "?"}, files={"image": large})
    for response in (by_json, by_form):
        assert "image: images may have at most 1000 bytes" in problem(response, 413, "media-too-large")


@pytest.mark.parametrize("limit", ["max_images", "max_questions", "max_new_tokens", "max_sampled_frames"])
async def test_an_operator_may_lower_the_limits(
    make_settings: MakeSettings, worker: StandInWorker, limit: str
) -> None:
    """Each limit is a setting that holds; none can be raised over what the contract allows."""
    image = data_uri(png())
    more_than_one: dict[str, dict[str, Any]] = {
        "max_images": {"image": None, "images": [image, image]},
        "max_questions": {"question": None, "questions": ["a", "b"]},
        "max_new_tokens": {"max_new_tokens": 2},
        "max_sampled_frames": {
            "image": None,
            "video": data_uri(MP4, "video/mp4"),
            "sampling": {"num_frames": 2},
        },
    }
    others = {"sampling": {"num_frames": 1}, "max_new_tokens": 1}
    async with serving(make_settings(**{limit: 1})) as client:
        assert (await client.post("/v1/answer", json=question(**others))).status_code == 200
        refused = await client.post("/v1/answer", json=question(**(others | more_than_one[limit])))
    assert "at most 1" in problem(refused, 422, "invalid-request")
    with pytest.raises(ValidationError):
        make_settings(**{limit: 10_000})


@pytest.mark.parametrize("number", ["inf", "nan"])
@pytest.mark.parametrize("setting", ["timeout_s", "deadline_s", "max_deadline_s", "rate_per_minute"])
def test_no_setting_is_infinite(make_settings: MakeSettings, setting: str, number: str) -> None:
    """Refused at start: each request would fail on it."""
    with pytest.raises(ValidationError, match="finite"):
        make_settings(**{setting: float(number)})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{'a': 1}", b'{"image": "\xff"}', b'{"seed": ' + b"[" * 10_000, b'{"seed": 1e400']
)
async def test_broken_json_is_400(client: httpx.AsyncClient, body: bytes) -> None:
    """What is not JSON is no request at all."""
    response = await client.post("/v1/answer", content=body, headers={"Content-Type": "application/json"})
    assert "not valid JSON" in problem(response, 400, "malformed-body")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
@pytest.mark.parametrize("field", ["prism.pool_factor", "sampling.start_s", "sampling.end_s", "temperature"])
async def test_a_number_without_a_value_is_named(client: httpx.AsyncClient, field: str, number: str) -> None:
    """Parsers of JSON take it, at any depth; no worker could read the job."""
    part, _, name = field.rpartition(".")
    fields = {part: {name: "number"}} if part else {name: "number"}
    body = json.dumps(question(**fields)).replace('"number"', number)
    response = await client.post("/v1/answer", content=body, headers={"Content-Type": "application/json"})
    assert field in problem(response, 422, "invalid-request")


@pytest.mark.parametrize("body", [b"[]", b"7", b"null"])
async def test_json_that_is_no_object_is_422(client: httpx.AsyncClient, body: bytes) -> None:
    """JSON, but not a request."""
    response = await client.post("/v1/answer", content=body, headers={"Content-Type": "application/json"})
    problem(response, 422, "invalid-request")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b"no part at all"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno name\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x; charset=undefined", FORM),
        ('multipart/form-data; boundary=x; Charset="PunyCode"', FORM),
        ("multipart/form-data; boundary=x; charset=", FORM),
    ],
)
async def test_broken_multipart_is_400(client: httpx.AsyncClient, kind: str, body: bytes) -> None:
    """What the parser gives up on; its own words stay out of the reply."""
    response = await client.post("/v1/answer", content=body, headers={"Content-Type": kind})
    problem(response, 400, "malformed-body")


async def test_multipart_with_too_many_parts_is_refused(client: httpx.AsyncClient) -> None:
    """Parsing stops there: a small body can hold very many parts."""
    files = [("image", b"")] * 100
    problem(await client.post("/v1/answer", data={"question": "?"}, files=files), 400, "malformed-body")


@pytest.mark.parametrize(
    ("fields", "slug", "words"),
    [
        ({}, "invalid-request", "exactly one of image, images or video"),
        ({"token_budget": "many"}, "invalid-budget", "token_budget"),
        ({"token_budget": "1e9"}, "invalid-budget", "token_budget"),
        ({"token_budget": "true"}, "invalid-budget", "token_budget"),
        ({"token_budget": ["1", "2"]}, "invalid-request", "token_budget: is given more than once"),
        ({"temperature": "NaN"}, "invalid-request", "temperature"),
        ({"prism": "[" * 100_000}, "invalid-request", "prism"),
        ({"prism": "{}" + " " * MAX_PARSED}, "invalid-request", "prism"),
        ({"prism": '{"salient_share": NaN}'}, "invalid-request", "prism.salient_share"),
        ({"sampling": '{"end_s": Infinity}'}, "invalid-request", "sampling.end_s"),
        ({"budget": "64"}, "invalid-request", "budget: is not a known field"),
    ],
)
async def test_a_wrong_form_field_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], slug: str, words: str
) -> None:
    """Text that is not what its field wants is refused as in JSON."""
    files = {"image": png()} if fields else None
    response = await client.post("/v1/answer", data={"question": "?"} | fields, files=files or {"q": b""})
    if not fields:
        words = "q: is not a known field"
    assert words in problem(response, 422, slug)


@pytest.mark.parametrize("name", ["prism", "token_budget", "nobody"])
async def test_a_form_of_very_many_values_costs_no_more_than_its_text(
    client: httpx.AsyncClient, name: str
) -> None:
    """A parser would make many times as much of it, and the loop would wait."""
    values = f"[{','.join(['{}'] * 300_000)}]"
    fields = {"question": "?", name: values}
    tracemalloc.start()
    try:
        response = await client.post("/v1/answer", data=fields, files={"image": png()})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert name in problem(response, 422, "invalid-budget" if name == "token_budget" else "invalid-request")
    assert peak < 10 * len(values)


PART = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
PICTURE = (
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    + encoded("PNG")
    + b"\r\n"
)
ASKED = PICTURE + PART % (b"question", b"What?") + PART % (b"max_new_tokens", b"8")


@pytest.mark.parametrize("end", [b"", b"--x", b"--x-", b"--x\r\n", ASKED[: len(PICTURE) // 2]])
@pytest.mark.parametrize("route", ["/v1/answer", "/v1/media"])
async def test_a_form_that_is_cut_short_is_400(
    client: httpx.AsyncClient, worker: StandInWorker, route: str, end: bytes
) -> None:
    """Its last part would be missing, and the question be another."""
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = await client.post(route, content=ASKED + end, headers=headers)
    assert "closing boundary" in problem(response, 400, "malformed-body")
    assert worker.jobs == []


@pytest.mark.parametrize("end", [b"--x--", b"--x--\r\n", b"--x--\r\nan epilogue\r\n" + b"-" * 5000])
async def test_what_follows_a_form_is_ignored(
    client: httpx.AsyncClient, worker: StandInWorker, end: bytes
) -> None:
    """The closing boundary is the end, with or without a line break or an epilogue."""
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = await client.post("/v1/answer", content=ASKED + end, headers=headers)
    assert response.status_code == 200, response.text
    assert worker.jobs[0].generation.max_new_tokens == 8


async def test_a_form_without_a_file_is_refused(client: httpx.AsyncClient) -> None:
    """No media, and a file under a text field's name, say so."""
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=UTF-8"}
    response = await client.post("/v1/answer", content=FORM, headers=headers)
    assert "exactly one of image, images or video" in problem(response, 422, "invalid-request")
    response = await client.post("/v1/answer", files={"question": b"What?", "image": png()})
    assert "question: Input should be a valid string" in problem(response, 422, "invalid-request")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart"])
async def test_another_content_type_is_415(client: httpx.AsyncClient, kind: str | None) -> None:
    """The detail says which two are taken."""
    headers = {"Content-Type": kind} if kind else {}
    response = await client.post("/v1/answer", content=b"{}", headers=headers)
    assert "application/json or multipart/form-data" in problem(response, 415, "unsupported-media-type")


@pytest.mark.parametrize("kind", [None, "text/plain", "multipart/form-data; boundary=x"])
async def test_a_chat_that_is_not_declared_as_json_is_415(
    client: httpx.AsyncClient, kind: str | None
) -> None:
    """Before anything is read of it."""
    headers = {"Content-Type": kind} if kind else {}
    response = await client.post("/v1/chat/completions", content=b"{}", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported-media-type")


async def test_multipart_lifts_no_limit_where_it_is_not_taken() -> None:
    """Only the routes that write a form to disk take as much; of the others a body is held in memory."""
    settings = ServiceSettings(media_url="file:///nowhere", max_json_bytes=2000, max_multipart_bytes=3000)
    kind = Headers({"content-type": "multipart/form-data; boundary=x"})
    limits = {
        path: BodyLimit(create_app(settings), settings)._limit(path, kind)
        for path in ("/v1/answer", "/v1/media", "/v1/chat/completions", "/v1/jobs/1")
    }
    assert limits == {
        "/v1/answer": 3000,
        "/v1/media": 3000,
        "/v1/chat/completions": 2000,
        "/v1/jobs/1": 2000,
    }


async def test_unknown_routes_and_methods_are_problems_too(client: httpx.AsyncClient) -> None:
    """404 and 405 of the framework; 405 names the methods that are taken."""
    problem(await client.get("/v1/nothing"), 404, "not-found")
    response = await client.get("/v1/answer")
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
    response = await client.put(f"/v1/jobs/{new_id('job')}")
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "DELETE, GET"


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
async def test_a_body_over_its_limit_is_413(
    make_settings: MakeSettings, worker: StandInWorker, kind: str, declared: bool
) -> None:
    """By its declared length or, in chunks, by what has come; each encoding has its own limit."""
    limit = 2000 if kind == "application/json" else 3000

    async def chunks() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="question"\r\n\r\n'
        for _ in range(40):
            yield b"x" * 100

    async with serving(make_settings(max_json_bytes=2000, max_multipart_bytes=3000)) as client:
        body = b"x" * (limit + 1) if declared else chunks()
        response = await client.post("/v1/answer", content=body, headers={"Content-Type": kind})
    assert problem(response, 413, "body-too-large") == f"The body may have at most {limit} bytes."


async def test_a_broker_that_is_away_is_503(make_settings: MakeSettings, nowhere: str) -> None:
    """Questions and jobs say so and when to try again; bad input is still bad input."""
    async with serving(make_settings(broker_url=nowhere)) as client:
        for response in (
            await client.post("/v1/answer", json=question()),
            await client.get(f"/v1/jobs/{new_id('job')}"),
        ):
            problem(response, 503, "broker-away")
            assert response.headers["retry-after"] == "2"
        bad = await client.post("/v1/answer", json=question(token_budget=0))
    problem(bad, 422, "invalid-budget")


async def test_without_a_worker_jobs_queue_until_the_grace_period_is_over(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """A front end that has just started waits for its first worker; one long gone is 503."""
    headers = {"Prefer": "respond-async"}
    worker.beat(age_s=50)
    async with serving(make_settings(worker_grace_s=60)) as client:
        assert (await client.post("/v1/answer", json=question(), headers=headers)).status_code == 202
    async with serving(make_settings(worker_grace_s=0)) as client:
        refused = await client.post("/v1/answer", json=question(), headers=headers)
        assert "prism-demo" in problem(refused, 503, "no-worker")
        assert refused.headers["retry-after"] == "30"


async def test_a_media_store_that_is_away_is_503(
    make_settings: MakeSettings, worker: StandInWorker, media_directory: Path
) -> None:
    """The detail names neither path nor bucket."""
    async with serving(make_settings()) as client:
        replace_by_a_file(media_directory)
        detail = problem(await client.post("/v1/answer", json=question()), 503, "media-store-away")
    assert str(media_directory) not in detail
    assert worker.jobs == []


async def test_an_unexpected_error_tells_nothing_but_its_id(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """500 without the exception's words, which may quote a question: the log has type, stack and id."""
    words = str(frozenset(("secret",)))  # made here: the stack shows lines of source

    async def broken(*_: object) -> None:
        raise ValueError(words)

    monkeypatch.setattr("service.workers.Workers.expect", broken)
    response = await client.post("/v1/answer", json=question(), headers={"X-Request-Id": "look-here"})
    assert words not in problem(response, 500, "internal-error")
    assert "look-here" in caplog.text
    assert "ValueError" in caplog.text
    assert words not in caplog.text


async def test_a_caller_who_leaves_while_sending_is_no_error_of_ours(
    make_settings: MakeSettings, worker: StandInWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection closes before the body is complete: nothing is enqueued, nothing is logged as failed."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
    sent = await exchanged(
        create_app(make_settings()),
        {"method": "POST", "path": "/v1/answer", "headers": headers, "server": ("127.0.0.1", 8000)},
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    )
    assert sent[0]["status"] == 400
    assert "failed" not in caplog.text
    assert worker.jobs == []


@pytest.mark.parametrize("given_id", ["a b", "x" * 129, "", 'a"b', "ä"])
async def test_a_harmful_request_id_is_replaced(client: httpx.AsyncClient, given_id: str) -> None:
    """What could break a log line never reaches it."""
    response = await client.get("/livez", headers=[(b"X-Request-Id", given_id.encode())])
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_request_id_comes_back(client: httpx.AsyncClient) -> None:
    """Also on errors: `problem` compares header and body."""
    response = await client.get("/v1/jobs/job_0", headers={"X-Request-Id": "trace:1/2"})
    problem(response, 404, "unknown-job")
    assert response.headers["x-request-id"] == "trace:1/2"
