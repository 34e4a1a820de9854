"""What the front end can be told. Read once at start and passed on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1024 * 1024


class ServiceSettings(BaseSettings):
    """Each field is the environment variable `PRISM_<FIELD>`; seconds end in `_s`, sizes in `_bytes`."""

    model_config = SettingsConfigDict(env_prefix="PRISM_", env_ignore_empty=True, frozen=True, extra="ignore")

    broker_url: str = "redis://127.0.0.1:6379/0"
    """`redis://`, `rediss://`, or `redis+socket:///path` for a unix socket."""
    media_url: str
    """Where uploaded media are kept for the workers: a `file://` directory, S3, GCS or Azure."""
    model: str = "prism-demo"
    """Answers requests that name no model; `/healthz` watches its workers."""

    broker_timeout_s: Annotated[float, Field(gt=0)] = 0.8
    """After this long a silent broker counts as away: the caller hears of it within a second."""
    worker_grace_s: Annotated[float, Field(ge=0)] = 120
    """So long after a model's last worker was seen its jobs still queue: a restart takes this long."""

    timeout_s: Annotated[float, Field(ge=0)] = 60
    """How long a call waits for its answer where the request does not say."""
    max_timeout_s: Annotated[float, Field(ge=0)] = 600
    """Proxies in front rarely hold a connection for longer."""
    deadline_s: Annotated[float, Field(gt=0)] = 300
    """How long a job may take where the request does not say."""
    max_deadline_s: Annotated[float, Field(gt=0)] = 3600

    max_json_bytes: Annotated[int, Field(gt=0)] = 32 * MIB
    """A JSON body is held in memory whole."""
    max_multipart_bytes: Annotated[int, Field(gt=0)] = 257 * MIB
    """The largest video and 1 MiB for the other fields; spooled to disk."""
    max_image_bytes: Annotated[int, Field(gt=0)] = 32 * MIB
    max_image_pixels: Annotated[int, Field(gt=0)] = 25_000_000
    """Checked in the header, before anything is decoded: 25 megapixels are 75 MB as RGB."""
    max_video_bytes: Annotated[int, Field(gt=0)] = 256 * MIB
    max_images: Annotated[int, Field(ge=1, le=8)] = 8
    max_questions: Annotated[int, Field(ge=1, le=32)] = 32
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 1024
    max_sampled_frames: Annotated[int, Field(ge=1, le=64)] = 64

    metrics_upstreams: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma-separated URLs whose metrics `/metrics` appends, one worker each; `make serve` names its own."""
    problem_base_url: str = "https://prismprune.dev/problems/"
    """What the `type` of an error begins with."""
    build_revision: str | None = None
    """The commit that an image was built from; shown by `/version`."""

    @field_validator("metrics_upstreams", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(url.strip() for url in value.split(",") if url.strip())
        return value
