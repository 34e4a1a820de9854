"""What a worker can be told. Read once at start; no other module of `worker` looks at the environment."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.contract import MAX_TOKEN_BUDGET


class WorkerSettings(BaseSettings):
    """Each field is the environment variable `PRISM_<FIELD>`; seconds end in `_s`, milliseconds in `_ms`."""

    model_config = SettingsConfigDict(env_prefix="PRISM_", env_ignore_empty=True, frozen=True, extra="ignore")

    broker_url: str = "redis://127.0.0.1:6379/0"
    """`redis://`, `rediss://`, or `redis+socket:///path` for a unix socket."""
    media_url: str
    """The media store that the front end writes to: a `file://` directory, S3, GCS or Azure."""

    model: str = "prism-demo"
    """The embedded demo, a directory or a hub id; also names the queue."""
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    default_token_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] | Literal["all"] = 64
    """Where a request names neither a budget nor a ratio. 64: a ninth of LLaVA-1.5's 576 tokens."""

    max_batch: Annotated[int, Field(ge=1)] = 8
    max_wait_ms: Annotated[float, Field(ge=0)] = 10
    """How long the first job of a batch waits for neighbours: little beside the tower's time."""
    concurrency: Annotated[int, Field(ge=1)] = 16
    """Jobs held at once. Twice the batch, so that the next one is decoded while this one generates."""

    max_attempts: Annotated[int, Field(ge=1)] = 3
    """A job whose worker died this often is failed as dead-lettered instead of killing one more."""
    lease_s: Annotated[float, Field(gt=0)] = 20
    heartbeat_s: Annotated[float, Field(gt=0)] = 5
    """Every beat reports the worker and renews its leases: three may be lost before a lease runs out."""
    visibility_timeout_s: Annotated[float, Field(gt=0)] = 60
    """After this long a delivery that nobody acknowledged is delivered again. A job that still runs then is
    protected by its lease: the second delivery waits for the first."""

    metrics_host: str = "127.0.0.1"
    worker_metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9101
    """0 turns the worker's `/metrics` off."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _leases_outlive_beats(self) -> Self:
        if not self.heartbeat_s < self.lease_s < self.visibility_timeout_s:
            raise ValueError("PRISM_HEARTBEAT_S < PRISM_LEASE_S < PRISM_VISIBILITY_TIMEOUT_S is required")
        return self
