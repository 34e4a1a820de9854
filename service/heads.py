"""Bounds for the head of a request, which is read before any key can be checked: its bytes, and its time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

    from service.settings import ServiceSettings

TOO_LARGE = b"The request's head is too large."


class BoundedHeads(HttpToolsProtocol):
    """Refuses heads over `max_head_bytes` (431), and closes connections that take too long over one.

    Bytes are counted from the last sign of progress, a complete head or a piece of a body: the trailer of a
    chunked body, which the parser keeps too, has the same bound. A head that begins behind a body, in the
    bytes of one read, may have twice as many.
    """

    max_head_bytes: int
    head_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaits_head = True
        self._moved = False
        self._unfinished = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._awaits_head:
            self._start_timer()
        start = 0
        while start < len(data) and not self.transport.is_closing() and self in self.connections:
            piece = data[start : start + self.max_head_bytes - self._unfinished]
            start += len(piece)
            self._moved = False
            super().data_received(piece)
            self._unfinished = 0 if self._moved else self._unfinished + len(piece)
            if self._unfinished >= self.max_head_bytes:
                self._refuse()

    def on_headers_complete(self) -> None:
        self._moved, self._awaits_head = True, False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = self._awaits_head = True
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._awaits_head and not self.transport.is_closing():
            self._start_timer()  # for the rest of a body that nobody reads: no drip for ever

    def shutdown(self) -> None:
        """The server stops: at once where nothing has come, behind the answer of a request that has begun."""
        if not self._unfinished:
            super().shutdown()

    @property
    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_timeout_s, self._out_of_time)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _out_of_time(self) -> None:
        self._timer = None
        if self._answers:  # the request before: its answer may take longer
            self._start_timer()
        else:
            self.transport.close()

    def _refuse(self) -> None:
        self.logger.warning("A request's head is too large.")
        if not self._answers:  # else it would be read as the answer to the request before
            fields = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n"
            self.transport.write(STATUS_LINE[431] + fields % len(TOO_LARGE) + b"\r\n" + TOO_LARGE)
        self.transport.close()


def bounded(settings: ServiceSettings) -> type[BoundedHeads]:
    """The protocol with the bounds of `settings`: uvicorn takes a class, and knows no arguments of ours."""

    class Bounded(BoundedHeads):
        max_head_bytes = settings.max_head_bytes
        head_timeout_s = settings.head_timeout_s

    return Bounded
