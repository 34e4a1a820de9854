"""Jobs as the front end sees them: handed to the queue, waited for without blocking the loop, read."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter, to_thread
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from service.errors import BrokerAwayError, JobEndedError, ServerStoppingError, UnknownJobError
from service.ids import is_id
from worker.contract import (
    CANCEL_CHANNEL,
    RESULT_TTL_S,
    TASK_ANSWER,
    EndedData,
    EventName,
    JobEvent,
    JobState,
    Problem,
    broker_tls,
    events_channel,
    events_key,
    job_key,
    open_jobs_key,
    queue_name,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from redis.asyncio import Redis

    from service.settings import ServiceSettings
    from service.signals import JobSignals
    from worker.contract import AnswerJob

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 5.0
"""Who waits looks this often even if nothing wakes it: a half-open connection delivers no message."""
PUBLISHERS = 8
START = "0-0"
"""Before a stream's first entry."""
EVENTS_AT_ONCE = 256
AWAY_AGAIN_S = 0.5
"""A follower asks a broker that was away this often."""
LATE_S = 5.0
"""After its deadline a job is ended here: by then its worker would have done so, were there one."""
TELL_AGAIN_S = 1.0
"""What the broker refuses is logged this often, each kind of refusal for itself."""

_EVENT_NAMES = {name.value for name in EventName}
_ENDED_WITHOUT_ERROR = {
    JobState.FAILED: Problem(
        slug="internal-error", status=500, title="Internal error", detail="The job failed without saying why."
    ),
    JobState.CANCELED: Problem(
        slug="job-canceled", status=409, title="Job canceled", detail="The job was canceled."
    ),
    JobState.EXPIRED: Problem(
        slug="deadline-exceeded",
        status=504,
        title="Deadline exceeded",
        detail="The job's own deadline passed.",
    ),
}
_FORGOTTEN = Problem(
    slug="internal-error", status=500, title="Internal error", detail="The broker has lost the job."
)
STOPPING = Problem(
    slug=ServerStoppingError.slug,
    status=ServerStoppingError.status,
    title=ServerStoppingError.title,
    detail="The server stops before the answer is there; ask again, with the same Idempotency-Key if any.",
)
_told: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The job's hash, parsed. Times are Unix seconds."""

    id: str
    owner: str
    model: str
    request_id: str
    state: JobState
    created_at: float
    started_at: float | None
    finished_at: float | None
    deadline_at: float | None
    attempts: int
    result: dict[str, Any] | None
    error: Problem | None

    @classmethod
    def parse(cls, job_id: str, fields: Mapping[str, str]) -> JobRecord:
        state = JobState(fields["state"])
        return cls(
            id=job_id,
            owner=fields.get("owner", ""),
            model=fields.get("model", ""),
            request_id=fields.get("request_id", ""),
            state=state,
            created_at=float(fields["created_at"]),
            started_at=_time(fields, "started_at"),
            finished_at=_time(fields, "finished_at"),
            deadline_at=_time(fields, "deadline_at"),
            attempts=int(fields.get("attempts", 0)),
            result=_without_absent(json.loads(fields["result"])) if "result" in fields else None,
            error=Problem.model_validate_json(fields["error"])
            if "error" in fields
            else _ENDED_WITHOUT_ERROR.get(state),
        )

    @property
    def late_in_s(self) -> float:
        """Until it is too late for any worker to end the job; infinite for one that has ended."""
        if self.state.terminal or self.deadline_at is None:
            return math.inf
        return self.deadline_at + LATE_S - time.time()

    def outcome(self) -> dict[str, Any]:
        """The result of a succeeded job; raises `JobEndedError` for every other end."""
        if self.result is not None:
            return self.result
        raise JobEndedError(self.error or _ENDED_WITHOUT_ERROR[JobState.FAILED])


def _time(fields: Mapping[str, str], name: str) -> float | None:
    return float(fields[name]) if name in fields else None


def _without_absent(result: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what this answer does not have: `answers` beside `answer`, a map nobody asked for."""
    for part in result.get("token_map") or ():
        if part.get("kept") is None:
            part.pop("kept", None)
    return {name: value for name, value in result.items() if value is not None}


class StoppedWaitingError(JobEndedError):
    """The server stops; the job goes on."""

    def __init__(self, record: JobRecord) -> None:
        super().__init__(STOPPING)
        self.record = record


@asynccontextmanager
async def broker_within(seconds: float) -> AsyncIterator[None]:
    """Turns a broker that refuses, breaks off or stays silent for `seconds` into `BrokerAwayError`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except (RedisError, OperationalError, OSError) as error:  # TimeoutError is an OSError
        reason = error.__cause__ if isinstance(error, OperationalError) else error
        if not isinstance(reason, ResponseError | AuthenticationError):
            raise BrokerAwayError("The broker does not answer; try again.") from error
        _tell_refusal(reason)
        raise BrokerAwayError("The broker does not take the request; try again.") from reason


def _tell_refusal(error: RedisError) -> None:
    """Its kind alone, by which an operator knows what to do: the rest may quote what was written."""
    kind, now = type(error).__name__, time.monotonic()
    if kind == ResponseError.__name__:
        kind = next(iter(str(error).split()), kind)
    if now - _told.get(kind, -math.inf) >= TELL_AGAIN_S:
        _told[kind] = now
        logger.warning("the broker refuses: %s", kind)


def producer(broker_url: str, timeout_s: float) -> Celery:
    """A Celery application that can only send: one retry, for a pooled connection that a restart has cut."""
    app = Celery("prismprune-service", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        broker_connection_timeout=timeout_s,
        broker_use_ssl=broker_tls(broker_url),
        broker_pool_limit=PUBLISHERS,
        broker_transport_options={
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0,
        },
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0},
    )
    return app


# KEYS: job, open jobs of its model, its stream. ARGV: now, seconds to keep it, its channel, `JobEvent`, its
# id, `EndedData`, channel of cancellations, event, state. Returns the state that stands then, nothing if
# unknown.
_END = """
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'queued' and state ~= 'running' then return state end
redis.call('HSET', KEYS[1], 'state', ARGV[9], 'finished_at', ARGV[1])
redis.call('HDEL', KEYS[1], 'payload')
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('ZREM', KEYS[2], ARGV[5])
redis.call('XADD', KEYS[3], '*', 'event', ARGV[8], 'data', ARGV[6])
redis.call('EXPIRE', KEYS[3], ARGV[2])
redis.call('PUBLISH', ARGV[3], ARGV[4])
redis.call('PUBLISH', ARGV[7], ARGV[5])
return ARGV[9]
"""


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of the job's stream: its id, by which a reader goes on, and what happened."""

    id: str
    name: EventName
    data: dict[str, Any]

    @property
    def ends(self) -> bool:
        """Whether nothing follows."""
        return self.name not in (EventName.QUEUED, EventName.STARTED, EventName.TOKEN)


class Jobs:
    """The jobs of one broker."""

    def __init__(self, redis: Redis, signals: JobSignals, settings: ServiceSettings) -> None:
        self._redis = redis
        self._signals = signals
        self._timeout_s = settings.broker_timeout_s
        self._producer = producer(settings.broker_url, settings.broker_timeout_s)
        self._publishers = CapacityLimiter(PUBLISHERS)
        self._end_script = redis.register_script(_END)
        self._canceling: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.Event] = set()
        self._stopping = False

    def stop_waiting(self) -> None:
        """From now on nobody waits: `wait` and `follow` look once more, and end."""
        self._stopping = True
        for changed in self._waiting:
            changed.set()

    @asynccontextmanager
    async def _changes(self, record: JobRecord, *, end_only: bool = False) -> AsyncIterator[asyncio.Event]:
        """As `JobSignals.of`; set by `stop_waiting`, too."""
        async with self._signals.of(record.id, end_only=end_only) as changed:
            self._waiting.add(changed)
            if self._stopping:
                changed.set()
            try:
                yield changed
            finally:
                self._waiting.discard(changed)

    async def submit(self, job: AnswerJob, owner: str) -> JobRecord:
        """Creates the job's state, then enqueues it.

        Raises `BrokerAwayError`: then it may have been accepted, or not.
        """
        fields: dict[Any, Any] = {
            "state": JobState.QUEUED.value,
            "created_at": repr(job.created_at),
            "deadline_at": repr(job.deadline_at),
            "request_id": job.request_id,
            "owner": owner,
            "model": job.model,
            "payload": job.model_dump_json(),  # sent again by a worker where the queue lost it
        }
        ttl_s = RESULT_TTL_S + int(job.deadline_at - job.created_at)
        async with broker_within(self._timeout_s):
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(job_key(job.id), mapping=fields)
                pipe.expire(job_key(job.id), ttl_s)
                pipe.zadd(open_jobs_key(job.model), {job.id: job.created_at})
                pipe.xadd(events_key(job.id), {"event": EventName.QUEUED, "data": "{}"})
                pipe.expire(events_key(job.id), ttl_s)
                await pipe.execute()
            await to_thread.run_sync(self._enqueue, job, abandon_on_cancel=True, limiter=self._publishers)
        return JobRecord.parse(job.id, fields)

    def _enqueue(self, job: AnswerJob) -> None:
        self._producer.send_task(
            TASK_ANSWER,
            args=[job.model_dump(mode="json")],
            task_id=job.id,
            queue=queue_name(job.model),
            argsrepr="(...)",  # Celery would put the question into headers, which workers log
        )

    async def read(self, job_id: str) -> JobRecord | None:
        """The job as it stands, None if there is none. Raises `BrokerAwayError`.

        One whose deadline has passed without anybody's word is ended: there may be no worker to do it.
        """
        record = await self._read(job_id)
        if record is None or record.late_in_s > 0:
            return record
        with suppress(BrokerAwayError):  # one that is full or a replica still tells how the job stands
            await self._end(record, JobState.EXPIRED)
        return await self._read(job_id)

    async def _read(self, job_id: str) -> JobRecord | None:
        async with broker_within(self._timeout_s):
            fields: dict[str, str] = await self._redis.hgetall(job_key(job_id))  # type: ignore[assignment]  # decoded
        return JobRecord.parse(job_id, fields) if fields else None

    async def known(self, job_id: str, owner: str) -> JobRecord:
        """The owner's own job. Raises `UnknownJobError`, for another's too, and `BrokerAwayError`."""
        record = await self.read(job_id) if is_id("job", job_id) else None
        if record is None or record.owner != owner:
            raise UnknownJobError("There is no job of this id, or its 24 hours are over.")
        return record

    async def wait(self, record: JobRecord, timeout_s: float) -> JobRecord:
        """The job once it has ended, or as it stands then. Raises `StoppedWaitingError` only."""
        if record.state.terminal or timeout_s == 0:
            return record
        wait_until = time.monotonic() + timeout_s
        # Its first signal says: subscribed, look once.
        async with self._changes(record, end_only=True) as changed:
            while not record.state.terminal and (left := wait_until - time.monotonic()) > 0:
                await _wait(changed, min(left, LOOK_AGAIN_S, max(record.late_in_s, AWAY_AGAIN_S)))
                changed.clear()
                record = await self.look(record)
                if self._stopping and not record.state.terminal:
                    raise StoppedWaitingError(record)
        return record

    async def cancel(self, record: JobRecord) -> JobRecord:
        """Ends the job unless it has ended, and tells its worker; the job as it stands then.

        Raises `BrokerAwayError`.
        """
        await self._end(record, JobState.CANCELED)
        return await self.read(record.id) or record

    async def _end(self, record: JobRecord, state: JobState) -> None:
        """Ends the job in that state unless it has ended, and tells who waits and who works on it."""
        now = time.time()
        event = JobEvent(state=state, at=now).model_dump_json()
        ended = EndedData(id=record.id, state=state).model_dump_json()
        keys = [job_key(record.id), open_jobs_key(record.model), events_key(record.id)]
        args: list[str | int | float] = [
            now,
            RESULT_TTL_S,
            events_channel(record.id),
            event,
            record.id,
            ended,
        ]
        async with broker_within(self._timeout_s):
            await self._end_script(
                keys=keys, args=[*args, CANCEL_CHANNEL, EventName.of_end(state), state.value]
            )

    def cancel_soon(self, record: JobRecord) -> None:
        """As `cancel`, for a caller that hung up: nobody waits for it, and nothing stops it."""
        task = asyncio.get_running_loop().create_task(self._cancel_quietly(record))
        self._canceling.add(task)
        task.add_done_callback(self._canceling.discard)

    async def _cancel_quietly(self, record: JobRecord) -> None:
        try:
            await self.cancel(record)
        except BrokerAwayError:
            logger.warning("job %s goes on: the broker is away, and its caller too", record.id)

    async def follow(self, record: JobRecord, after: str = START) -> AsyncGenerator[Event | None, None]:
        """The job's events after the entry `after`, to the last; None now and then while nothing happens.

        A broker that is away is waited for. An end that the stream no longer holds is told all the same, and
        so is that the broker has lost the job. Where the server stops it seems to end: see `ended`.
        """
        async with self._changes(record) as changed:
            await _wait(changed, LOOK_AGAIN_S)  # its first signal says: subscribed, look once
            silent = True
            while True:
                changed.clear()
                events = await self._events_after(record.id, after)
                for event in events or ():
                    yield event
                    if event.ends:
                        return
                    after = event.id
                if events and len(events) == EVENTS_AT_ONCE:
                    continue  # there may be more already
                if self._stopping:
                    yield Event(after, EventName.FAILED, {})
                    return
                if silent and not events:
                    record = await self._looked(record)
                    # Once more: the end may have come between. A broker that is away tells nothing.
                    if record.state.terminal and await self._events_after(record.id, after) == []:
                        yield Event(after, EventName.of_end(record.state), {})
                        return
                    yield None
                silent = not await _wait(changed, AWAY_AGAIN_S if events is None else LOOK_AGAIN_S)

    async def _events_after(self, job_id: str, after: str) -> list[Event] | None:
        """The entries after `after`, None if the broker is away; none if it refuses to tell them."""
        try:
            async with broker_within(self._timeout_s):
                entries: Any = await self._redis.xrange(
                    events_key(job_id), min=f"({after}", count=EVENTS_AT_ONCE
                )
        except BrokerAwayError as away:
            return [] if isinstance(away.__cause__, ResponseError) else None
        return [
            Event(id_, EventName(entry["event"]), json.loads(entry["data"]))
            for id_, entry in entries
            if entry["event"] in _EVENT_NAMES  # a later version's worker may tell of more
        ]

    async def look(self, last: JobRecord) -> JobRecord:
        """The job as it stands, or as it last stood: it was accepted, and outlasts a broker that is away."""
        looked = await self._looked(last)
        return last if looked.error is _FORGOTTEN else looked

    async def _looked(self, last: JobRecord) -> JobRecord:
        """The same; failed, if the broker answers and does not know it."""
        try:
            found = await self.read(last.id)
        except BrokerAwayError:
            logger.warning("broker away while job %s is waited for", last.id)
            return last
        return found or replace(last, state=JobState.FAILED, error=_FORGOTTEN)

    async def ended(self, record: JobRecord) -> JobRecord:
        """What came of a job that has told its end. A broker that is away is waited for.

        Where the server stops before: failed, with `STOPPING`, which is true of the caller's wait alone.
        """
        record = await self._looked(record)
        while not record.state.terminal:
            if self._stopping:
                return replace(record, state=JobState.FAILED, error=STOPPING)
            await asyncio.sleep(AWAY_AGAIN_S)
            record = await self._looked(record)
        return record


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    """Until `event` is set, at most for `seconds`; whether it was."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
