"""The front end behind a real server on loopback: what an in-process client cannot show."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.service.conftest import StandInWorker, listening_in_a_thread, png, question

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.service.conftest import MakeSettings

LIMIT = 200_000


@pytest.fixture
def port(make_settings: MakeSettings, worker: StandInWorker) -> Iterator[int]:
    """Port of a server with small limits, which runs in a thread."""
    with listening_in_a_thread(make_settings(max_json_bytes=LIMIT, max_multipart_bytes=LIMIT)) as listens_at:
        yield listens_at


def answer(connection: http.client.HTTPConnection) -> tuple[int, dict[str, object]]:
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_declared_body_over_the_limit_is_refused_unread(port: int, kind: str) -> None:
    """413 as a problem before a byte of the body is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/v1/answer")
    connection.putheader("Content-Type", kind)
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    status, body = answer(connection)
    assert (status, body["type"]) == (413, "https://prismprune.dev/problems/body-too-large")
    connection.close()


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_chunked_body_over_the_limit_is_refused(port: int, kind: str) -> None:
    """Without a declared length the bytes are counted; 413 comes while the body is still being sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/v1/answer")
    connection.putheader("Content-Type", kind)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    for chunk in (start, *[b" " * 10_000] * (LIMIT // 10_000 + 1)):
        connection.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    status, body = answer(connection)
    assert (status, body["type"]) == (413, "https://prismprune.dev/problems/body-too-large")
    connection.close()


def test_a_body_at_the_limit_is_read(port: int) -> None:
    """The limit itself is allowed: blanks after the JSON fill the body up."""
    body = json.dumps(question()).encode().ljust(LIMIT)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/answer", body, {"Content-Type": "application/json"})
    status, reply = answer(connection)
    assert (status, reply["answer"]) == (200, "red")
    connection.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_asks_as_the_documentation_says(port: int, tmp_path: Path) -> None:
    """The pasted command: a file, a question and a budget as form fields."""
    (tmp_path / "scene.png").write_bytes(png())
    fields = ("-F", f"image=@{tmp_path / 'scene.png'}", "-F", "question=What color is it?")
    command = ("curl", "-s", f"http://127.0.0.1:{port}/v1/answer", *fields, "-F", "token_budget=64")
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["answer"] == "red"
