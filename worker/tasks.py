"""The way of one job through a worker: claimed, decoded, answered, finished."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError
from redis.exceptions import RedisError

from prismprune.errors import PrismError
from prismprune.media import DEFAULT_LIMITS, Clip, MediaLimits
from worker.answering import answer_result, decode, visual_request
from worker.company import Company
from worker.contract import AnswerJob, DeadLetter, JobState, Problem
from worker.errors import DeadLetteredError, DeadlineExceededError, JobGivenBackError, StoppedError, problem
from worker.jobs import Claim, Outcome, Refusal, Settled
from worker.logs import REQUEST_ID, without_content
from worker.stops import StopReason, result_within
from worker.story import Story

if TYPE_CHECKING:
    from prismprune.vlm import VisualRequest
    from worker.contract import Modality
    from worker.engine import Answered, Engine, Ticket
    from worker.jobs import Jobs
    from worker.metrics import WorkerMetrics
    from worker.store import MediaStore
    from worker.tracing import AttemptSpans

log = logging.getLogger(__name__)

VIDEOS_AT_ONCE = 4
"""Decoded in one worker: each may take a gigabyte for a moment, here and in its decoder's process."""


class JobRunner:
    """Runs in a thread of Celery's pool, so that decoding overlaps with what the engine does.

    How a job ends stands in Redis. Raises `JobGivenBackError` for a job that another worker is to run, and
    `RedisError` where nothing could be written: then, too, the delivery goes back to the queue.
    """

    def __init__(
        self,
        jobs: Jobs,
        store: MediaStore,
        engine: Engine[Any],
        metrics: WorkerMetrics,
        *,
        default_budget: int | Literal["all"],
        decoders: int,
        limits: MediaLimits = DEFAULT_LIMITS,
        spans: AttemptSpans | None = None,
    ) -> None:
        self._jobs = jobs
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._default_budget = default_budget
        # A decode cannot be interrupted, only left behind; so many of them at once cannot harm.
        self._decoders: dict[Modality, ThreadPoolExecutor] = {
            "image": ThreadPoolExecutor(decoders, thread_name_prefix="decoder"),
            "video": ThreadPoolExecutor(min(decoders, VIDEOS_AT_ONCE), thread_name_prefix="video-decoder"),
        }
        self._limits = limits
        self._company = Company()
        self._spans = spans

    def __call__(self, job_id: str, payload: dict[str, Any]) -> None:
        copy_context().run(self._delivered, job_id, payload)  # lines of the thread's next job have its own id

    def _delivered(self, job_id: str, payload: dict[str, Any]) -> None:
        with self._jobs.in_hand(job_id) as first:
            if not first:  # it is found again should this process die
                log.info("job %s was delivered twice", job_id)
                return
            job, text = _read(job_id, payload), json.dumps(payload)
            REQUEST_ID.set(job.request_id if job else "-")
            with self._company.shared():
                claim = self._jobs.claim(job_id, text)
                if claim is not Refusal.SUSPECT:
                    self._work(job_id, job, claim)
                    return
            self._metrics.redelivered.inc()
            # What nobody can read is only ended, which needs no solitude.
            with self._company.alone(_monotonic(job.deadline_at) if job else time.monotonic()):
                self._work(job_id, job, self._jobs.claim(job_id, text, alone=True))

    def _work(self, job_id: str, job: AnswerJob | None, claim: Claim | Settled | Refusal) -> None:
        if isinstance(claim, Refusal):
            log.warning("job %s was dropped: %s", job_id, claim.value)
        elif isinstance(claim, Settled):  # delivered again after its end, or canceled before its start
            self._observe(job, claim, None)
        elif (outcome := self._attempt(job, claim)) is not None:
            settled = self._jobs.finish(claim, outcome)
            if self._spans and job:
                self._spans.attempt(job, claim, outcome)
            if settled is not None:
                self._observe(job, settled, outcome)

    def _attempt(self, job: AnswerJob | None, claim: Claim) -> Outcome | None:
        """How the job ended; None if it did not, as another worker has it."""
        try:
            return self._answer(job, claim)
        except StoppedError:
            return self._stopped(claim)
        except DeadlineExceededError as error:
            return Outcome(JobState.EXPIRED, problem(error))
        except DeadLetteredError as error:
            return Outcome(JobState.FAILED, problem(error), _dead_letter(job, claim))
        except PrismError as error:
            return Outcome(JobState.FAILED, problem(error))
        except RedisError:
            self._jobs.abandon(claim)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it fails this job and no other
            log.error("job %s failed: %s", claim.job_id, without_content(error))  # noqa: TRY400 - see there
            return Outcome(JobState.FAILED, problem(error))

    def _stopped(self, claim: Claim) -> Outcome | None:
        if claim.stop.reason is StopReason.CANCELED:
            return Outcome(JobState.CANCELED, problem(StoppedError("The job was canceled.")))
        if self._jobs.give_back(claim):
            raise JobGivenBackError(claim.job_id)
        return None

    def _answer(self, job: AnswerJob | None, claim: Claim) -> Outcome:
        if claim.exhausted:
            self._metrics.dead_lettered.inc()
            raise DeadLetteredError(f"Given up: its worker died in each of {claim.attempt} attempts.")
        if job is None:
            raise PrismError("This worker cannot read the request: it is of another version.")
        claimed_s = time.time() - (time.monotonic() - claim.at)
        if job.deadline_at <= claimed_s:
            raise DeadlineExceededError("The deadline passed while the job waited for a worker.")
        queued_s = max(0.0, claimed_s - job.created_at)  # another machine's clock
        deadline = claim.at + job.deadline_at - claimed_s
        story = Story(partial(self._jobs.tell, claim), claim.attempt) if job.stream else None
        with self._engine.coming():
            request = self._with_media(visual_request(job, self._default_budget), job, claim, deadline)
            ticket = self._engine.submit(request, deadline, claim.stop, story)
        answered = self._answered(ticket, claim, story)
        result = answer_result(job, answered, queued_s=queued_s, claimed_at=claim.at)
        return Outcome(JobState.SUCCEEDED, result, joined=answered.joined)

    def _with_media(
        self, request: VisualRequest, job: AnswerJob, claim: Claim, deadline: float
    ) -> VisualRequest:
        """Media that were encoded before are not even decoded."""
        if (encoded := self._engine.encoded(request)) is not None:
            return replace(request, encoded=encoded)
        decoding = self._decoders[job.modality].submit(
            copy_context().run, decode, job, self._store, self._limits
        )
        try:
            media = result_within(decoding, claim.stop, deadline)
        finally:
            decoding.cancel()  # one that waits for its turn: nobody wants it any longer
        for ref, clip in zip(job.media, media, strict=True):
            if isinstance(clip, Clip) and clip.total_frames is not None:
                self._jobs.describe(ref.id, *clip.size, clip.total_frames)
        return replace(request, media=media)

    def _answered(self, ticket: Ticket, claim: Claim, story: Story | None) -> Answered:
        try:
            return ticket.answered(story)
        except StoppedError:
            if claim.stop.reason is not StopReason.CANCELED:
                ticket.let_go()  # before that nobody else may begin
            raise
        finally:
            if story and claim.stop.reason is None:
                self._jobs.insist(story.write_all)

    def _observe(self, job: AnswerJob | None, settled: Settled, outcome: Outcome | None) -> None:
        if not settled.first:
            return
        modality = job.modality if job else "unknown"
        latency_s = max(0.0, time.time() - job.created_at) if job else 0.0
        result, joined = (outcome.result, outcome.joined) if outcome else (None, 1)
        reason = _reason(settled, outcome)
        self._metrics.finished(modality, settled.state, latency_s, result, joined, reason=reason)
        if job:
            how = f"{settled.state} ({reason})" if reason else settled.state
            log.info("job %s %s after %.3f s", job.id, how, latency_s)


def _read(job_id: str, payload: dict[str, Any]) -> AnswerJob | None:
    """None where the front end speaks another version of the contract, as it may during a rolling update."""
    try:
        return AnswerJob.model_validate(payload)
    except ValidationError as error:
        fields = sorted({".".join(map(str, found["loc"])) for found in error.errors(include_input=False)})
        log.error("job %s is not readable: %s", job_id, ", ".join(fields))  # noqa: TRY400 - it quotes the question
        return None


def _reason(settled: Settled, outcome: Outcome | None) -> str | None:
    """The slug of what failed the job; None for one that did not fail.

    The state that stands counts: a front end may have let the job expire before its worker was done.
    """
    if settled.state not in (JobState.FAILED, JobState.EXPIRED):
        return None
    if outcome and outcome.state is settled.state and isinstance(outcome.content, Problem):
        return outcome.content.slug
    return DeadlineExceededError.slug if settled.state is JobState.EXPIRED else PrismError.slug


def _dead_letter(job: AnswerJob | None, claim: Claim) -> DeadLetter | None:
    if job is None:
        return None
    return DeadLetter(
        id=job.id,
        request_id=job.request_id,
        model=job.model,
        attempts=claim.attempt,
        media=tuple(ref.id for ref in job.media),
        created_at=job.created_at,
        given_up_at=time.time(),
    )


def _monotonic(unix_s: float) -> float:
    return time.monotonic() + unix_s - time.time()
