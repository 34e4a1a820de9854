"""What the front end can be told. Read once at start and passed on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.contract import TracingEndpoint
from worker.logs import LogFormat, LogLevel

MIB = 1024 * 1024
ANYONE = "yes-anyone-who-reaches-the-port-may-use-it"

Names = Annotated[tuple[str, ...], NoDecode]
"""Texts, separated by commas in the environment."""
_KEY_LINE = re.compile(r"[A-Za-z0-9._@-]{1,64}:[0-9a-f]{64}")
_DOMAIN = re.compile(r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(each.strip() for each in value.split(",") if each.strip())
    return value


class ListenSettings(BaseSettings):
    """Where the front end listens, and to whom: also what `make serve` must know before it starts."""

    model_config = SettingsConfigDict(
        env_prefix="PRISM_",
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,  # no clock and no `Retry-After` has either
    )

    host: str = "127.0.0.1"
    """Beyond loopback only with keys, or with `allow_anonymous`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_keys: Names = ()
    """Lines that `python -m service.keys NAME` prints: `name:` and the SHA-256 of a key. Keys of one name
    share jobs and media, so that one can replace another. None at all: all callers are one, the nameless."""
    api_keys_file: Path | None = None
    """A file of such lines, read at start; `#` begins a comment."""
    allow_anonymous: Literal["no", "yes-anyone-who-reaches-the-port-may-use-it"] = "no"
    """Whether the server may listen beyond loopback without keys."""

    @field_validator("api_keys", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return _split(value)

    @model_validator(mode="after")
    def _keys_are_hashes(self) -> Self:
        if not all(map(_KEY_LINE.fullmatch, self.key_lines)):
            raise ValueError("PRISM_API_KEYS: each is name:SHA-256, as `python -m service.keys NAME` says")
        return self

    @property
    def key_lines(self) -> tuple[str, ...]:
        """`api_keys` and those of the file.

        Raises ValueError if there is a file and it cannot be read or is empty: keys that were meant to guard
        must not be missing in silence.
        """
        if self.api_keys_file is None:
            return self.api_keys
        try:
            lines = self.api_keys_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"PRISM_API_KEYS_FILE cannot be read: {type(error).__name__}") from None
        listed = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
        if not listed:
            raise ValueError("PRISM_API_KEYS_FILE holds no key")
        return self.api_keys + listed


class ServiceSettings(ListenSettings):
    """Each field is the environment variable `PRISM_<FIELD>`; seconds end in `_s`, sizes in `_bytes`."""

    broker_url: str = "redis://127.0.0.1:6379/0"
    """`redis://`, `rediss://`, or `redis+socket:///path` for a unix socket."""
    media_url: str
    """Where uploaded media are kept for the workers: a `file://` directory, S3, GCS or Azure."""
    model: str = "prism-demo"
    """Answers requests that name no model; `/healthz` watches its workers."""
    models: Names = ()
    """The other models that are meant to be served, separated by commas: they are known, and missed, before a
    worker of theirs was ever seen. Models that are not named here are served too while they have workers."""

    broker_timeout_s: Annotated[float, Field(gt=0)] = 0.8
    """After this long a silent broker counts as away: the caller hears of it within a second."""
    require_durable_broker: bool = False
    """Refuses work while the broker could evict jobs or lose them in a restart; else that is a warning."""
    worker_grace_s: Annotated[float, Field(ge=0)] = 120
    """So long after a model's last worker was seen its jobs still queue: a restart takes this long."""

    rate_per_minute: Annotated[float, Field(ge=0)] = 600
    """POST requests that each name among the keys may send; 0 for any number. Without keys nobody is limited:
    callers cannot be told apart, and the queue's own bound protects the server."""
    rate_burst: Annotated[int, Field(ge=1)] = 60
    """So many of them at once, after a pause."""
    max_queue: Annotated[int, Field(ge=1)] = 256
    """Jobs of one model that may wait. At 2 jobs a second the last one waits for two minutes of its five."""
    max_connections: Annotated[int, Field(ge=1)] = 2048
    """Open at the same time in one process; beyond, a bare 503. Most of them wait, which costs little."""
    grace_s: Annotated[int, Field(ge=0)] = 8
    """After SIGTERM: how long requests under way may take. Who still waits one second before the end is told
    that the server stops, and streams end."""

    timeout_s: Annotated[float, Field(ge=0)] = 60
    """How long a call waits for its answer where the request does not say, within `max_timeout_s`."""
    max_timeout_s: Annotated[float, Field(ge=0)] = 600
    """Proxies in front rarely hold a connection for longer."""
    deadline_s: Annotated[float, Field(gt=0)] = 300
    """How long a job may take where the request does not say, within `max_deadline_s`."""
    max_deadline_s: Annotated[float, Field(gt=0)] = 3600
    head_timeout_s: Annotated[float, Field(gt=0)] = 10
    """Within which a connection must send a request's head; between requests it is closed sooner."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 300
    """Within which a body must be complete: 257 MiB at 7 Mbit/s, and no drip for ever."""

    max_head_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024
    """Request line and headers; beyond, a bare 431. They are read before the key is checked."""
    max_json_bytes: Annotated[int, Field(gt=0)] = 32 * MIB
    """A JSON body is held in memory whole."""
    max_multipart_bytes: Annotated[int, Field(gt=0)] = 257 * MIB
    """Also of `/v1/media`: the largest video and 1 MiB for the other fields; spooled to disk."""
    max_image_bytes: Annotated[int, Field(gt=0)] = 32 * MIB
    max_image_pixels: Annotated[int, Field(gt=0)] = 25_000_000
    """Checked in the header, before anything is decoded: 25 megapixels are 75 MB as RGB."""
    max_video_bytes: Annotated[int, Field(gt=0)] = 256 * MIB
    max_images: Annotated[int, Field(ge=1, le=8)] = 8
    max_questions: Annotated[int, Field(ge=1, le=32)] = 32
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 1024
    max_sampled_frames: Annotated[int, Field(ge=1, le=64)] = 64

    media_ttl_s: Annotated[float, Field(gt=0)] = 24 * 3600
    """Media are deleted so long after they were last uploaded or asked about; longer than any job takes."""
    media_sweep_s: Annotated[float, Field(gt=0)] = 60
    """How often one of the front ends looks for media to delete."""
    allowed_media_domains: Names = ()
    """Domains that media may be fetched from, by https on port 443: `example.org` is that host alone,
    `*.example.org` every host below it. None: media by URL are refused."""
    fetch_timeout_s: Annotated[float, Field(gt=0)] = 20
    """For all media of one request, from looking up the names to the last byte."""

    metrics_upstreams: Names = ()
    """Comma-separated URLs whose metrics `/metrics` appends, one worker each; `make serve` names its own."""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Moves `/metrics` to a port of its own, which asks for no key; 0 leaves it with the other routes.
    `/livez` is answered there too, where `max_connections` does not count."""
    tracing_endpoint: TracingEndpoint | None = None
    """An OpenTelemetry collector that takes OTLP over HTTP, such as `http://collector:4318`: turns traces on.
    Needs the extra `tracing`; OpenTelemetry's own `OTEL_` variables say the rest."""
    log_format: LogFormat = "text"
    """`json`: one object a line, for machines."""
    log_level: LogLevel = "info"
    problem_base_url: str = "https://prismprune.dev/problems/"
    """What the `type` of an error begins with."""
    build_revision: str | None = None
    """The commit that an image was built from; shown by `/version`."""

    @field_validator("models", "metrics_upstreams", "allowed_media_domains", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return _split(value)

    @field_validator("allowed_media_domains")
    @classmethod
    def _domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        lowered = tuple(each.lower() for each in value)
        if not all(map(_DOMAIN.fullmatch, lowered)):
            raise ValueError("each is a domain such as example.org or *.example.org")
        return lowered

    @model_validator(mode="after")
    def _media_outlive_jobs(self) -> Self:
        if self.media_ttl_s <= self.max_deadline_s:
            raise ValueError("PRISM_MEDIA_TTL_S > PRISM_MAX_DEADLINE_S is required: a job may read late")
        return self
