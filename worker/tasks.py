"""The way of one job through a worker: claimed, decoded, answered, finished."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from prismprune.errors import PrismError
from worker.answering import answer_result, decode, visual_request
from worker.contract import AnswerJob, AnswerResult, JobState
from worker.errors import DeadLetteredError, DeadlineExceededError, problem, without_content
from worker.jobs import Claim, Outcome, Settled

if TYPE_CHECKING:
    from worker.engine import Engine
    from worker.jobs import Jobs
    from worker.metrics import WorkerMetrics
    from worker.store import MediaStore

log = logging.getLogger(__name__)


class JobRunner:
    """Runs in a thread of Celery's pool, so that decoding overlaps with what the engine does.

    Raises nothing but `RedisError`: how a job ends stands in Redis.
    """

    def __init__(
        self,
        jobs: Jobs,
        store: MediaStore,
        engine: Engine[Any],
        metrics: WorkerMetrics,
        *,
        default_budget: int | Literal["all"],
    ) -> None:
        self._jobs = jobs
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._default_budget = default_budget

    def __call__(self, job_id: str, payload: dict[str, Any]) -> None:
        claim = self._jobs.claim(job_id)
        if claim is None:
            log.warning("job %s is unknown to the broker and was dropped", job_id)
            return
        job = _read(job_id, payload)
        if isinstance(claim, Settled):  # delivered again after its end, or canceled before its start
            self._observe(job, claim, None)
            return
        outcome = self._attempt(job, claim)
        settled = self._jobs.finish(claim, outcome)
        if settled is not None:
            self._observe(job, settled, outcome.result)

    def _attempt(self, job: AnswerJob | None, claim: Claim) -> Outcome:
        if claim.exhausted or claim.attempt > 1:
            self._metrics.redelivered.inc()
        try:
            return Outcome(JobState.SUCCEEDED, self._answer(job, claim))
        except DeadlineExceededError as error:
            return Outcome(JobState.EXPIRED, problem(error))
        except PrismError as error:
            return Outcome(JobState.FAILED, problem(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it fails this job and no other
            log.error("job %s failed: %s", claim.job_id, without_content(error))  # noqa: TRY400 - see there
            return Outcome(JobState.FAILED, problem(error))

    def _answer(self, job: AnswerJob | None, claim: Claim) -> AnswerResult:
        if claim.exhausted:
            self._metrics.dead_lettered.inc()
            raise DeadLetteredError(f"Given up: its worker died in each of {claim.attempt} attempts.")
        if job is None:
            raise PrismError("This worker cannot read the request: it is of another version.")
        now = time.time()
        if job.deadline_at <= now:
            raise DeadlineExceededError("The deadline passed while the job waited for a worker.")
        queued_s = max(0.0, now - job.created_at)  # another machine's clock
        deadline = claim.at + job.deadline_at - now
        request = visual_request(job, decode(job, self._store), self._default_budget)
        answered = self._engine.submit(request, deadline).answered()
        return answer_result(job, answered, queued_s=queued_s, claimed_at=claim.at)

    def _observe(self, job: AnswerJob | None, settled: Settled, result: AnswerResult | None) -> None:
        if not settled.first:
            return
        modality = job.modality if job else "unknown"
        latency_s = max(0.0, time.time() - job.created_at) if job else 0.0
        self._metrics.finished(modality, settled.state, latency_s, result)
        if job:
            log.info("job %s %s after %.3f s, request %s", job.id, settled.state, latency_s, job.request_id)


def _read(job_id: str, payload: dict[str, Any]) -> AnswerJob | None:
    """None where the front end speaks another version of the contract, as it may during a rolling update."""
    try:
        return AnswerJob.model_validate(payload)
    except ValidationError as error:
        fields = sorted({".".join(map(str, found["loc"])) for found in error.errors(include_input=False)})
        log.error("job %s is not readable: %s", job_id, ", ".join(fields))  # noqa: TRY400 - it quotes the question
        return None
