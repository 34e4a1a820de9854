"""JSON whose long data URIs are taken out before it is parsed.

A parser does not let go of the interpreter: for 30 MB of base64 everybody else waits 35 to 200 ms. What is
taken out is found by searches that take a few, is never copied, and is decoded in pieces by a thread.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from service.errors import BodyTooLargeError, MalformedBodyError

LONG = 1 << 16
"""Bytes of a data URI that is worth it, and more than any other text may have."""
MOST = 64
"""Data URIs that are looked at: more than any valid request has."""
MAX_REST = 8 << 20
"""Bytes beside them: several times what questions and system prompts of full length take."""
MAX_HEADER = 512
_TO_NEXT = re.compile(rb'(?:[^"]++|"(?!data:)(?:[^"\\]++|\\.)*+")*+"(?=data:)', re.IGNORECASE | re.DOTALL)
_TO_END = re.compile(rb'(?:[^"\\]++|\\.)*+"', re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class DataUri:
    r"""`data:image/png;base64` and what follows its comma, as it stands in JSON: `\/` may be `/`.

    length: bytes of the whole text. escapes: backslashes in the payload.
    """

    header: str
    payload: memoryview
    length: int
    escapes: int

    @property
    def size(self) -> int:
        """Characters of the payload."""
        return len(self.payload) - self.escapes


def taken_out(body: bytearray, stand_in_length: int) -> tuple[bytearray, dict[str, DataUri]]:
    """The JSON with a stand-in for each long data URI, and what each stands for.

    A stand-in is text that no caller can know, and has so many characters. Raises `BodyTooLargeError` if too
    much is left, `MalformedBodyError` if a long data URI does not end.
    """
    rest, found = bytearray(), dict[str, DataUri]()
    copied = position = 0
    for _ in range(MOST):
        opened = _TO_NEXT.match(body, position, position + MAX_REST)  # what has more before it is refused
        if opened is None:
            break
        start = opened.end()
        if (uri := _long_data_uri(body, start)) is not None:
            stand_in = f"data:{secrets.token_hex(16)}".ljust(stand_in_length, ".")
            found[stand_in] = uri
            rest += body[copied:start] + stand_in.encode()
            copied = start + uri.length
            position = copied + 1
        elif closed := _TO_END.match(body, start, start + MAX_REST):  # short, or of other escapes: not ours
            position = closed.end()
        else:
            break
    rest += body[copied:]
    if len(rest) > MAX_REST:
        raise BodyTooLargeError(f"A JSON body may have at most {MAX_REST} bytes beside its data URIs.")
    return rest, found


def _long_data_uri(body: bytearray, start: int) -> DataUri | None:
    """The text that begins there, if it is a long data URI in which nothing but `/` is escaped."""
    header, comma, _ = body[start : start + MAX_HEADER].partition(b",")
    if len(body) - start < LONG or not comma:
        return None
    end = body.find(b'"', start)
    if end < 0:
        raise MalformedBodyError("The body is not valid JSON: it ends within a data URI.")
    escapes = body.count(b"\\", start, end)
    if end - start < LONG or (escapes and escapes != body.count(b"\\/", start, end)):
        return None
    begins = start + len(header) + 1
    text = header.replace(b"\\", b"").decode(errors="replace")
    return DataUri(text, memoryview(body)[begins:end], end - start, escapes - header.count(b"\\"))
