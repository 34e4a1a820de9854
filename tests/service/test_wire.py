"""The front end behind a real server on loopback: what an in-process client cannot show."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from service.__main__ import server
from service.serve.machine import free_ports
from tests.service.conftest import StandInWorker, listening_in_a_thread, png, question

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import uvicorn

    from tests.service.conftest import MakeSettings

LIMIT = 200_000
HEAD_LIMIT = 2048
FIRST_LINE = b"GET /livez HTTP/1.1\r\nHost: x\r\n"


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


@contextmanager
def running(make_settings: MakeSettings, **fields: object) -> Iterator[tuple[uvicorn.Server, int]]:
    """A server as `python -m service` runs it, in a thread, and its port."""
    (port,) = free_ports(1)
    listens = server(make_settings(port=port, **fields))
    thread = threading.Thread(target=listens.run)
    thread.start()
    while not listens.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield listens, port
    finally:
        listens.should_exit = True
        thread.join()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def said(connection: socket.socket) -> bytes:
    """All that comes until the server closes; a reset is a close."""
    heard = b""
    try:
        while piece := connection.recv(65536):
            heard += piece
    except ConnectionResetError:
        pass
    return heard


def send_on(connection: socket.socket, piece: bytes, pause_s: float = 0) -> None:
    """The same bytes again and again, for a while; raises once the server has closed."""
    for _ in range(1000):
        connection.sendall(piece)
        time.sleep(pause_s)


def padded(size: int) -> bytes:
    """A whole head of `size` bytes."""
    return FIRST_LINE + b"X-Pad: " + b"a" * (size - len(FIRST_LINE) - 11) + b"\r\n\r\n"


def test_a_head_at_the_limit_is_read_and_one_beyond_is_not(make_settings: MakeSettings) -> None:
    """In one piece or byte by byte: 200 and the connection goes on, or 431 and it is closed."""
    with running(make_settings, max_head_bytes=HEAD_LIMIT) as (_, port):
        for step in (HEAD_LIMIT * 2, 1):
            with connected(port) as connection:
                for size in (HEAD_LIMIT, HEAD_LIMIT + 1):
                    sent = padded(size)
                    assert len(sent) == size
                    for start in range(0, size, step):
                        connection.sendall(sent[start : start + step])
                    if size == HEAD_LIMIT:
                        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
                assert said(connection).startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")


@pytest.mark.parametrize("start", [FIRST_LINE + b"X-Pad: ", FIRST_LINE, b"GET /", b"\r\n"])
def test_no_head_grows_without_end(make_settings: MakeSettings, start: bytes) -> None:
    """One long header, many, a long address, blank lines: the connection is closed long before the end."""
    more = (
        b"a: b\r\n" * 2000 if start == FIRST_LINE else b"\r\n" * 5000 if not start.strip() else b"a" * 10_000
    )
    with running(make_settings, max_head_bytes=HEAD_LIMIT) as (_, port), connected(port) as connection:
        connection.sendall(start)
        with pytest.raises(ConnectionError):
            send_on(connection, more)


def test_no_trailer_grows_without_end(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """What follows the last chunk is kept by the parser too, and is no part of the body that is counted."""
    head = b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with running(make_settings, max_head_bytes=HEAD_LIMIT) as (_, port), connected(port) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n")
        with pytest.raises(ConnectionError):
            send_on(connection, b"a: b\r\n" * 2000)


@pytest.mark.parametrize("sent", [b"", FIRST_LINE, b"\r\n", b"GET /livez HTTP/1.1\r\n\r\nG"])
def test_a_connection_without_a_whole_head_is_closed(make_settings: MakeSettings, sent: bytes) -> None:
    """Silent ones, half a head, blank lines, half a second head: none keeps its place."""
    with running(make_settings, head_timeout_s=0.3) as (_, port), connected(port) as connection:
        connection.sendall(sent)
        heard = said(connection)
        assert heard.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def test_a_head_that_drips_is_closed(make_settings: MakeSettings) -> None:
    """The time is for the whole head: a byte now and then does not begin it anew, also of the second."""
    with running(make_settings, head_timeout_s=0.5) as (_, port), connected(port) as connection:
        connection.sendall(FIRST_LINE + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(FIRST_LINE)
        with pytest.raises(ConnectionError):
            send_on(connection, b"a", 0.05)


def test_a_body_that_nobody_reads_does_not_drip_for_ever(make_settings: MakeSettings) -> None:
    """The answer was sent, such as 413, and the caller goes on sending a little: closed all the same."""
    head = (
        b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with running(make_settings, head_timeout_s=0.5) as (_, port), connected(port) as connection:
        connection.sendall(head % 10**12)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        with pytest.raises(ConnectionError):
            send_on(connection, b" ", 0.05)


def test_slow_bodies_and_answers_outlast_the_time_for_heads(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Chunks that come slowly, an answer that takes long, and half of the next head meanwhile."""
    body = json.dumps(question(question="for ever")).encode()
    with running(make_settings, head_timeout_s=0.3) as (_, port), connected(port) as connection:
        connection.sendall(
            b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for each in (body[:10], body[10:]):
            time.sleep(0.5)
            connection.sendall(b"%x\r\n%s\r\n" % (len(each), each))
        connection.sendall(b"0\r\n\r\n" + FIRST_LINE)
        time.sleep(1)
        worker.release.set()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"Connection: close\r\n\r\n")
        assert said(connection).endswith(b'{"status":"ok"}')


def test_requests_in_one_piece_are_answered_in_their_order(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Pipelined, with and without bodies, each head within the limit and all together far over it."""
    body = json.dumps(question()).encode()
    head = (
        b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    asked = head % len(body) + body
    with running(make_settings, max_head_bytes=HEAD_LIMIT) as (_, port), connected(port) as connection:
        last = FIRST_LINE + b"Connection: close\r\n\r\n"
        connection.sendall((padded(1500) + asked) * 4 + last)
        heard = said(connection)
    assert heard.count(b"HTTP/1.1 200") == 9
    assert heard.count(b'"answer":"red"') == 4


def test_no_redirect_names_the_host_that_a_caller_names(make_settings: MakeSettings) -> None:
    """A slash too many is no route: 404, as documented."""
    with running(make_settings) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/v1/answer/", b"{}", {"Host": "evil.example"})
        response = connection.getresponse()
        assert (response.status, response.getheader("location")) == (404, None)
        assert json.loads(response.read())["type"].endswith("/not-found")
        connection.close()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz", "/version"])
def test_probes_may_ask_without_a_body(make_settings: MakeSettings, worker: StandInWorker, path: str) -> None:
    """HEAD is what GET says, without the body; it stands in `Allow`, and not in the document."""
    with running(make_settings) as (listens, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for method, status, body in (("GET", 200, True), ("HEAD", 200, False), ("POST", 405, True)):
            connection.request(method, path)
            response = connection.getresponse()
            assert (response.status, bool(response.read())) == (status, body)
        assert response.getheader("allow") == "GET, HEAD"
        connection.close()
        app: Any = listens.config.app
        assert set(app.openapi()["paths"][path]) == {"get"}
