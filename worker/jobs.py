"""Job state in Redis: claimed by one worker at a time, finished exactly once, found again when lost.

Each change is one of `worker.scripts`. A broker that is away is waited for: what has been begun ends.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from worker import scripts
from worker.contract import (
    DEAD_LETTERS_KEY,
    RESULT_TTL_S,
    AnswerResult,
    DeadLetter,
    EndedData,
    EventName,
    JobEvent,
    JobState,
    Problem,
    drained_key,
    events_channel,
    events_key,
    job_key,
    media_key,
    open_jobs_key,
    queue_name,
    redis_url,
)
from worker.stops import Stop, StopReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

log = logging.getLogger(__name__)

T = TypeVar("T")
_Args = list[str | int | float]

AWAY = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OutOfMemoryError)
"""What a broker that is away raises, also while it reads its file, or one that takes nothing for now."""
INSIST_S = 0.5
SWEEP_AT_ONCE = 500
KEEP_COUNT_S = 300
"""How long a count of ended jobs may be asked for."""
QUEUE_SLACK_S = 10.0
"""Two front ends' clocks may differ, and a job is created before it is sent."""


def lease_key(job_id: str) -> str:
    """Redis key that lives as long as somebody works on the job."""
    return f"{job_key(job_id)}:lease"


def connect(broker_url: str, *, patient: bool = True) -> Redis:
    """A client that never waits for ever; a `patient` one tries a failed command again."""
    return Redis.from_url(
        redis_url(broker_url),
        decode_responses=True,
        socket_timeout=5 if patient else 2,
        socket_connect_timeout=2,
        health_check_interval=10,
        retry=Retry(ExponentialWithJitterBackoff(base=0.1, cap=1), 3) if patient else Retry(NoBackoff(), 0),
        retry_on_error=list(AWAY),
    )


def free(redis: Redis, model: str, owner: str) -> int:
    """Ends the leases of a worker that is known to be dead; how many jobs it held. The next sweep finds them.

    Raises `RedisError` while the broker is away; the leases then run out.
    """
    script = redis.register_script(scripts.FREE)
    return int(script(keys=[open_jobs_key(model)], args=[f"{owner}:", job_key("")]))


@dataclass(slots=True, eq=False)
class Claim:
    """The right to work on a job, for the `attempt`-th time; `exhausted`: the right to give it up.

    `at` is monotonic, for durations; `renewed_at` is when the lease was last known to be ours.
    """

    job_id: str
    token: str
    attempt: int
    exhausted: bool
    at: float
    renewed_at: float = 0.0
    stop: Stop = field(default_factory=Stop)


class Refusal(Enum):
    """Why a job is not to be worked on now."""

    UNKNOWN = "missing"
    """Redis has forgotten it."""
    LEASED = "leased"
    """Another worker has it; if that one dies the job is found and sent again."""
    SUSPECT = "suspect"
    """A worker died of it or beside it: it has to be claimed for running alone."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A terminal state as it stands in Redis; `first` for the one caller that counts it in the metrics."""

    state: JobState
    first: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: with a result if it succeeded, else with a problem.

    joined: how many requests shared the answer's prefill, itself included.
    """

    state: JobState
    content: AnswerResult | Problem
    dead_letter: DeadLetter | None = None
    joined: int = 1

    @property
    def result(self) -> AnswerResult | None:
        return self.content if isinstance(self.content, AnswerResult) else None

    @property
    def field(self) -> str:
        """Where the job's hash keeps the content."""
        return "error" if self.result is None else "result"


class Jobs:
    """The jobs of one model; remembers which of them this worker has in hand, and which leases it holds.

    patient, quick: clients as `connect` makes them, for what has to happen and for what can wait for its next
    turn. `lease_s`: how long a job stays this worker's without a renewal. `owner`: what `free` knows its
    leases by.
    """

    def __init__(
        self, patient: Redis, quick: Redis, model: str, *, lease_s: float, max_attempts: int, owner: str = ""
    ) -> None:
        self._quick = quick
        self._model = model
        self._lease_s = lease_s
        self._lease_ms = int(lease_s * 1000)
        self._max_attempts = max_attempts
        self._owner = owner
        self._in_hand: set[str] = set()
        self._in_hand_lock = threading.Lock()
        self._held: dict[str, Claim] = {}
        self._leaving: StopReason | None = None
        self._claim = patient.register_script(scripts.CLAIM)
        self._finish = patient.register_script(scripts.FINISH)
        self._give_back = patient.register_script(scripts.GIVE_BACK)
        self._renew = quick.register_script(scripts.RENEW)
        self._tell = quick.register_script(scripts.TELL)
        self._sweep = quick.register_script(scripts.SWEEP)
        self._describe = quick.register_script(scripts.DESCRIBE)

    @property
    def running(self) -> int:
        """How many jobs this worker works on."""
        return len(self._held)

    @contextmanager
    def in_hand(self, job_id: str) -> Iterator[bool]:
        """Keeps a second delivery of the same job away while the block runs; False for the second one."""
        with self._in_hand_lock:
            first = job_id not in self._in_hand
            self._in_hand.add(job_id)
        try:
            yield first
        finally:
            if first:
                self._in_hand.discard(job_id)

    def claim(self, job_id: str, payload: str = "", *, alone: bool = False) -> Claim | Settled | Refusal:
        """Takes the job if nobody has it; `payload` is what is sent again if this worker dies.

        A job that has lost a worker is claimed only by who runs it `alone`.
        """
        token, at = f"{self._owner}:{uuid4().hex}", time.monotonic()
        event = _event(JobState.RUNNING)
        args: _Args = [token, time.time(), job_id, self._lease_ms, self._max_attempts, int(alone), payload]
        args += [events_channel(job_id), event]
        state, attempt, first = self.insist(lambda: self._claim(keys=self._keys(job_id), args=args))
        if state in (JobState.RUNNING, "exhausted"):
            claim = Claim(job_id, token, attempt, state == "exhausted", at, renewed_at=at)
            self._held[job_id] = claim
            if self._leaving:
                claim.stop.request(self._leaving)
            return claim
        if state in {refusal.value for refusal in Refusal}:
            return Refusal(state)
        return Settled(JobState(state), first=bool(first))

    def finish(self, claim: Claim, outcome: Outcome) -> Settled | None:
        """Writes the terminal state unless there is one, gives the lease back, and tells the listeners.

        Returns the state that stands then, which a cancellation may have written first; None if Redis no
        longer knows the job.
        """
        job_id, letter = claim.job_id, outcome.dead_letter
        ended = EndedData(id=job_id, state=outcome.state).model_dump_json()
        now = time.time()
        args: _Args = [claim.token, now, job_id, outcome.state, outcome.field]
        args += [outcome.content.model_dump_json(), RESULT_TTL_S, EventName.of_end(outcome.state), ended]
        args += [letter.model_dump_json() if letter else "", events_channel(job_id), _event(outcome.state)]
        args += [KEEP_COUNT_S]
        keys = [*self._keys(job_id), DEAD_LETTERS_KEY, drained_key(self._model, now)]
        try:
            state, first = self.insist(lambda: self._finish(keys=keys, args=args))
        finally:
            self._held.pop(job_id, None)
        return None if state == "missing" else Settled(JobState(state), first=bool(first))

    def give_back(self, claim: Claim) -> bool:
        """Undoes the claim: the job is queued again, and this attempt does not count. False if it is gone."""
        args: _Args = [claim.token, time.time(), claim.job_id, events_channel(claim.job_id)]
        args += [_event(JobState.QUEUED)]
        try:
            return bool(self.insist(lambda: self._give_back(keys=self._keys(claim.job_id), args=args)))
        finally:
            self._held.pop(claim.job_id, None)

    def abandon(self, claim: Claim) -> None:
        """Ends the work on the job and keeps its lease no longer: it is found again once that has run out."""
        self._held.pop(claim.job_id, None)
        claim.stop.request(StopReason.LOST)

    def tell(self, claim: Claim, number: int, events: Sequence[tuple[EventName, str]]) -> None:
        """Appends events (name, data as JSON) to the job's stream, once for each `number`, which rises."""
        args: _Args = [claim.token, number, events_channel(claim.job_id), _event(JobState.RUNNING)]
        args += [part for event in events for part in event]
        self._tell(keys=[job_key(claim.job_id), events_key(claim.job_id)], args=args)

    def describe(self, media_id: str, width: int, height: int, frames: int) -> None:
        """Notes what only decoding tells of stored media; a broker that is away hears it another time."""
        try:
            self._describe(keys=[media_key(media_id)], args=[width, height, frames])
        except AWAY as error:
            log.warning("the size of media was not noted (%s)", type(error).__name__)

    def stop(self, job_id: str, reason: StopReason) -> None:
        """Stops the job if this worker works on it."""
        if claim := self._held.get(job_id):
            claim.stop.request(reason)

    def stop_all(self, reason: StopReason) -> None:
        """Stops every job that this worker works on, and from now on each that it claims."""
        self._leaving = reason
        for job_id in list(self._held):
            self.stop(job_id, reason)

    def renew_leases(self) -> None:
        """Gives every lease its full time again, in one exchange, and stops what is no longer ours."""
        held, at, now = list(self._held.values()), time.monotonic(), time.time()
        with self._quick.pipeline(transaction=False) as pipe:
            for claim in held:
                args: _Args = [claim.token, now, claim.job_id, self._lease_ms]
                self._renew(keys=self._keys(claim.job_id), args=args, client=pipe)
            waiting = self._in_hand - self._held.keys()
            if waiting:
                pipe.zadd(open_jobs_key(self._model), dict.fromkeys(waiting, now), xx=True)
            states = pipe.execute()
        for claim, state in zip(held, states, strict=False):
            if state == JobState.RUNNING:
                claim.renewed_at = at
            else:
                lost = state in ("lost", "missing", JobState.QUEUED)  # queued: another's, who gave it back
                claim.stop.request(StopReason.LOST if lost else StopReason.CANCELED)

    def fence(self) -> None:
        """Stops what may have become another worker's: its lease was not renewed for three quarters of it."""
        for claim in list(self._held.values()):
            if time.monotonic() - claim.renewed_at > 0.75 * self._lease_s:
                claim.stop.request(StopReason.LOST)

    def sweep(self) -> list[tuple[str, dict[str, Any]]]:
        """Id and payload of each job that nobody has in hand and no message stands for."""
        now = time.time()
        keys = [open_jobs_key(self._model), queue_name(self._model)]
        args: _Args = [now, now - self._lease_s, SWEEP_AT_ONCE, QUEUE_SLACK_S, job_key("")]
        found = self._sweep(keys=keys, args=args)
        return [(job_id, json.loads(text)) for job_id, text in zip(found[::2], found[1::2], strict=True)]

    def put_first(self) -> None:
        """Lets the queue's newest message be its next: one just sent again has waited for its turn before.

        Should another have come between the two commands, that one is lucky.
        """
        queue = queue_name(self._model)
        self._quick.lmove(queue, queue, "LEFT", "RIGHT")

    def insist(self, call: Callable[[], T]) -> T:
        """Calls until the broker answers."""
        told = False
        while True:
            try:
                return call()
            except AWAY as error:
                if not told:
                    log.warning("the broker does not answer (%s); waiting for it", type(error).__name__)
                told = True
                time.sleep(INSIST_S)

    def _keys(self, job_id: str) -> list[str]:
        return [job_key(job_id), lease_key(job_id), events_key(job_id), open_jobs_key(self._model)]


def _event(state: JobState) -> str:
    return JobEvent(state=state, at=time.time()).model_dump_json()
