"""Requests as a client sends them, and what it sees of the answers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import httpx

from prismprune.demo.questions import TRAINED, scene_questions
from prismprune.demo.scenes import draw_scene

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.serving.servers import Server, Usage

TIMEOUT_S = 600
"""For one answer: thirty-two clients of the slowest side wait a minute."""
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Contender:
    """A server, and fields of its requests: two of one server are two budgets."""

    server: Server
    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Told:
    """What one answer's client saw: seconds from the request's beginning until its first and last words."""

    first_s: float
    total_s: float
    text: str
    tokens: int
    whole: bool

    @property
    def per_token_s(self) -> float | None:
        """Between two tokens; None where the answer came whole."""
        return None if self.whole else (self.total_s - self.first_s) / (self.tokens - 1)


@dataclass(frozen=True)
class Round:
    """All answers of one round, the seconds that it took, and what the server's processes took for it."""

    answers: tuple[Told, ...]
    wall_s: float
    usage: Usage

    @property
    def per_s(self) -> float:
        return len(self.answers) / self.wall_s


def questions(count: int, seed: int) -> list[list[dict[str, Any]]]:
    """The contents of `count` messages, each about a picture of its own, so that no cache can help."""
    return [_content(random.Random(seed + number)) for number in range(count)]


def _content(rng: random.Random) -> list[dict[str, Any]]:
    scene = draw_scene(rng)
    while not (asked := scene_questions(rng, scene, 1, TRAINED)):  # of one in 1,500 there is none to ask
        scene = draw_scene(rng)
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG")
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": asked[0].text}]


async def closed_loop(
    contender: Contender, contents: Sequence[list[dict[str, Any]]], clients: int, tokens: int | Sequence[int]
) -> Round:
    """`clients` clients; each sends its next request when its last one was answered.

    tokens: of every answer, or of each.
    """
    lengths = [tokens] * len(contents) if isinstance(tokens, int) else tokens
    waiting = list(zip(contents, lengths, strict=True))
    answers: list[Told] = []

    async def client(http: httpx.AsyncClient) -> None:
        while waiting:
            answers.append(await ask(http, contender, *waiting.pop()))

    async with _http(contender) as http:
        with contender.server.watched() as usage:
            began = time.perf_counter()
            await asyncio.gather(*(client(http) for _ in range(clients)))
            wall_s = time.perf_counter() - began
    return Round(tuple(answers), wall_s, usage)


async def open_loop(
    contender: Contender, contents: Sequence[list[dict[str, Any]]], per_s: float, tokens: int, seed: int
) -> Round:
    """Requests come whatever became of those before: `per_s` on average, independent of each other."""
    rng = random.Random(seed)

    async def client(http: httpx.AsyncClient, content: list[dict[str, Any]], after_s: float) -> Told:
        await asyncio.sleep(after_s)
        return await ask(http, contender, content, tokens)

    starts = list(accumulate((rng.expovariate(per_s) for _ in contents[1:]), initial=0.0))
    async with _http(contender) as http:
        with contender.server.watched() as usage:
            began = time.perf_counter()
            sent = [client(http, content, start) for content, start in zip(contents, starts, strict=True)]
            answers = await asyncio.gather(*sent)
            wall_s = time.perf_counter() - began
    return Round(tuple(answers), wall_s, usage)


def _http(contender: Contender) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=contender.server.url, timeout=TIMEOUT_S, limits=limits, trust_env=False)


async def ask(
    http: httpx.AsyncClient, contender: Contender, content: list[dict[str, Any]], tokens: int
) -> Told:
    """One answer of exactly `tokens` tokens. Raises `RuntimeError` where it comes otherwise."""
    rival = contender.server.rival
    body = {
        "model": rival.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        **rival.own,
        **contender.fields,
    }
    began = time.perf_counter()
    if rival.streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        first, last, text, told = await _streamed(http, body)
    else:
        reply = await http.post(PATH, json=body)
        _require_success(reply)
        first = last = time.perf_counter()
        answer = reply.json()
        text = answer["choices"][0]["message"]["content"].strip()
        told = answer["usage"]["completion_tokens"]
    if told != tokens:
        raise RuntimeError(f"{contender.name} gave {told} tokens where {tokens} were asked for")
    return Told(first - began, last - began, text, tokens, whole=not rival.streams)


async def _streamed(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float, str, int]:
    """When the first text came and when the end; the text; the count of tokens that the server tells."""
    first = last = None
    text, told = "", 0
    async with http.stream("POST", PATH, json=body) as reply:
        if reply.is_error:
            await reply.aread()
        _require_success(reply)
        async for line in reply.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"an error instead of an answer: {chunk['error']}")
            for choice in chunk["choices"]:
                last = time.perf_counter()
                if piece := choice["delta"].get("content"):
                    first, text = first or last, text + piece
            told = (chunk.get("usage") or {}).get("completion_tokens", told)
    if last is None:
        raise RuntimeError("an answer without an end")
    return first or last, last, text.strip(), told  # without text: of white space


def _require_success(reply: httpx.Response) -> None:
    if reply.is_error:
        raise RuntimeError(f"status {reply.status_code} instead of an answer: {reply.text}")
