"""Broken pictures, videos and requests, drawn from a seed: the same number gives the same bytes again."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from PIL import Image

from tests.service.conftest import data_uri, png, question

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

SIZE = (48, 32)
FRAMES = 6
_VIDEOS = {"mp4": "mpeg4", "mov": "mpeg4", "matroska": "mpeg4", "avi": "mpeg4", "webm": "libvpx"}


def pictures() -> list[bytes]:
    """A good picture of every kind, from which the broken ones are made."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}),
        ("PNG", {"save_all": True, "append_images": [noise.rotate(90)] * 3}),
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"save_all": True, "append_images": [noise.rotate(90)] * 3}),
        ("GIF", {"save_all": True, "append_images": [noise.rotate(90)] * 3}),
        ("BMP", {}),
    ]
    return [_saved(noise, kind, options) for kind, options in kinds]


def _saved(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def videos() -> list[bytes]:
    """A good clip in every container."""
    return [_clip(container, codec) for container, codec in _VIDEOS.items()]


def _clip(container: str, codec: str) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=Fraction(5))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for _ in range(FRAMES):
            pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def broken(goods: Sequence[bytes], rng: random.Random) -> bytes:
    """One of `goods` with one to four things wrong with it."""
    data = bytearray(rng.choice(goods))
    for _ in range(rng.randint(1, 4)):
        rng.choice(_DAMAGES)(data, rng, goods)
    return bytes(data)


def _flip(data: bytearray, rng: random.Random, _goods: Sequence[bytes]) -> None:
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _flip_early(data: bytearray, rng: random.Random, _goods: Sequence[bytes]) -> None:
    """Headers, which sizes and counts stand in, come first."""
    if data:
        data[rng.randrange(min(64, len(data)))] = rng.randrange(256)


def _truncate(data: bytearray, rng: random.Random, _goods: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _cut(data: bytearray, rng: random.Random, _goods: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.randint(1, 64)]


def _double(data: bytearray, rng: random.Random, _goods: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[at : at + rng.randint(1, 256)]


def _overwrite(data: bytearray, rng: random.Random, _goods: Sequence[bytes]) -> None:
    """With the numbers that lengths and sizes go wrong at."""
    at = rng.randrange(len(data) + 1)
    data[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))


def _insert(data: bytearray, rng: random.Random, _goods: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.randint(1, 64))


def _splice(data: bytearray, rng: random.Random, goods: Sequence[bytes]) -> None:
    """The head of one file and the tail of another."""
    other = rng.choice(goods)
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other)) :]


_DAMAGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    _flip,
    _flip_early,
    _truncate,
    _cut,
    _double,
    _overwrite,
    _insert,
    _splice,
)

_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e308,
    "",
    " ",
    "all",
    "none",
    "a" * 20_000,
    "\0",
    "\ud800",
    "\u202e",
    "😀" * 100,
    "../../etc/passwd",
    "'; DROP TABLE jobs; --",
    "{{7*7}}",
    "data:",
    "data:image/png;base64,",
    "data:image/png;base64,AAAA",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "https://127.0.0.1/",
    [],
    [[]],
    [None] * 40,
    {},
    {"id": "0" * 64},
    {"id": "x"},
    {"url": "https://[::1]/"},
    {"url": 7},
    {"a": {"b": {"c": []}}},
)
_FIELDS = (
    "model",
    "question",
    "questions",
    "image",
    "images",
    "video",
    "token_budget",
    "keep_ratio",
    "method",
    "prism",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "system",
    "sampling",
    "timeout_s",
    "deadline_s",
    "stream",
    "include",
    "unknown",
)
_TYPES = (
    "application/json",
    "application/json; charset=utf-16",
    "application/problem+json",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "text/plain",
    "",
)
_PATHS = (
    ("POST", "/v1/answer"),
    ("POST", "/v1/answer"),
    ("POST", "/v1/answer"),
    ("POST", "/v1/media"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/jobs/{}"),
    ("GET", "/v1/jobs/{}/events"),
    ("DELETE", "/v1/jobs/{}"),
    ("PUT", "/v1/answer"),
    ("GET", "/{}"),
)
_IDS = ("job_0", "job_" + "Z" * 26, "..", "%2e%2e%2f", "%00", "a" * 3000, "%F0%9F%98%80")


def request(rng: random.Random) -> dict[str, Any]:
    """Arguments of `httpx.AsyncClient.request`: a request that is a little wrong, or very."""
    method, path = rng.choice(_PATHS)
    headers = {"Content-Type": rng.choice(_TYPES)} if rng.random() < 0.2 else {"Content-Type": _TYPES[0]}
    if rng.random() < 0.3:
        headers["Prefer"] = rng.choice(("respond-async", "wait=1", ",,", "a" * 2000))
    if rng.random() < 0.3:
        headers["Idempotency-Key"] = rng.choice(("key", "", "a" * 256, "b" * 255, "ä"))
    encoded = {name: value.encode() for name, value in headers.items()}
    return {"method": method, "url": path.format(rng.choice(_IDS)), "headers": encoded, "content": _body(rng)}


def _body(rng: random.Random) -> bytes:
    fields = question(timeout_s=0)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(_FIELDS)
        if rng.random() < 0.15:
            fields.pop(name, None)
        else:
            fields[name] = rng.choice(_VALUES)
    if rng.random() < 0.1:
        fields = {"messages": [{"role": rng.choice(("user", 7)), "content": rng.choice(_VALUES)}], **fields}
    body = json.dumps(fields).encode()
    chance = rng.random()
    if chance < 0.1:
        return broken([body], rng)
    if chance < 0.15:
        return b"[" * rng.randint(1, 5000)
    if chance < 0.2:
        return (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            + png()
            + b"\r\n--x--"
        )
    return body


def with_picture(data: bytes) -> dict[str, Any]:
    """A good request about a broken picture."""
    return question(image=data_uri(data), timeout_s=60)


def with_video(data: bytes) -> dict[str, Any]:
    """A good request about a broken video."""
    fields = question(video=data_uri(data, "video/mp4"), timeout_s=60, sampling={"num_frames": 2})
    return {name: value for name, value in fields.items() if name != "image"}
