"""A worker process from start to end: what lives how long, and what ends it.

Leaves with 0 after a warm shutdown (SIGTERM: running jobs are finished), 1 if the model cannot be loaded,
70 if the engine died.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import warnings
from typing import TYPE_CHECKING
from uuid import uuid4

from celery.platforms import SecurityWarning
from celery.signals import setup_logging, worker_shutting_down
from PIL import Image

from prismprune import METHODS, PrismError, PrunedVLM
from worker.app import create_app
from worker.contract import WorkerStatus
from worker.engine import Engine
from worker.errors import without_content
from worker.heartbeat import Heartbeat
from worker.jobs import Jobs, connect
from worker.metrics import WorkerMetrics
from worker.settings import WorkerSettings
from worker.store import MediaStore
from worker.tasks import JobRunner

if TYPE_CHECKING:
    from typing import Any

log = logging.getLogger(__name__)

EX_ENGINE_DIED = 70
"""`EX_SOFTWARE` of sysexits.h."""


def main() -> int:
    """Serves until told to stop; returns the exit code."""
    settings = WorkerSettings()
    _configure_logging(settings.log_level)
    # Until the model is loaded nothing runs that would be worth finishing; then Celery's handler takes over.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return WorkerProcess(settings).run()


class WorkerProcess:
    """Metrics and heartbeat from the first second, the engine, and Celery once the engine is warm."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._id = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._metrics = WorkerMetrics(settings.model)
        self._draining = False
        redis = connect(settings.broker_url)
        self._jobs = Jobs(redis, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
        self._heartbeat = Heartbeat(redis, self._jobs, self._status, every_s=settings.heartbeat_s)
        self._engine = Engine(
            self._load,
            max_batch=settings.max_batch,
            max_wait_s=settings.max_wait_ms / 1e3,
            on_batch=self._metrics.batch,
            on_death=_die,
        )

    def run(self) -> int:
        """Loads, serves, and takes down in the reverse order; returns the exit code."""
        settings = self._settings
        with (
            self._metrics.serving(settings.metrics_host, settings.worker_metrics_port),
            self._heartbeat,
            self._engine,
        ):
            try:
                model = self._engine.model()
            except PrismError as error:
                log.critical("%s cannot be served: %s", settings.model, error)
                return 1
            self._describe(model)
            self._heartbeat.beat_now()
            log.info("%s is warm on %s", settings.model, model.device)
            return self._consume()

    def _consume(self) -> int:
        settings = self._settings
        runner = JobRunner(
            self._jobs,
            MediaStore(settings.media_url),
            self._engine,
            self._metrics,
            default_budget=settings.default_token_budget,
        )
        consumer = create_app(settings, runner).Worker(
            hostname=self._id, quiet=True, without_gossip=True, without_mingle=True, without_heartbeat=True
        )
        worker_shutting_down.connect(self._drain)
        consumer.start()
        return consumer.exitcode or 0

    def _drain(self, **_: Any) -> None:
        self._draining = True
        self._heartbeat.beat_now()

    def _load(self) -> PrunedVLM:
        settings = self._settings
        log.info("loading %s", settings.model)
        model = PrunedVLM.from_pretrained(
            settings.model,
            dtype=settings.dtype,
            device=settings.device,
            quantization=settings.quantization,
            progress=_Progress(),
        )
        # The first pass allocates and compiles what later ones find ready.
        picture = Image.new("RGB", (64, 64))
        model.answer(picture, "What is this?", settings.default_token_budget, max_new_tokens=2)
        return model

    def _describe(self, model: PrunedVLM) -> None:
        self._metrics.describe(family=model.family, quantization=model.quantization, revision=model.revision)
        self._metrics.watch(
            str(model.device), memory_bytes=model.memory_bytes, jobs_running=lambda: self._jobs.running
        )

    def _status(self) -> WorkerStatus:
        model = self._engine.model() if self._engine.warm else None
        return WorkerStatus(
            worker_id=self._id,
            model=self._settings.model,
            family=model.family if model else "",
            revision=model.revision if model else None,
            quantization=model.quantization if model else None,
            device=str(model.device) if model else self._settings.device,
            modalities=model.modalities if model else (),
            methods=METHODS,
            default_token_budget=self._settings.default_token_budget,
            warm=model is not None and not self._draining,
            jobs_running=self._jobs.running,
            seen_at=time.time(),
        )


class _Progress:
    """Logs each step of the loading once, when it begins."""

    def __init__(self) -> None:
        self._step = ""

    def __call__(self, step: str, _done: int, _total: int) -> None:
        if step != self._step:
            self._step = step
            log.info("%s", step)


def _die(error: BaseException) -> None:
    """Ends the process at once: its jobs wait for an engine that is gone, and come back to the queue."""
    log.critical("the engine died: %s", without_content(error))
    os._exit(EX_ENGINE_DIED)


def _configure_logging(level: str) -> None:
    """To stderr, in our format. Celery and kombu never log at DEBUG, where they print whole messages."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    own = logging.getLogger().level
    for name in ("celery", "kombu"):
        logging.getLogger(name).setLevel(max(logging.INFO, own))
    for name in ("celery.app.trace", "celery.worker.strategy"):  # a line a job is ours to write
        logging.getLogger(name).setLevel(max(logging.WARNING, own))
    # Celery warns of root because of pickled messages; it accepts JSON alone here.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    # A receiver of this signal is all that keeps Celery from configuring logging itself.
    setup_logging.connect(_keep_logging, weak=False)


def _keep_logging(**_: Any) -> None:
    """Leaves logging as it is."""
