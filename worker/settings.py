"""What a worker can be told. Read once at start; no other module of `worker` looks at the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from prismprune import InvalidOptionError, MediaLimits, Quantization
from prismprune.heap import with_large_pages
from prismprune.media import DEFAULT_LIMITS
from worker.contract import MAX_TOKEN_BUDGET, TracingEndpoint
from worker.logs import LogFormat, LogLevel


class WorkerSettings(BaseSettings):
    """Each field is the environment variable `PRISM_<FIELD>`; seconds end in `_s`, milliseconds in `_ms`."""

    model_config = SettingsConfigDict(env_prefix="PRISM_", env_ignore_empty=True, frozen=True, extra="ignore")

    broker_url: str = "redis://127.0.0.1:6379/0"
    """`redis://`, `rediss://`, or `redis+socket:///path` for a unix socket."""
    media_url: str
    """The media store that the front end writes to: a `file://` directory, S3, GCS or Azure."""

    model: str = "prism-demo"
    """The embedded demo, a directory or a hub id; also names the queue."""
    revision: str | None = None
    """Commit, tag or branch of a model from a hub; none: its main branch. Only a commit cannot be changed by
    its owner. For the demo and directories, which have none, it is refused."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, `float16`; auto: float32 on a CPU, 16 bits on CUDA. On CPUs with AVX512-BF16 or
    AMX `bfloat16` takes half of the memory and is 1.5 times as fast."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: CUDA where there is one."""
    quantization: Literal["int8", "nf4"] | None = None
    """Of the language model's layers; needs the extra `quantization`."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What nf4's layers multiply in; none: the model's own."""
    double_quant: bool = True
    """Whether nf4's scales are quantized once more."""
    quantize_also: Annotated[tuple[str, ...], NoDecode] = ()
    """What is quantized besides the language model's layers: `vision`, `projector`, `head`."""
    packed_weights_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30
    """Memory for copies of weights as the CPU's kernels like them, which make products faster: as many layers
    as it holds; 0: none. First come copies in 16 bits, for decoding, of those of the language model whose
    weights were published so, then copies in the order of oneDNN's kernels. Of float32, and of bfloat16 on
    CPUs that have AVX512-BF16 or AMX; on other devices and in other number formats nothing is copied."""
    cuda_graph_bytes: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """On CUDA: memory for keys and values in the places that recorded work is tied to; auto: a quarter of
    what the loaded model leaves free. Decoding steps, short prompts and the tower on few views are replayed
    from recordings; a batch that needs more memory goes on as with 0, without, and so does int8."""
    layout: str | None = None
    """How LLaVA-NeXT packs crops: `native`, or `paper`, without newlines."""
    default_token_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] | Literal["all"] = 64
    """Where a request names neither a budget nor a ratio. 64: a ninth of LLaVA-1.5's 576 tokens."""

    max_batch: Annotated[int, Field(ge=1)] = 8
    """Requests answered at once; others join as these end."""
    max_batch_tokens: Annotated[int, Field(ge=1)] = 32_768
    """Text and visual tokens, with room for the longest answers, of those answered together: each question
    takes the room of the longest. One request by itself may take more, unless more than half of that would be
    padding. A token of LLaVA-1.5-7B takes 0.5 MiB at 16 bits; `prismprune plan` prints a request's."""
    max_wait_ms: Annotated[float, Field(ge=0)] = 200
    """How long an idle engine's first job waits, at most, to share a batch with others: a twentieth of what
    the last answer took, and only for jobs that this worker is decoding and for the next ones of callers
    that had an answer just before; 0: not at all."""
    media_cache_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    """Device memory for visual tokens kept for further questions about the same media; 0: none are kept."""
    prefix_cache_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    """Device memory for those tokens' keys and values, so that a further question has only its own words
    prefilled, and for those of system texts that come again; 0: none are kept. They are tens of times as
    large as the visual tokens alone."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether media of jobs that come while others are being answered are encoded beside that, in a thread of
    their own and on CUDA a stream of their own; auto: on CUDA. On a CPU it takes cores from the answers."""
    concurrency: Annotated[int, Field(ge=1)] = 16
    """Jobs held at once. Twice the batch, so that the next one is decoded while this one generates."""

    max_image_bytes: Annotated[int, Field(gt=0)] = DEFAULT_LIMITS.max_image_bytes
    """What is checked once more where media are decoded: as on the front ends, which refuse them at once."""
    max_image_pixels: Annotated[int, Field(gt=0)] = DEFAULT_LIMITS.max_pixels
    max_video_bytes: Annotated[int, Field(gt=0)] = DEFAULT_LIMITS.max_video_bytes
    max_sampled_frames: Annotated[int, Field(ge=1, le=64)] = DEFAULT_LIMITS.max_frames
    max_video_pixels: Annotated[int, Field(gt=0)] = DEFAULT_LIMITS.max_video_pixels
    """Of each frame: 4K in either of its shapes."""
    max_video_s: Annotated[float, Field(gt=0)] = DEFAULT_LIMITS.max_duration_s
    max_video_frames: Annotated[int, Field(gt=0)] = DEFAULT_LIMITS.max_video_frames
    """In the file: ten minutes at 60 a second."""
    decode_timeout_s: Annotated[float, Field(gt=0)] = DEFAULT_LIMITS.decode_timeout_s
    """Wall and processor time of the process that decodes a video."""
    decode_memory_bytes: Annotated[int, Field(gt=0)] = DEFAULT_LIMITS.decode_memory_bytes
    """Its address space."""

    max_attempts: Annotated[int, Field(ge=1)] = 3
    """A job whose worker died this often while it ran alone is given up instead of killing one more."""
    lease_s: Annotated[float, Field(gt=0)] = 15
    """A job belongs to its worker for so long after the last sign of life; then another may have it."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 3
    """Every beat reports the worker, renews its leases and looks for jobs that were lost. Three may fail
    before a worker must stop what it can no longer be sure to own."""
    visibility_timeout_s: Annotated[float, Field(gt=0)] = 60
    """Kombu's own: after so long a delivery that nobody acknowledged comes again. One too many is dropped."""

    engine_stall_s: Annotated[float, Field(gt=0)] = 120
    """An engine that passes no layer of its model for so long hangs, and its process is replaced."""
    grace_s: Annotated[float, Field(ge=0)] = 15
    """After SIGTERM running jobs have so long to end; then they go back to the queue."""
    max_restarts_per_minute: Annotated[int, Field(ge=1)] = 12
    """A process that keeps dying is not replaced more often."""

    metrics_host: str = "127.0.0.1"
    worker_metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9101
    """0 turns the worker's `/metrics` off."""
    tracing_endpoint: TracingEndpoint | None = None
    """An OpenTelemetry collector that takes OTLP over HTTP, such as `http://collector:4318`: turns traces on.
    Needs the extra `tracing`; OpenTelemetry's own `OTEL_` variables say the rest."""
    log_format: LogFormat = "text"
    """`json`: one object a line, for machines."""
    log_level: LogLevel = "info"

    @property
    def media_limits(self) -> MediaLimits:
        """The limits of decoding together."""
        return MediaLimits(
            max_image_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            max_video_bytes=self.max_video_bytes,
            max_video_pixels=self.max_video_pixels,
            max_duration_s=self.max_video_s,
            max_frames=self.max_sampled_frames,
            max_video_frames=self.max_video_frames,
            decode_timeout_s=self.decode_timeout_s,
            decode_memory_bytes=self.decode_memory_bytes,
        )

    @property
    def quantized(self) -> Quantization | None:
        """What the four settings of quantization say together."""
        return Quantization.chosen(
            self.quantization,
            compute_dtype=self.compute_dtype,
            double_quant=self.double_quant,
            also=self.quantize_also,
        )

    @field_validator("quantize_also", mode="before")
    @classmethod
    def _parts(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _quantization_makes_sense(self) -> Self:
        try:
            _ = self.quantized
        except InvalidOptionError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _revision_is_of_a_hub(self) -> Self:
        if self.revision is not None and (self.model == "prism-demo" or Path(self.model).is_dir()):
            raise ValueError(
                "PRISM_REVISION is of a model from a hub; PRISM_MODEL names the demo or a directory"
            )
        return self

    @model_validator(mode="after")
    def _leases_outlive_beats(self) -> Self:
        if not 3 * self.heartbeat_s < self.lease_s < self.visibility_timeout_s:
            raise ValueError("3 * PRISM_HEARTBEAT_S < PRISM_LEASE_S < PRISM_VISIBILITY_TIMEOUT_S is required")
        return self


def serving_environment() -> dict[str, str]:
    """What the supervisor starts the serving process with: its own settings, and large pages."""
    return with_large_pages(os.environ)
