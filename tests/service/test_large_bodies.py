"""JSON bodies that are large: pictures as text, and what only looks like a request."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import media
from service.body import MAX_COMMAS
from tests.service.conftest import problem, question

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from tests.service.conftest import StandInWorker

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


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_base64_in_pieces_is_what_it_was(data: bytes) -> None:
    """Whatever the length, and however much padding it ends with."""
    assert media._decoded(as_text(data)).getvalue() == data


@settings(deadline=None)
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


@pytest.mark.parametrize("route", ["/v1/answer", "/v1/chat/completions"])
async def test_a_body_of_very_many_values_is_not_parsed(client: httpx.AsyncClient, route: str) -> None:
    """The parser would keep everybody waiting for seconds: 413 before it begins."""
    body = b'{"stop": [' + b"0," * (MAX_COMMAS + 1) + b"0]}"
    refused = await client.post(route, content=body, headers={"content-type": "application/json"})
    if route == "/v1/answer":
        assert "commas" in problem(refused, 413, "body-too-large")
    else:
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body-too-large")


async def test_long_texts_with_many_commas_are_fine(client: httpx.AsyncClient, worker: StandInWorker) -> None:
    """Eight questions of the greatest length, half of it commas."""
    texts = [str(number) + ", " * 8_000 + "?" for number in range(8)]
    asked = question(questions=texts)
    del asked["question"]
    assert json.dumps(asked).count(",") < MAX_COMMAS
    assert (await client.post("/v1/answer", json=asked)).status_code == 200
    assert worker.jobs[0].questions == tuple(texts)
