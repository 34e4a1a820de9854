"""API keys, the guard before every route, and where the server may listen without them."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from redis.asyncio import Redis

from service.app import create_app
from service.errors import RateLimitedError, UnauthorizedError
from service.keys import ApiKeys, Caller, is_loopback, key_hash, main, may_listen, new_key
from service.middleware import OPEN
from service.rates import RateLimit
from service.settings import ANYONE, ListenSettings
from tests.service.conftest import StandInWorker, bearer, exchanged, png, problem, question, serving

if TYPE_CHECKING:
    from pathlib import Path

    from tests.service.conftest import MakeSettings

KEY, LINE = new_key("alice")
OTHER_KEY, OTHER_LINE = new_key("bob")


def test_a_key_is_random_and_its_line_holds_only_the_hash() -> None:
    """256 bits, and nothing of them in what is configured."""
    assert len({new_key("a")[0] for _ in range(100)}) == 100
    assert len(KEY) >= 43
    assert re.fullmatch("alice:[0-9a-f]{64}", LINE)
    assert KEY not in LINE


def test_the_command_prints_a_key_that_its_line_admits(capsys: pytest.CaptureFixture[str]) -> None:
    """What `python -m service.keys NAME` prints works as it stands."""
    assert main(["alice"]) == 0
    key, line = re.findall(r": +(\S+)\n", capsys.readouterr().out)
    assert ApiKeys((line,)).caller(f"Bearer {key}") == Caller("alice")


@given(st.text())
def test_no_other_key_is_admitted(key: str) -> None:
    """Any text is refused or is the key."""
    with pytest.raises(UnauthorizedError):
        ApiKeys((LINE, OTHER_LINE)).caller(f"Bearer {key}")


@pytest.mark.parametrize(
    "header", ["", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {LINE}", f"Bearer {KEY}x"]
)
def test_a_key_comes_as_bearer(header: str) -> None:
    """Neither bare, nor by another scheme, nor as its hash."""
    with pytest.raises(UnauthorizedError):
        ApiKeys((LINE,)).caller(header)


def test_every_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's match does not end the search early."""
    compared: list[bytes] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return real(known, given)

    real = hmac.compare_digest
    monkeypatch.setattr("service.keys.hmac.compare_digest", compare)
    assert ApiKeys((LINE, OTHER_LINE)).caller(f"bearer {KEY}") == Caller("alice")
    assert len(compared) == 2


def test_two_keys_of_one_name_are_one_owner() -> None:
    """So that a new key can replace an old one."""
    new, line = new_key("alice")
    keys = ApiKeys((LINE, line))
    assert keys.caller(f"Bearer {new}") == keys.caller(f"Bearer {KEY}")


async def test_every_route_but_probes_and_pages_asks_for_a_key(
    make_settings: MakeSettings,
) -> None:
    """Whatever the application serves, paths that lead nowhere included."""
    settings = make_settings(api_keys=LINE)
    documented = create_app(settings).openapi()["paths"]
    paths = {
        (method, re.sub("{.*?}", "x", path)) for path, methods in documented.items() for method in methods
    }
    paths |= {("GET", path) for path in (*OPEN, "/nowhere", "/docs/", "/playground", "/docs/static")}
    assert ("post", "/v1/answer") in paths
    async with serving(settings) as client:
        for method, path in paths:
            response = await client.request(method, path)
            if path in OPEN:
                assert response.status_code == 200
            else:
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/version", headers=bearer(KEY))).status_code == 200


async def test_a_refused_body_is_not_read(make_settings: MakeSettings) -> None:
    """A stranger costs a header's time."""
    read = []

    async def body() -> Any:
        read.append(1)
        yield b"{"

    async with serving(make_settings(api_keys=LINE)) as client:
        refused = await client.post("/v1/answer", content=body(), headers=bearer("wrong"))
    problem(refused, 401, "unauthorized")
    assert read == []


async def test_openai_clients_read_their_own_error(make_settings: MakeSettings) -> None:
    """On the chat route errors have OpenAI's shape, also those from before the route."""
    async with serving(make_settings(api_keys=LINE)) as client:
        body = (await client.post("/v1/chat/completions", json={})).json()
    assert body["error"]["code"] == "unauthorized"
    assert body["error"]["type"] == "authentication_error"


async def test_keys_come_from_a_file_too(make_settings: MakeSettings, tmp_path: Path) -> None:
    """One line a key; comments and empty lines are left out."""
    (tmp_path / "keys").write_text(f"# who may ask\n{LINE}\n\n{OTHER_LINE}\n")
    async with serving(make_settings(api_keys_file=tmp_path / "keys")) as client:
        assert (await client.get("/version", headers=bearer(OTHER_KEY))).status_code == 200
        problem(await client.get("/version"), 401, "unauthorized")


@pytest.mark.parametrize("content", [None, "", "# nothing yet\n", "alice\n", f"{KEY}\n", f"alice:{KEY}\n"])
def test_a_file_without_good_keys_is_no_open_door(tmp_path: Path, content: str | None) -> None:
    """Missing, empty, or with a key in a hash's place: a bad setting, whose message shows no key."""
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(ValidationError) as raised:
        ListenSettings(api_keys_file=tmp_path / "keys")
    assert KEY not in str(raised.value.errors(include_input=False))


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.4", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_beyond_loopback_needs_keys_or_many_words(host: str, alone: bool) -> None:
    """Keys, or the one long value; "yes" and "true" do not do."""
    assert is_loopback(host) is alone
    assert may_listen(ListenSettings(), host) is alone
    assert may_listen(ListenSettings(api_keys=LINE), host)
    assert may_listen(ListenSettings(allow_anonymous=ANYONE), host)
    for short in ("yes", "true", "1"):
        with pytest.raises(ValidationError):
            ListenSettings(allow_anonymous=short)


@pytest.mark.parametrize(
    ("server", "allowed"),
    [
        (("127.0.0.1", 8000), True),
        (("10.0.0.5", 8000), False),
        (("/run/prism.sock", None), True),
        (None, False),
    ],
)
async def test_however_it_was_started_strangers_are_refused(
    make_settings: MakeSettings, server: tuple[str, int | None] | None, allowed: bool
) -> None:
    """Under another ASGI server the address that a connection came in at decides; not to know it refuses."""
    scope = {"method": "GET", "path": "/version", "server": server}
    sent = await exchanged(create_app(make_settings()), scope, {"type": "http.request"})
    assert sent[0]["status"] == (200 if allowed else 401)


def start(media: Path, **environment: str) -> subprocess.Popen[str]:
    """`python -m service` with the media store `media`."""
    return subprocess.Popen(
        [sys.executable, "-m", "service"],
        env={**os.environ, "PRISM_MEDIA_URL": media.as_uri(), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_start_command_refuses_to_listen_beyond_loopback(tmp_path: Path) -> None:
    """In a container too: exit code 2, and the words to set."""
    with start(tmp_path, PRISM_HOST="0.0.0.0") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"PRISM_ALLOW_ANONYMOUS={ANYONE}" in said


def test_a_bad_setting_is_named_by_the_start_command(tmp_path: Path) -> None:
    """Exit code 2; no traceback, and the value, which may be a key, is not repeated."""
    with start(tmp_path, PRISM_API_KEYS=KEY) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "PRISM_API_KEYS" in said
    assert "Traceback" not in said
    assert KEY not in said


def test_the_start_command_serves_with_keys_and_logs_lines_of_json(
    tmp_path: Path, broker_url: str, port: int
) -> None:
    """It listens where it was told, asks for the key, and every line it writes is an object."""
    environment = {
        "PRISM_HOST": "0.0.0.0",
        "PRISM_PORT": str(port),
        "PRISM_API_KEYS": LINE,
        "PRISM_LOG_FORMAT": "json",
        "PRISM_BROKER_URL": broker_url,
    }
    with start(tmp_path, **environment) as process, httpx.Client(trust_env=False) as client:
        url = f"http://127.0.0.1:{port}/version"
        for _ in range(600):
            try:
                refused = client.get(url, headers={"X-Request-Id": "find-me"})
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        served = client.get(url, headers=bearer(KEY))
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert (refused.status_code, served.status_code) == (401, 200)
    assert process.returncode == -signal.SIGTERM  # uvicorn hands the signal on after it has closed everything
    lines = [json.loads(line) for line in said.splitlines()]
    assert {"time", "level", "logger", "request_id", "message"} <= set(lines[0])
    about = [line for line in lines if line["logger"] == "service.middleware"]
    assert about[0]["request_id"] == "find-me"
    assert KEY not in said


async def test_a_name_may_post_so_many_at_once_and_so_many_a_minute(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Beyond, 429 with the second from which it passes; reading is free, and others are not concerned."""
    limits = {"rate_per_minute": 6, "rate_burst": 3}
    async with serving(make_settings(api_keys=f"{LINE},{OTHER_LINE}", **limits)) as client:
        for _ in range(3):
            assert (await client.post("/v1/answer", json=question(), headers=bearer(KEY))).status_code == 200
        refused = await client.post("/v1/answer", json=question(), headers=bearer(KEY))
        assert (await client.get("/version", headers=bearer(KEY))).status_code == 200
        other = await client.post("/v1/answer", json=question(), headers=bearer(OTHER_KEY))
    problem(refused, 429, "rate-limited")
    assert int(refused.headers["retry-after"]) in range(1, 11)
    assert other.status_code == 200


async def test_the_allowance_comes_back_with_time(make_settings: MakeSettings) -> None:
    """A request costs 60 / rate seconds; refused ones cost nothing, and soon the next one passes."""
    settings = make_settings(rate_per_minute=600, rate_burst=2)
    async with Redis.from_url(settings.broker_url, decode_responses=True) as redis:
        limit, passed, refused = RateLimit(redis, settings), 0, 0
        while not refused:
            try:
                await limit.spend(Caller("alice"))
                passed += 1
            except RateLimitedError:
                refused += 1
        assert passed >= 2
        for _ in range(50):
            try:
                await limit.spend(Caller("alice"))
                break
            except RateLimitedError:
                await asyncio.sleep(0.01)
        else:
            pytest.fail("the allowance did not come back")
        assert await redis.ttl("prism:rate:alice") > 0


async def test_without_keys_nobody_is_limited(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """Callers cannot be told apart: a limit for all of them would let one stop the others."""
    async with serving(make_settings(rate_per_minute=1, rate_burst=1)) as client:
        for _ in range(3):
            assert (await client.post("/v1/answer", json=question())).status_code == 200


async def test_media_belong_to_the_key_that_sent_them(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """To another key they are 404, in the words for media that nobody sent; who sends them too has them."""
    async with serving(make_settings(api_keys=f"{LINE},{OTHER_LINE}")) as client:
        media = (await client.post("/v1/media", content=png(), headers=bearer(KEY))).json()
        by_id = question(image={"id": media["id"]})
        assert (await client.post("/v1/answer", json=by_id, headers=bearer(KEY))).status_code == 200
        others = await client.post("/v1/answer", json=by_id, headers=bearer(OTHER_KEY))
        nobodys = question(image={"id": key_hash("nothing")})
        absent = await client.post("/v1/answer", json=nobodys, headers=bearer(OTHER_KEY))
        assert problem(others, 404, "unknown-media") == problem(absent, 404, "unknown-media")
        await client.post("/v1/media", content=png(), headers=bearer(OTHER_KEY))
        assert (await client.post("/v1/answer", json=by_id, headers=bearer(OTHER_KEY))).status_code == 200
