"""What a worker can be told by its environment."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from prismprune import Quantization
from prismprune.media import DEFAULT_LIMITS
from service.settings import ServiceSettings
from worker.app import create_app
from worker.contract import TASK_ANSWER
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("said", "meant"), [("128", 128), ("all", "all"), ("", 64)])
def test_the_default_budget_is_a_number_or_all(
    monkeypatch: pytest.MonkeyPatch, said: str, meant: int | str
) -> None:
    """An empty variable is one that is not set."""
    monkeypatch.setenv("PRISM_DEFAULT_TOKEN_BUDGET", said)
    assert WorkerSettings(media_url="memory://").default_token_budget == meant


@pytest.mark.parametrize("said", ["0", "-1", "many", "16385"])
def test_a_budget_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """At start, not at the first request."""
    monkeypatch.setenv("PRISM_DEFAULT_TOKEN_BUDGET", said)
    with pytest.raises(ValidationError):
        WorkerSettings(media_url="memory://")


def test_a_quantization_is_said_by_several_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they are what the library takes; lists are written with commas."""
    for name, value in (
        ("QUANTIZATION", "nf4"),
        ("COMPUTE_DTYPE", "float32"),
        ("DOUBLE_QUANT", "false"),
        ("QUANTIZE_ALSO", "vision, head"),
    ):
        monkeypatch.setenv(f"PRISM_{name}", value)
    quantized = WorkerSettings(media_url="memory://").quantized
    assert quantized == Quantization("nf4", "float32", double_quant=False, also=("vision", "head"))


@pytest.mark.parametrize(
    "said",
    [
        {"PRISM_QUANTIZATION": "int3"},
        {"PRISM_QUANTIZATION": "int8", "PRISM_COMPUTE_DTYPE": "float16"},
        {"PRISM_QUANTIZATION": "int8", "PRISM_QUANTIZE_ALSO": "vision,ears"},
        {"PRISM_QUANTIZE_ALSO": "vision"},
    ],
    ids=str,
)
def test_a_quantization_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    """At start, before a model is loaded."""
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        WorkerSettings(media_url="memory://")


@pytest.mark.parametrize(("said", "meant"), [("abc123", "abc123"), ("", None)])
def test_a_model_of_a_hub_can_be_pinned(
    monkeypatch: pytest.MonkeyPatch, said: str, meant: str | None
) -> None:
    """What the hub has under the model's name may change; an empty variable pins nothing."""
    monkeypatch.setenv("PRISM_MODEL", "hub/model")
    monkeypatch.setenv("PRISM_REVISION", said)
    assert WorkerSettings(media_url="memory://").revision == meant


@pytest.mark.parametrize("model", ["prism-demo", "a directory"])
def test_what_has_no_revision_cannot_be_pinned(tmp_path: Path, model: str) -> None:
    """It would be ignored, and reported as what is served."""
    name = model if model == "prism-demo" else str(tmp_path)
    with pytest.raises(ValidationError, match="PRISM_REVISION"):
        WorkerSettings(media_url="memory://", model=name, revision="abc123")


def test_a_lease_must_outlive_a_heartbeat() -> None:
    """Else a worker would lose its own jobs."""
    with pytest.raises(ValidationError, match="PRISM_LEASE_S"):
        WorkerSettings(media_url="memory://", heartbeat_s=30, lease_s=20)


def test_a_job_is_acknowledged_when_it_has_ended_and_none_is_hoarded() -> None:
    """What keeps a job from being lost with its worker, and from waiting at a busy one."""
    settings = WorkerSettings(media_url="memory://", model="hub/model", visibility_timeout_s=99)
    app = create_app(settings, lambda _id, _payload: None)
    assert TASK_ANSWER in app.tasks
    assert app.conf.task_default_queue == "prism.hub-model"
    assert app.conf.task_acks_late
    assert app.conf.worker_disable_prefetch
    assert app.conf.worker_prefetch_multiplier == 1
    assert app.conf.broker_transport_options["visibility_timeout"] == 99


def test_every_limit_of_decoding_is_a_setting(monkeypatch: pytest.MonkeyPatch, media_url: str) -> None:
    """As in the library unless the environment says otherwise, by the front end's names where it has them."""
    monkeypatch.setenv("PRISM_MAX_IMAGE_PIXELS", "1000")
    monkeypatch.setenv("PRISM_MAX_VIDEO_S", "5")
    limits = WorkerSettings(media_url=media_url).media_limits
    assert limits == replace(DEFAULT_LIMITS, max_pixels=1000, max_duration_s=5)
    shared = WorkerSettings.model_fields.keys() & ServiceSettings.model_fields.keys()
    assert {"max_image_bytes", "max_image_pixels", "max_video_bytes", "max_sampled_frames"} <= shared
    for name in (name for name in shared if name.startswith("max_")):
        assert WorkerSettings.model_fields[name].default == ServiceSettings.model_fields[name].default
