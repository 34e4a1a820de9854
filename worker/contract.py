"""What may cross the queue: job in, event out, result out, and the names both sides must agree on.

Pydantic only. Media never crosses: a job carries references into the media store.
"""

from __future__ import annotations

import re
import ssl
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, distribution
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

TASK_ANSWER = "prismprune.answer"
WORKERS_KEY = "prism:workers"
"""Redis hash: worker id to `WorkerStatus` as JSON; a worker counts while `seen_at` is fresh."""
WORKER_FRESH_S = 15.0
CANCEL_CHANNEL = "prism:cancel"
"""Redis channel on which the front end publishes the id of a job that it has ended: canceled, or expired."""
DEAD_LETTERS_KEY = "prism:dead-letters"
"""Redis stream: one `DeadLetter` as JSON (field `job`) for each job that was given up."""
RESULT_TTL_S = 24 * 3600
DRAIN_STEP_S = 10
"""Seconds that one counter of ended jobs stands for."""
EVENTS_MAXLEN = 32 * 1024
"""About so many of a job's events are kept: a piece of text each, of 32 questions with 1024 tokens."""
MAX_TOKEN_BUDGET = 16384
REQUEST_ID_ATTRIBUTE, JOB_ID_ATTRIBUTE = "prismprune.request_id", "messaging.message.id"
"""Of the spans of both sides, where they are traced."""

Modality = Literal["image", "video"]
Method = Literal[
    "prism",
    "saliency",
    "uniform",
    "random",
    "fps",
    "visionzip",
    "vispruner",
    "divprune",
    "prumerge_plus",
    "promprune",
]
METHODS: tuple[str, ...] = get_args(Method)
"""Those of the library, in its order."""


def queue_name(model: str) -> str:
    """Name of the Celery queue of one model."""
    return "prism." + re.sub(r"[^A-Za-z0-9._-]+", "-", model)


def redis_url(broker_url: str) -> str:
    """The broker's URL as redis-py writes it; Celery's `redis+socket://` names a unix socket."""
    return broker_url.replace("redis+socket://", "unix://", 1)


def broker_tls(broker_url: str) -> dict[str, Any]:
    """Celery's `broker_use_ssl`: to verify, as redis-py does, unless `ssl_...` in the URL say otherwise.

    Without it kombu takes any certificate.
    """
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} if broker_url.startswith("rediss:") else {}


def _exportable(endpoint: str) -> str:
    try:
        distribution("opentelemetry-exporter-otlp-proto-http")
    except PackageNotFoundError:
        raise ValueError("traces need the extra `tracing`: pip install -e '.[tracing]'") from None
    return endpoint


TracingEndpoint = Annotated[str, Field(pattern="^https?://"), AfterValidator(_exportable)]
"""A setting of both sides: an OpenTelemetry collector, refused where its exporter is not installed."""


def job_key(job_id: str) -> str:
    """Redis hash of one job.

    Fields: `state`, `created_at`, `deadline_at`, `started_at` (of the last attempt), `finished_at`,
    `attempts`, `result`, `error`, `owner` (who may see it, "" where no keys are configured), `payload` (the
    `AnswerJob` as JSON, for as long as the job may have to be sent again), and of the worker `observed_by`
    (who counted it in the metrics), `holder`, `alone`, `suspect`, `exhausted` and `told`; see
    `worker.scripts`.
    """
    return f"prism:job:{job_id}"


def events_channel(job_id: str) -> str:
    """Redis channel on which the job's `JobEvent`s are published as JSON."""
    return f"prism:job:{job_id}:events"


def events_key(job_id: str) -> str:
    """Redis stream of what happened to the job: `event` (an `EventName`) and `data` (JSON) an entry.

    Whoever causes an event appends it: the front end `queued`, `canceled`, and `expired` where no worker did
    in time; the worker the others. The data are those of `StartedData`, `TokenData`, and `EndedData` for
    every end. It lives as long as the job.
    """
    return f"prism:job:{job_id}:events"


def open_jobs_key(model: str) -> str:
    """Redis sorted set of the jobs of one model that have not ended: id to when somebody last had it in hand.

    Written with the job, so that a worker finds again what the queue lost: Redis forgets a message that it
    hands to a connection whose other end is gone.
    """
    return f"{queue_name(model)}:open"


def drained_key(model: str, at: float) -> str:
    """Redis counter of the model's jobs that ended within the `DRAIN_STEP_S` seconds around `at` (Unix time).

    The worker increments it with each terminal write; the front end reads from it how fast the queue drains.
    """
    return f"{queue_name(model)}:drained:{int(at // DRAIN_STEP_S)}"


def media_key(media_id: str) -> str:
    """Redis hash of stored media, which lives as long as they do.

    Fields: `owner:<name>` for each of the owners that may use them, `media_type`, `bytes`, `expires_at`, and
    `width`, `height`, `frames` once they are known: of a video when a worker has decoded it.
    """
    return f"prism:media:{media_id}"


def complaints(error: ValidationError) -> list[str]:
    """What is wrong with which variable, a line each; never a value, which may be a secret."""
    return [
        "".join(f"PRISM_{str(name).upper()}: " for name in problem["loc"][:1])
        + problem["msg"].removeprefix("Value error, ")
        for problem in error.errors(include_input=False)
    ]


def media_path(media_id: str) -> str:
    """Where the media store keeps the bytes of `media_id`."""
    return f"media/{media_id}"


class Frozen(BaseModel):
    """The strings below the fields are what the OpenAPI document says of them."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,  # JSON has neither
        use_attribute_docstrings=True,
    )


class Told(Frozen):
    """What a worker tells the front end.

    One of a later version may tell more, which is left out here: workers are updated first.
    """

    model_config = ConfigDict(extra="ignore")


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


class EventName(StrEnum):
    """An event of the job's stream. The last four are ends; `started` again: the text begins anew."""

    QUEUED = "queued"
    STARTED = "started"
    TOKEN = "token"  # noqa: S105 - no password
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @classmethod
    def of_end(cls, state: JobState) -> EventName:
        """The event that tells of a terminal `state`."""
        return cls.COMPLETED if state is JobState.SUCCEEDED else cls(state)


class Problem(Told):
    """An error as it crosses the queue; the front end turns it into RFC 9457 problem details."""

    slug: str
    status: int
    title: str
    detail: str


class MediaRef(Frozen):
    """Content-addressed media in the store. `id` is the SHA-256 of its bytes in hexadecimal."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    media_type: str
    modality: Modality
    size_bytes: int


class PrismOptions(Frozen):
    """Tuning of `prism`: the salient part of the budget, and the candidate pool's size over K_div."""

    model_config = ConfigDict(strict=True)  # as the request that has it

    salient_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The salient part of the budget."""
    pool_factor: Annotated[float, Field(ge=1, le=64)] = 4
    """Candidates that the diverse part is chosen from, as a multiple of that part."""


class FrameSampling(Frozen):
    """`num_frames` evenly spaced frames of the stretch from `start_s` to `end_s` (None: the end)."""

    model_config = ConfigDict(strict=True)  # as the request that has it

    num_frames: Annotated[int, Field(ge=1, le=64)] = 8
    """Frames to look at."""
    start_s: Annotated[float, Field(ge=0)] = 0
    """Where the stretch begins, in seconds."""
    end_s: Annotated[float | None, Field(gt=0)] = None
    """Where it ends, in seconds; null is the video's end."""


class Generation(Frozen):
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    """The answer's length at most, in tokens."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0
    """0 takes the likeliest token each time; above, tokens are drawn, the more freely the higher it is."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1
    """Draws from the likeliest tokens that have this probability together."""
    seed: int | None = None
    """Makes draws repeatable."""
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends; they are not part of it."""
    system: str | None = None
    """A system prompt before the media."""


class TraceContext(Frozen):
    """W3C Trace Context: where in a trace the job was sent, so that the worker's spans go on from there."""

    traceparent: str
    tracestate: str = ""


class AnswerJob(Frozen):
    """One accepted request. Times are Unix seconds. At most one of the two budget fields is set."""

    id: str
    request_id: str
    model: str
    questions: Annotated[tuple[str, ...], Field(min_length=1, max_length=32)]
    several: bool = False
    """True when the caller sent `questions`: the result then has `answers`, also for a list of one."""
    media: Annotated[tuple[MediaRef, ...], Field(min_length=1, max_length=8)]
    token_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] | Literal["all"] | None = None
    keep_ratio: Annotated[float | None, Field(gt=0, le=1)] = None
    method: Method = "prism"
    prism: PrismOptions = PrismOptions()
    generation: Generation = Generation()
    sampling: FrameSampling = FrameSampling()
    include: tuple[Literal["token_map"], ...] = ()
    stream: bool = False
    """Whether `token` events are written: somebody may read the text as it comes."""
    created_at: float
    deadline_at: float
    trace: TraceContext | None = None
    """None where the front end is not traced."""

    @property
    def modality(self) -> Modality:
        return self.media[0].modality


class PromptTokensDetails(Frozen):
    """What the prompt's tokens are, or where they came from."""

    image_tokens: int
    """Visual tokens of pictures, newlines included."""
    video_tokens: int
    """Visual tokens of a video."""
    cached_tokens: int = 0
    """Prompt tokens whose encoding was at hand from an earlier question."""


class Usage(Frozen):
    """Tokens of one question, counted as OpenAI's clients read them."""

    prompt_tokens: int
    """Text and kept visual tokens before the answer."""
    completion_tokens: int
    """Tokens of the answer, without the one that ends it."""
    total_tokens: int
    """Both together."""
    prompt_tokens_details: PromptTokensDetails


class VisualTokens(Frozen):
    """Visual tokens of the whole request, summed over pictures, crops and frames."""

    original: int
    """What the vision tower made of the media."""
    kept: int
    """What the language model saw."""
    salient: int | None
    """Kept for their attention; null where the method does not tell, or nothing was pruned."""
    diverse: int | None
    """Kept for being unlike the others; null as `salient`."""
    budget: int | None
    """The budget that held, in tokens, a `keep_ratio` too; null for all."""
    method: str
    """The method that chose, or `none` where nothing was pruned."""
    newlines: int = 0
    """Layout tokens beside `kept`, outside the budget."""


class Timings(Frozen):
    """Milliseconds of each stage. One shared with other requests has its whole time in each."""

    queue_ms: float
    """Waiting: for a worker, and there for its turn."""
    decode_ms: float
    """From the stored file to pixels."""
    preprocess_ms: float
    """Resizing and normalizing them, and writing the prompt."""
    vision_ms: float
    """The vision tower; 0 where its result was at hand."""
    select_ms: float
    """Choosing the tokens that stay."""
    prefill_ms: float
    """The language model over the prompt, to the first token."""
    generate_ms: float
    """The other tokens of the answer."""
    total_ms: float
    """From acceptance to the result."""
    time_to_first_token_ms: float
    """From acceptance to the answer's first token."""


class Memory(Frozen):
    """What the request took of the device's memory."""

    device: str
    """What the model runs on: `cpu`, `cuda:0`."""
    peak_bytes: int
    """The most memory allocated on the device while the request was at work; on a CPU resident memory."""
    shared_with: int
    """Other requests that were at work at the same time, and in the same memory."""
    kv_cache_bytes: int
    """Keys and values of this request alone, at its end."""


class TokenMapPart(Frozen):
    """Which tokens of one picture, crop or frame were kept, as indices into `grid`, row by row."""

    media: int
    """Which of the request's media, from 0."""
    crop: int | None
    """Which crop of the picture; null for the whole."""
    frame: int | None
    """Which of the sampled frames; null for a picture."""
    time_s: float | None
    """Where the frame is in the video, in seconds."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    box: tuple[int, int, int, int]
    """What the grid covers: left, top, right and bottom in pixels of the upright original."""
    salient: tuple[int, ...] | None
    """Kept for their attention."""
    diverse: tuple[int, ...] | None
    """Kept for being unlike the others."""
    kept: tuple[int, ...] | None = None
    """Only where the method does not tell salient from diverse."""


class AnswerItem(Frozen):
    """The answer to one of several questions."""

    answer: str
    """The answer's text."""
    finish_reason: str
    """`stop` at its end or at a text of `stop`, `length` at `max_new_tokens`."""
    usage: Usage


class AnswerResult(Frozen):
    """The body of a successful `POST /v1/answer`; fields that are None and optional are not in the JSON."""

    id: str
    """The job's, for `GET /v1/jobs/{id}`."""
    model: str
    """The model that answered."""
    answer: str | None = None
    """The answer's text, where `question` was sent."""
    finish_reason: str | None = None
    """`stop` at its end or at a text of `stop`, `length` at `max_new_tokens`."""
    usage: Usage | None = None
    """Tokens of the prompt and of the answer."""
    answers: tuple[AnswerItem, ...] | None = None
    """One for each of `questions`, in their order, in place of the three fields above."""
    visual_tokens: VisualTokens
    timings: Timings
    memory: Memory
    warnings: tuple[str, ...] = ()
    """What a caller may not expect, such as a budget that prunes nothing."""
    token_map: tuple[TokenMapPart, ...] | None = None
    """With `include: ["token_map"]`: which tokens were kept, an entry for each picture, crop or frame."""


class JobEvent(Frozen):
    """Published on the job's channel at each change of state, and where a running one has more events."""

    state: JobState
    at: float


class StartedData(Frozen):
    """Data of `started`."""

    attempt: int


class TokenData(Frozen):
    """Data of `token`: more text of the answer to one of the questions, in order."""

    question: int
    text: str


class EndedData(Frozen):
    """Data of every end; what came of the job stands in its hash."""

    id: str
    state: JobState


class DeadLetter(Frozen):
    """What is kept of a job that was given up: enough to run it again by hand, and nothing a caller said."""

    id: str
    request_id: str
    model: str
    attempts: int
    media: tuple[str, ...]
    created_at: float
    given_up_at: float


class WorkerStatus(Told):
    """A worker's heartbeat. `warm` means that a request would be answered now."""

    worker_id: str
    model: str
    family: str
    revision: str | None = None
    quantization: str | None = None
    device: str
    modalities: tuple[Modality, ...]
    methods: tuple[str, ...]
    default_token_budget: int | Literal["all"]
    warm: bool
    jobs_running: int
    seen_at: float
