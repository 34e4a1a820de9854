"""One thread that owns the model; jobs join those that are being answered, between two of their tokens.

Everything that touches the device happens in this thread, but for the encoding of those that come while
others are being answered, where that may overlap. The tasks of Celery's pool only hand tickets in and wait
for their futures.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import torch

from worker.errors import DeadlineExceededError, OutOfMemoryError, StoppedError
from worker.line import Line
from worker.stops import Stop, StopReason, result_within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from prismprune.caching import EncodingCache
    from prismprune.encoding import EncodedMedia
    from prismprune.results import Answer
    from prismprune.session import VisualRequest
    from worker.line import Limits
    from worker.stops import Errand

log = logging.getLogger(__name__)

MOST_PADDING = 2
"""A request's questions take the room of the longest each: so many times their own is too much, if it is more
than others together may take."""
LATE = "The deadline passed before the answer was complete."
_TAKING_IN: ContextVar[Sequence[Ticket]] = ContextVar("tickets", default=())
"""Whose media or prompts this thread, or a lane of its, computes."""


class _AbandonedError(Exception):
    """What is computed is for nobody any more."""


class Pending(Protocol):
    """A request on its way, as `prismprune.session.Pending`."""

    shared_with: int

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens that each question may come to take in the cache, with its answer."""

    @property
    def done(self) -> bool:
        """Whether it has its answers."""

    def cancel(self) -> None:
        """Ends it with the next step."""


class Session(Protocol):
    """What the engine asks of `prismprune.session.Session`."""

    @property
    def tokens(self) -> int:
        """Room in the cache that the pending requests may come to take."""

    def tokens_with(self, more: Sequence[Any]) -> int:
        """As `tokens`, were `more` among them."""

    def encode(self, requests: Sequence[VisualRequest]) -> Sequence[Any]:
        """Looks at the requests' media, and at nothing that `step` changes."""

    def prepare(self, asked: Any) -> Pending:
        """Writes the prompts of one request that was encoded."""

    def join(self, requests: Sequence[Any]) -> None:
        """Takes in what was prepared; if it raises, none of it."""

    def step(self) -> Sequence[tuple[Any, int, str]]:
        """A token further; (request, question, new text) for each."""

    def answers(self, request: Any) -> list[Answer]:
        """Of a request that is done."""

    def make_room(self) -> bool:
        """Drops what takes memory only to be faster; False if there was none of it."""


class Model(Protocol):
    """What the engine asks of `prismprune.PrunedVLM`."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def session(self, cache: EncodingCache | None = None) -> Session:
        """Requests that are answered together."""


class Listener(Protocol):
    """Hears, in the engine's thread, what becomes of a request before its end."""

    def text(self, question: int, text: str) -> None:
        """More text of the answer to one of its questions."""

    def again(self) -> None:
        """It is answered anew, from the first word."""


M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers of one request, the most neighbors it had, and when (monotonic) its turn came.

    joined: how many requests, itself included, shared its encoding and its prefill.
    """

    answers: list[Answer]
    shared_with: int
    began: float
    joined: int = 1


@dataclass(eq=False, slots=True)
class Ticket:
    """One request in the engine. `deadline` is monotonic; a requested `stop` ends it at the next step.

    had_room: whether all else has made room for it, once.
    """

    request: VisualRequest
    deadline: float
    stop: Stop = field(default_factory=Stop)
    listener: Listener | None = None
    had_room: bool = False
    future: Future[Answered] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.stop.then(self.future.cancel)  # not begun: never begins

    def answered(self, errand: Errand | None = None) -> Answered:
        """Waits, at most until the deadline, and runs the `errand` between times.

        Raises `DeadlineExceededError`, `StoppedError`, or what the model raised.
        """
        answered = result_within(self.future, self.stop, self.deadline, errand)
        if any(answer.finish_reason == "canceled" for answer in answered.answers):
            raise DeadlineExceededError(LATE)
        return answered

    def cancel(self) -> None:
        """Not begun: never begins. Begun: stops at the next decoding step."""
        self.stop.request(StopReason.CANCELED)

    def let_go(self) -> None:
        """Waits until the engine will not touch the request any more, or never has."""
        over = threading.Event()
        # `concurrent.futures.wait` takes a canceled future for over only once somebody has tried to begin.
        self.future.add_done_callback(lambda _: over.set())
        over.wait()

    def begin(self) -> bool:
        """False if the ticket was canceled while it waited."""
        return self.future.set_running_or_notify_cancel()

    @property
    def over(self) -> bool:
        return self.stop.reason is not None or time.monotonic() >= self.deadline


@dataclass(frozen=True, slots=True)
class _Work:
    """A ticket whose request is in the session since `began` (monotonic), one of `joined` that came then."""

    ticket: Ticket
    request: Pending
    began: float
    joined: int


@dataclass(frozen=True, slots=True)
class _Ready:
    """A ticket whose request waits for room alone since `at` (monotonic). began: as of `_Work`."""

    ticket: Ticket
    request: Pending
    began: float
    at: float

    def joining(self, joined: int) -> _Work:
        """That it waited for room is no time of its own."""
        return _Work(self.ticket, self.request, self.began + time.monotonic() - self.at, joined)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Tickets whose media are being encoded, since `began` (monotonic), while others are being answered.

    encoded: what became of them, and when (monotonic).
    """

    tickets: Sequence[Ticket]
    encoded: Future[tuple[Sequence[Any], float]]
    began: float

    def result(self) -> tuple[Sequence[Any], float]:
        """The encoded, and when their turn came had they not waited for a place between two tokens."""
        encoded, at = self.encoded.result()
        return encoded, self.began + time.monotonic() - at


class Engine(Generic[M]):
    """Answers what is submitted, as many at a time as `limits` let it.

    Where `overlap` says so of the model, those that come while others are being answered are encoded in a
    thread of their own, and on CUDA in a stream of their own; elsewhere nobody gets a token meanwhile.

    `load` returns the warm model and runs in the engine's thread. `cache` holds encodings for requests that
    name their media. `on_batch` hears how many requests are at work whenever some have joined. `on_death` is
    called in the engine's thread when it ends by an error: whoever waits for a ticket would wait for ever.
    """

    def __init__(
        self,
        load: Callable[[], M],
        *,
        limits: Limits,
        cache: EncodingCache | None = None,
        overlap: Callable[[M], bool] = lambda _: False,
        on_batch: Callable[[int], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._load = load
        self._limits = limits
        self._cache = cache
        self._overlaps = overlap
        self._overlap = self._interruptible = False
        self._beside: torch.cuda.Stream | None = None
        self._on_batch = on_batch
        self._on_death = on_death
        self._line = Line[Ticket](limits)
        self._model: Future[M] = Future()
        self._progress_at: float | None = None
        self._working: list[_Work] = []
        self._ahead: _Ahead | None = None
        self._ready: list[_Ready] = []
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        if self._model.done():  # a model that is still loading cannot be interrupted, only left behind
            self._thread.join()

    @property
    def warm(self) -> bool:
        """Whether a ticket would be answered now."""
        return self._thread.is_alive() and self._model.done()

    @property
    def stalled_s(self) -> float:
        """For how long the batch at work has made no progress; 0 while there is none."""
        since = self._progress_at
        return 0.0 if since is None else time.monotonic() - since

    def progress(self) -> None:
        """The batch at work has come a step further: a token, or a layer of the model.

        Raises where all for whom that is done are over: many or long prompts take a CPU minutes. On CUDA,
        where it is done in seconds, a layer may be in the middle of a recording.
        """
        if self._progress_at is not None:
            self._progress_at = time.monotonic()
        if self._interruptible and (tickets := _TAKING_IN.get()) and all(each.over for each in tickets):
            raise _AbandonedError

    def model(self) -> M:
        """Waits for the warm model; raises what loading it raised."""
        return self._model.result()

    def encoded(self, request: VisualRequest) -> EncodedMedia | None:
        """The encoding of a request's media, if it was kept."""
        if self._cache is None or request.encoding_key is None:
            return None
        return self._cache.get(request.encoding_key)

    def coming(self) -> AbstractContextManager[None]:
        """A request is on the way here, until the end of the block: it is worth waiting for."""
        return self._line.coming()

    def submit(
        self,
        request: VisualRequest,
        deadline: float,
        stop: Stop | None = None,
        listener: Listener | None = None,
    ) -> Ticket:
        """Queues `request`; its answers, or its error, arrive in the ticket's future."""
        ticket = Ticket(request, deadline, stop or Stop(), listener)
        self._line.join(ticket)
        return ticket

    def _main(self) -> None:
        try:
            self._model.set_result(self._load())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the model gets it
            self._model.set_exception(error)
            return
        try:
            self._session = self._new_session()
            self._overlap, self._beside = self._overlaps(model := self._model.result()), _stream(model)
            self._interruptible = model.device.type == "cpu"
            while self._working or self._ahead or self._ready or not self._line.closed:
                self._go_on()
        except BaseException as error:  # noqa: BLE001 - SystemExit too: without this thread nothing is answered
            self._on_death(error)

    def _new_session(self) -> Session:
        return self._model.result().session(self._cache)

    def _go_on(self) -> None:
        arrived = [] if self._ahead or self._ready else self._gather()
        self._progress_at = time.monotonic()
        try:
            if arrived and self._working and self._overlap:
                self._ahead = _Ahead(arrived, self._encoding(arrived), time.monotonic())
            elif arrived:
                self._join(arrived)
                self._step()  # their first tokens; the next is everyone's, so that arrivals hold up nobody
            elif self._ahead and (self._ahead.encoded.done() or not self._working):
                self._join(self._ahead.tickets, ahead=True)
                self._step()
            elif self._ready and self._join_ready():
                self._step()
            self._step()
        finally:
            self._progress_at = None

    def _encoding(self, batch: Sequence[Ticket]) -> Future[tuple[Sequence[Any], float]]:
        """What the session makes of the requests' media, as it will be, and when."""
        session, requests = self._session, [ticket.request for ticket in batch]
        encoded: Future[tuple[Sequence[Any], float]] = Future()
        threads = torch.get_num_threads()

        def encode() -> None:
            torch.set_num_threads(threads)  # else of lanes, if any are under way just now
            try:
                with torch.cuda.stream(self._beside):
                    encoded.set_result((session.encode(requests), time.monotonic()))
            except BaseException as error:  # noqa: BLE001 - the engine's thread waits for it and raises it there
                encoded.set_exception(error)

        threading.Thread(target=encode, name="encoder", daemon=True).start()
        return encoded

    def _gather(self) -> list[Ticket]:
        """Those whose turn it is; waits for the first where nothing is at work."""
        taken = self._line.take(len(self._working), self._has_room)
        return [ticket for ticket in taken if not ticket.over and ticket.begin()]

    def _has_room(self, arrived: int) -> bool:
        if len(self._working) + arrived >= self._limits.max_batch:
            return False
        return not self._working or self._session.tokens < self._limits.max_tokens

    def _join(self, batch: Sequence[Ticket], *, ahead: bool = False) -> None:
        """Takes them in, as many as there is room for; in parts where together they fail."""
        if (failed := self._taken_in(batch, ahead=ahead)) is not None:
            self._in_parts(*failed)

    def _join_ready(self) -> bool:
        """Takes in those that waited for room, as many as there is; whether it was anybody."""
        ready, self._ready = self._ready, []
        waited = len(ready)
        failed = self._admitted([each for each in ready if not _told_over(each.ticket)])
        del ready  # it holds what was encoded
        if failed is not None:
            self._in_parts(*failed)
        return len(self._ready) < waited

    def _in_parts(self, batch: Sequence[Ticket], failure: Exception) -> None:
        """Takes in those that failed together; who fails alone is told."""
        waited_for = [ticket for ticket in batch if not _told_over(ticket)]
        if len(waited_for) < len(batch):  # it may be of the others that they failed
            if waited_for:
                self._join(waited_for)
        elif len(batch) > 1:
            for part in _parts(batch, failure):
                self._join(part)
        elif _out_of_memory(failure) and self._made_room(batch[0]):
            self._join(batch)
        else:
            _fail(batch[0], failure)

    def _taken_in(self, batch: Sequence[Ticket], *, ahead: bool) -> tuple[Sequence[Ticket], Exception] | None:
        """Those that failed, and why: nothing holds what was encoded of them, as memory may be short."""
        if not ahead:
            batch = [ticket for ticket in batch if not _told_over(ticket)]
        if not batch:
            return None
        try:
            asked, began = self._encoded(batch, ahead=ahead)
        except Exception as error:  # noqa: BLE001 - it belongs to one job, which the future tells it to
            return batch, _kept(error)
        pairs = zip(batch, asked, strict=True)
        prepared = [self._prepared(*pair, began) for pair in pairs if not _told_over(pair[0])]
        return self._admitted([ready for ready in prepared if ready is not None])

    def _prepared(self, ticket: Ticket, asked: Any, began: float) -> _Ready | None:
        """None, and its caller is told, where its prompts cannot be written, or not be answered together."""
        try:
            request = self._session.prepare(asked)
        except Exception as error:  # noqa: BLE001 - as in `_taken_in`
            _fail(ticket, error)
            return None
        own, padded = sum(request.lengths), len(request.lengths) * max(request.lengths)
        if padded > max(self._limits.max_tokens, MOST_PADDING * own):
            detail = (
                f"Its questions differ so much in length that they would take the room of {padded} tokens"
            )
            _fail(ticket, OutOfMemoryError(f"{detail}; ask the long ones by themselves."))
            return None
        return _Ready(ticket, request, began, time.monotonic())

    def _admitted(self, ready: Sequence[_Ready]) -> tuple[Sequence[Ticket], Exception] | None:
        """Takes in as many as there is room for, one by itself however large; as `_taken_in`."""
        count = 0
        while count < len(ready) and self._fits([each.request for each in ready[: count + 1]]):
            count += 1
        joining, waiting = ready[:count], ready[count:]
        self._ready += waiting
        if not joining:
            return None
        work = [each.joining(count) for each in joining]  # before their prefill, which is their own time
        try:
            with _taking_in([each.ticket for each in joining]):
                self._session.join([each.request for each in joining])
        except Exception as error:  # noqa: BLE001 - as in `_taken_in`
            return [each.ticket for each in joining], _kept(error)
        self._working += work
        self._on_batch(len(self._working))
        return None

    def _fits(self, requests: Sequence[Pending]) -> bool:
        alone = not self._working and len(requests) == 1
        return alone or self._session.tokens_with(requests) <= self._limits.max_tokens

    def _encoded(self, batch: Sequence[Ticket], *, ahead: bool) -> tuple[Sequence[Any], float]:
        """Their media as the session admits them, and when (monotonic) their turn came."""
        if ahead and self._ahead:
            done, self._ahead = self._ahead, None
            return done.result()
        began = time.monotonic()
        with _taking_in(batch):
            return self._session.encode([ticket.request for ticket in batch]), began

    def _made_room(self, ticket: Ticket) -> bool:
        """Let who is at work finish, and drop what is kept only to be faster; False if there was neither.

        Once for each ticket: what it has encoded itself is kept, too.
        """
        if ticket.had_room:
            return False
        ticket.had_room = True
        self._finish_encoding()
        crowded = bool(self._working)
        self._finish()
        return self._session.make_room() or crowded

    def _finish_encoding(self) -> None:
        """Waits for the encoder: the engine's thread must not encode beside it, nor call memory short."""
        if self._ahead:
            wait([self._ahead.encoded])

    def _step(self) -> None:
        """A token for everyone at work, and the answers of those that are done."""
        for work in self._working:
            if work.ticket.over:
                work.request.cancel()
        self.progress()
        try:
            events = self._session.step() if self._working else ()
        except Exception as error:  # noqa: BLE001 - as in `_join`
            failure = _kept(error)
        else:
            self._tell(events)
            self._settle()
            return
        failed, self._working, self._session = self._working, [], self._new_session()
        self._answer_apart([work.ticket for work in failed], failure)

    def _tell(self, events: Sequence[tuple[Any, int, str]]) -> None:
        listeners = {id(work.request): work.ticket.listener for work in self._working}
        for request, question, text in events:
            if text and (listener := listeners[id(request)]):
                listener.text(question, text)

    def _settle(self) -> None:
        for work in self._working:
            if work.request.done:
                try:
                    answers = self._session.answers(work.request)
                except Exception as error:  # noqa: BLE001 - as in `_taken_in`
                    _fail(work.ticket, error)
                    continue
                answered = Answered(answers, work.request.shared_with, work.began, work.joined)
                self._line.answered(work.began)  # before its caller can know
                work.ticket.future.set_result(answered)
        self._working = [work for work in self._working if not work.request.done]

    def _answer_apart(self, batch: Sequence[Ticket], failure: Exception) -> None:
        """Only the culprit fails: the others are answered anew, in parts and beside nobody else."""
        self._finish_encoding()
        alone = len(batch) == 1
        batch = [ticket for ticket in batch if not _told_over(ticket)]
        if not batch:
            return
        if alone and not (_out_of_memory(failure) and self._made_room(batch[0])):
            _fail(batch[0], failure)
            return
        for ticket in batch:
            if ticket.listener:
                ticket.listener.again()
        for part in [batch] if alone else _parts(batch, failure):
            self._join(part)
            self._finish()

    def _finish(self) -> None:
        while self._working:
            self._step()


@contextmanager
def _taking_in(tickets: Sequence[Ticket]) -> Iterator[None]:
    token = _TAKING_IN.set(tickets)
    try:
        yield
    finally:
        _TAKING_IN.reset(token)


def _stream(model: Model) -> torch.cuda.Stream | None:
    """One for all that is encoded beside: the allocator keeps the memory of each stream apart."""
    return torch.cuda.Stream(model.device) if model.device.type == "cuda" else None


def _kept(error: Exception) -> Exception:
    """The error; where memory is short, without the frames, which hold the failed batch's tensors."""
    return error.with_traceback(None) if _out_of_memory(error) else error


def _parts(batch: Sequence[Ticket], failure: Exception) -> list[Sequence[Ticket]]:
    """One by one, or by halves where memory is short."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    memory = _out_of_memory(failure)
    log.warning("a batch of %d failed (%s): in parts", len(batch), type(failure).__name__)
    size = -(-len(batch) // 2) if memory else 1
    return [batch[first : first + size] for first in range(0, len(batch), size)]


def _told_over(ticket: Ticket) -> bool:
    """Whether nobody waits for its answer any more; then its future says so."""
    if ticket.over:
        reason = ticket.stop.reason
        ticket.future.set_exception(
            DeadlineExceededError(LATE) if reason is None else StoppedError(reason.value)
        )
        return True
    return False


def _fail(ticket: Ticket, failure: Exception) -> None:
    fault = OutOfMemoryError("The request does not fit into the device's memory; ask for less.")
    ticket.future.set_exception(fault if _out_of_memory(failure) else failure)


def _out_of_memory(error: Exception) -> bool:
    """On CUDA torch has a type for it; on the CPU a RuntimeError that names its allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )
