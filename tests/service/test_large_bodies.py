"""JSON bodies that are large: pictures as text, and what only looks like a request."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from service import long_texts, media
from service.body import MAX_COMMAS, MAX_QUOTES
from service.errors import BodyTooLargeError
from service.long_texts import taken_out
from tests.service.conftest import MODEL, data_uri, problem, question, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from service.long_texts import DataUri
    from tests.service.conftest import MakeSettings, StandInWorker

PIECE = 16


def as_text(data: bytes) -> str:
    """Base64; of ten to twelve bytes it is one piece."""
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    """Base64 is decoded by so few characters that a short text has many pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "CHUNK", PIECE)
        yield


@given(st.binary(max_size=200))
def test_base64_in_pieces_is_what_it_was(data: bytes) -> None:
    """Whatever the length, and however much padding it ends with."""
    assert media._decoded(as_text(data)).getvalue() == data


@given(
    st.text("AQgw+/=\n\\ é", max_size=80)
    | st.lists(st.binary(min_size=10, max_size=12).map(as_text), max_size=4).map("".join)
)
def test_what_is_no_base64_as_a_whole_is_none_in_pieces(payload: str) -> None:
    """Padding at the end of a piece is as wrong as anywhere before the end."""
    try:
        whole = base64.b64decode(payload, validate=True)
    except ValueError:
        with pytest.raises(ValueError, match=r"base64|padding|ASCII|ascii|characters"):
            media._decoded(payload)
    else:
        assert media._decoded(payload).getvalue() == whole


@pytest.fixture
def taking_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data URIs are long from twelve bytes on, so that small documents have many."""
    monkeypatch.setattr(long_texts, "LONG", 12)


TEXTS = (
    st.text(max_size=12)
    | st.text('ab/\\",:{}[]é😀\n', max_size=12)
    | st.text("abAB+/=", max_size=24).map(lambda payload: f"data:image/png;base64,{payload}")
    | st.text("abAB+/=", max_size=24).map(lambda payload: f"DATA:;base64,{payload}")
    | st.text('ab/\\"', max_size=24).map(lambda payload: f"data:text,{payload}")
)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def put_back(value: Any, texts: dict[str, DataUri]) -> Any:
    if isinstance(value, str) and value in texts:
        uri = texts[value]
        return f"{uri.header},{bytes(uri.payload).decode().replace(chr(92), '')}"
    if isinstance(value, list):
        return [put_back(one, texts) for one in value]
    if isinstance(value, dict):
        return {put_back(key, texts): put_back(one, texts) for key, one in value.items()}
    return value


@pytest.mark.usefixtures("taking_short")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DOCUMENTS, st.booleans(), st.booleans())
def test_what_is_taken_out_of_json_is_all_that_is_missing(
    document: Any, ascii_only: bool, slashes: bool
) -> None:
    """With its stand-ins put back, it is the document that it was, however it was written."""
    written = json.dumps(document, ensure_ascii=ascii_only)
    if slashes:  # as PHP writes them
        written = written.replace("/", "\\/")
    rest, texts = taken_out(bytearray(written.encode()), 40)
    assert put_back(json.loads(rest), texts) == document
    assert all(len(stand_in) == 40 for stand_in in texts)


def test_no_long_data_uri_reaches_the_parser() -> None:
    """Also with slashes escaped, in either case of the scheme, and beside texts that only look like one."""
    data = bytes(range(256)) * 400
    payload = base64.b64encode(data).decode()
    written = json.dumps(
        {"images": [f"data:image/png;base64,{payload}", f"Data:;base64,{payload}"], "question": '"data:,'}
    )
    for body in (written, written.replace("/", "\\/")):
        rest, texts = taken_out(bytearray(body.encode()), 100)
        assert len(rest) < 400
        assert json.loads(rest)["images"] == list(texts)
        assert [uri.header for uri in texts.values()] == ["data:image/png;base64", "Data:;base64"]
        assert [media._decoded(uri.payload).getvalue() for uri in texts.values()] == [
            bytes(range(256)) * 400
        ] * 2


@pytest.mark.parametrize("field", ["question", "questions", "system", "stop", "model", "method", "unknown"])
async def test_a_long_data_uri_in_another_place_is_refused_as_any_long_text(
    client: httpx.AsyncClient, field: str
) -> None:
    """The error is the one of a text as long that is none."""
    asked = question()
    refused = []
    for text in ("data:text/plain;base64," + "A" * 70_000, "x" * 70_023):
        value = [text] if field in ("questions", "stop") else text
        body = {name: each for name, each in asked.items() if name != "question" or field != "questions"}
        refused.append(await client.post("/v1/answer", json=body | {field: value}))
    assert refused[0].status_code == refused[1].status_code == 422
    assert refused[0].json()["detail"] == refused[1].json()["detail"]


def noise() -> bytes:
    """A picture of some 180 kB."""
    values = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


async def test_escaped_slashes_do_not_count_as_picture(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """A file of just the greatest size is taken however its base64 is written, and one byte more is not."""
    data = noise()
    body = json.dumps(question(image=data_uri(data)))
    for limit, status in ((len(data), 200), (len(data) - 1, 413)):
        async with serving(make_settings(max_image_bytes=limit)) as client:
            for written in (body, body.replace("/", "\\/")):
                headers = {"content-type": "application/json"}
                reply = await client.post("/v1/answer", content=written, headers=headers)
                assert reply.status_code == status, reply.text


async def test_a_large_picture_is_answered_on_every_route(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """Its base64 as it is, and with slashes escaped."""
    uri = data_uri(noise())
    assert len(uri) > 2 * long_texts.LONG
    chat = {
        "model": MODEL,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What?"},
                    {"type": "image_url", "image_url": {"url": uri}},
                ],
            }
        ],
    }
    for route, body in (("/v1/answer", question(image=uri)), ("/v1/chat/completions", chat)):
        for written in (json.dumps(body), json.dumps(body).replace("/", "\\/")):
            reply = await client.post(route, content=written, headers={"content-type": "application/json"})
            assert reply.status_code == 200, reply.text
    assert len({job.media[0].id for job in worker.jobs}) == 1


async def test_json_that_ends_within_a_long_data_uri_is_malformed(client: httpx.AsyncClient) -> None:
    """As it is for a short one."""
    for length in (10, 100_000):
        body = '{"image": "data:image/png;base64,' + "A" * length
        refused = await client.post("/v1/answer", content=body, headers={"content-type": "application/json"})
        assert "not valid JSON" in problem(refused, 400, "malformed-body")


async def test_json_with_much_beside_its_media_is_too_large(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No valid request has so much text."""
    monkeypatch.setattr(long_texts, "MAX_REST", 100_000)
    refused = await client.post("/v1/answer", json=question(question="x" * 100_000))
    assert "beside its data URIs" in problem(refused, 413, "body-too-large")


@pytest.mark.parametrize("route", ["/v1/answer", "/v1/chat/completions"])
async def test_a_body_of_very_many_values_is_not_parsed(client: httpx.AsyncClient, route: str) -> None:
    """The parser would keep everybody waiting for seconds: 413 before it begins."""
    body = b'{"stop": [' + b"0," * (MAX_COMMAS + 1) + b"0]}"
    refused = await client.post(route, content=body, headers={"content-type": "application/json"})
    if route == "/v1/answer":
        assert "commas" in problem(refused, 413, "body-too-large")
    else:
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body-too-large")


async def test_a_body_of_very_many_quotation_marks_is_not_searched(client: httpx.AsyncClient) -> None:
    """The search for data URIs goes from one to the next."""
    body = b'"' * (MAX_QUOTES + 1)
    refused = await client.post("/v1/answer", content=body, headers={"content-type": "application/json"})
    assert "quotation marks" in problem(refused, 413, "body-too-large")


def test_no_more_is_searched_for_data_uris_than_may_be_beside_them() -> None:
    """One that lies further on makes no difference: such a body is refused."""
    image = "data:image/png;base64," + "A" * 70_000
    beside = json.dumps({"question": "\n" * (long_texts.MAX_REST // 2), "image": image})
    with pytest.raises(BodyTooLargeError):
        taken_out(bytearray(beside.encode()), 100)


async def test_long_texts_with_many_commas_are_fine(client: httpx.AsyncClient, worker: StandInWorker) -> None:
    """Eight questions of the greatest length, half of it commas."""
    texts = [str(number) + ", " * 8_000 + "?" for number in range(8)]
    asked = question(questions=texts)
    del asked["question"]
    assert json.dumps(asked).count(",") < MAX_COMMAS
    assert (await client.post("/v1/answer", json=asked)).status_code == 200
    assert worker.jobs[0].questions == tuple(texts)
