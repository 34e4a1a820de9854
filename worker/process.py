"""A worker process from start to end: what lives how long, and what ends it.

Runs under `worker.supervisor`. Leaves with 0 after SIGTERM (running jobs are finished, or given back when the
grace is over), 78 if the model cannot be loaded, 70 if the engine or the heartbeat died or the supervisor is
gone.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from celery.platforms import SecurityWarning
from celery.signals import setup_logging, worker_shutting_down
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from prismprune import METHODS, PrismError, PrunedVLM
from prismprune.caching import EncodingCache
from prismprune.cpu_layers import watch_layers
from prismprune.errors import with_cause
from prismprune.heap import keep_freed_memory
from worker.app import create_app, send_again
from worker.cancellations import Cancellations
from worker.contract import WorkerStatus, queue_name
from worker.engine import Engine
from worker.heartbeat import Heartbeat
from worker.jobs import Jobs, connect
from worker.limits import memory_limit_bytes
from worker.line import Limits
from worker.logs import log_to_stderr, without_content
from worker.metrics import WorkerMetrics
from worker.probes import Probes
from worker.pulse import Pulse
from worker.settings import WorkerSettings
from worker.stops import StopReason
from worker.store import MediaStore
from worker.supervisor import EX_GIVE_UP, MARGIN_S
from worker.tasks import JobRunner

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from worker.tracing import AttemptSpans

log = logging.getLogger(__name__)

SWITCH_S = 0.0002
"""For so long a thread may keep Python to itself, where 5 ms are Python's default: the engine's comes back
from a product for the next one every hundred microseconds, and should not wait for a job's JSON."""
EX_ENGINE_DIED = 70
"""`EX_SOFTWARE` of sysexits.h."""


def main(make: Callable[[WorkerSettings, str, int], WorkerProcess] | None = None) -> int:
    """Serves until told to stop; returns the exit code.

    The last arguments are the supervisor's: a name for this process that no other had, and the pipe to it.
    """
    keep_freed_memory()  # the first of all, as threads take theirs from where they find it
    sys.setswitchinterval(SWITCH_S)
    settings, (name, pipe) = WorkerSettings(), sys.argv[-2:]
    _configure_logging(settings)
    faulthandler.enable()  # the supervisor aborts a process that hangs: the log tells where
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold what callers sent
    # Until the model is loaded nothing runs that would be worth finishing; then Celery's handler takes over.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: sys.exit(0))
    return (make or WorkerProcess)(settings, name, int(pipe)).run()


class WorkerProcess:
    """Metrics and heartbeat from the first second, the engine, and Celery once the engine is warm.

    name: what the supervisor knows the leases by. pipe: where it reads the pulse.
    """

    def __init__(self, settings: WorkerSettings, name: str, pipe: int) -> None:
        self._settings = settings
        self._id = f"{socket.gethostname()}:{os.getpid()}:{name[:8]}"
        self._metrics = WorkerMetrics(settings.model)
        self._spans = _spans(settings, self._id)
        self._draining = False
        quick = connect(settings.broker_url, patient=False)
        self._jobs = Jobs(
            connect(settings.broker_url),
            quick,
            settings.model,
            lease_s=settings.lease_s,
            max_attempts=settings.max_attempts,
            owner=name,
        )
        self._engine = Engine(
            self._load,
            limits=Limits(settings.max_batch, settings.max_batch_tokens, settings.max_wait_ms / 1e3),
            cache=EncodingCache(settings.media_cache_bytes, settings.prefix_cache_bytes),
            overlap=self._overlaps,
            on_batch=self._metrics.batch,
            on_death=partial(_die, "engine"),
        )
        self._probes = Probes(
            waiting=lambda: int(quick.llen(queue_name(settings.model))),
            running=lambda: self._jobs.running,
            ended=lambda: self._metrics.ended,
            ready=lambda: self._ready,
        )
        self._app = create_app(settings, self._runner())
        self._heartbeat = Heartbeat(
            quick,
            self._jobs,
            self._status,
            partial(send_again, self._app),
            self._leave_if_deaf,
            on_death=partial(_die, "heartbeat"),
            every_s=settings.heartbeat_s,
        )
        self._cancellations = Cancellations(quick, self._jobs)
        self._pulse = Pulse(pipe, self._stalled, self._jobs.fence, _orphaned)

    def _runner(self) -> JobRunner:
        settings = self._settings
        return JobRunner(
            self._jobs,
            MediaStore(settings.media_url),
            self._engine,
            self._metrics,
            default_budget=settings.default_token_budget,
            decoders=settings.concurrency,
            limits=settings.media_limits,
            spans=self._spans,
        )

    def run(self) -> int:
        """Loads, serves, and takes down in the reverse order; returns the exit code."""
        settings = self._settings
        with (
            self._pulse,
            self._spans or nullcontext(),
            self._metrics.serving(settings.metrics_host, settings.worker_metrics_port, self._probes),
            self._heartbeat,
            self._cancellations,
            self._engine,
        ):
            try:
                model = self._engine.model()
            except PrismError as error:
                log.critical("%s cannot be served: %s", settings.model, with_cause(error))
                return EX_GIVE_UP
            self._describe(model)
            self._pulse.warm()
            self._heartbeat.beat_now()
            log.info("%s is warm on %s", settings.model, model.device)
            return self._consume()

    def _consume(self) -> int:
        consumer = self._app.Worker(
            hostname=self._id, quiet=True, without_gossip=True, without_mingle=True, without_heartbeat=True
        )
        worker_shutting_down.connect(self._drain)
        consumer.start()
        return consumer.exitcode or 0

    def _drain(self, **_: Any) -> None:
        """Celery takes no more jobs and waits for those that run; that wait has an end here."""
        self._draining = True
        self._heartbeat.beat_now()
        grace_s = self._settings.grace_s
        _later(grace_s, partial(self._jobs.stop_all, StopReason.DRAINING))
        _later(grace_s + MARGIN_S, partial(os._exit, 0))  # what is not given back by then is found by others

    @property
    def _ready(self) -> bool:
        return self._engine.warm and not self._draining

    def _leave_if_deaf(self) -> None:
        """A consumer that lost its connection without a word takes no job any more; a new process does."""
        if not self._probes.alive:
            log.critical("jobs wait and none is taken")
            os._exit(EX_ENGINE_DIED)

    def _stalled(self) -> bool:
        return self._engine.stalled_s > self._settings.engine_stall_s

    def _load(self) -> PrunedVLM:
        settings = self._settings
        log.info("loading %s", settings.model)
        model = PrunedVLM.from_pretrained(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            device=settings.device,
            quantization=settings.quantized,
            layout=settings.layout,
            packed_bytes=settings.packed_weights_bytes,
            cuda_graph_bytes=settings.cuda_graph_bytes,
            progress=_Progress(),
        )
        watch_layers(model.model, self._engine.progress)
        # The first pass allocates and compiles what later ones find ready; on CUDA the second one records.
        picture = Image.new("RGB", (64, 64))
        for _ in range(2 if model.device.type == "cuda" else 1):
            model.answer(picture, "What is this?", settings.default_token_budget, max_new_tokens=2)
        return model

    def _overlaps(self, model: PrunedVLM) -> bool:
        wanted = self._settings.overlap
        return model.device.type == "cuda" if wanted == "auto" else wanted == "on"

    def _describe(self, model: PrunedVLM) -> None:
        self._metrics.describe(family=model.family, quantization=model.quantization, revision=model.revision)
        self._metrics.watch(
            str(model.device),
            memory_bytes=model.memory_bytes,
            jobs_running=lambda: self._jobs.running,
            limit_bytes=memory_limit_bytes(model.device),
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
            warm=self._ready,
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


def _spans(settings: WorkerSettings, worker_id: str) -> AttemptSpans | None:
    """None where no collector is named; OpenTelemetry is an extra, which need not be installed then."""
    if settings.tracing_endpoint is None:
        return None
    from worker.tracing import AttemptSpans  # noqa: PLC0415 - see above

    return AttemptSpans(settings.tracing_endpoint, worker_id)


def _die(part: str, error: BaseException) -> None:
    """Ends the process at once: its jobs wait for what is gone, and come back to the queue."""
    log.critical("the %s died: %s", part, without_content(error))
    os._exit(EX_ENGINE_DIED)


def _orphaned() -> None:
    log.critical("the supervisor is gone")
    os._exit(EX_ENGINE_DIED)


def _later(seconds: float, action: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()


def _configure_logging(settings: WorkerSettings) -> None:
    """To stderr, in our lines. Celery and kombu never log at DEBUG, where they print whole messages."""
    log_to_stderr(settings.log_format, settings.log_level)
    if not sys.stderr.isatty():  # bars are for people who watch them
        disable_progress_bar()
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


if __name__ == "__main__":
    sys.exit(main())
