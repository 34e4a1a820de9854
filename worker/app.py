"""The Celery application: one task, one queue, nothing delivered before there is a thread to work on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.exceptions import Reject
from redis.exceptions import RedisError

from worker.contract import TASK_ANSWER, broker_tls, queue_name
from worker.errors import JobGivenBackError

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.settings import WorkerSettings


def create_app(settings: WorkerSettings, run: Callable[[str, dict[str, Any]], None]) -> Celery:
    """An application whose task hands job id and payload to `run` and acknowledges when it returns.

    Where the job itself went back, or Redis cannot be told how it ended, so does the delivery.
    """
    app = Celery("worker", broker=settings.broker_url, set_as_current=False)
    app.conf.update(_configuration(settings))

    @app.task(name=TASK_ANSWER, bind=True, shared=False)  # type: ignore[untyped-decorator] # celery has no types
    def answer(task: Any, payload: dict[str, Any]) -> None:
        try:
            run(task.request.id, payload)
        except (RedisError, JobGivenBackError) as error:
            raise Reject(type(error).__name__, requeue=True) from None  # Celery logs the whole chain

    return app


def send_again(app: Celery, job_id: str, payload: dict[str, Any]) -> None:
    """Puts the job into the queue once more; a delivery too many is dropped when it arrives."""
    app.send_task(TASK_ANSWER, args=[payload], task_id=job_id, argsrepr="(...)", ignore_result=True)


def _configuration(settings: WorkerSettings) -> dict[str, Any]:
    return {
        "task_default_queue": queue_name(settings.model),
        "worker_pool": "threads",
        "worker_concurrency": settings.concurrency,
        # A job is acknowledged when it has ended, and none is taken before a thread is free for it.
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        # Job state is our own, in Redis: no result backend, no events, no remote control.
        "task_ignore_result": True,
        "worker_enable_remote_control": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        # A broker that restarts is waited for, however long; what runs meanwhile goes on.
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 5,
        "broker_use_ssl": broker_tls(settings.broker_url),
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_transport_options": {
            "visibility_timeout": settings.visibility_timeout_s,
            # Kombu waits for ever on a connection that died without a word, unless told otherwise.
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "retry_on_timeout": True,
        },
    }
