"""The Celery application around a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from celery.exceptions import Reject

from worker.app import create_app
from worker.contract import TASK_ANSWER
from worker.errors import JobGivenBackError
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from pathlib import Path

    from celery import Celery


def test_a_job_given_back_is_told_in_one_part(tmp_path: Path) -> None:
    """In a normal drain every job is: Celery logs the rejection, and need not say what it came from."""

    def run(job_id: str, payload: dict[str, Any]) -> None:
        raise JobGivenBackError(job_id)

    app = create_app(WorkerSettings(media_url=tmp_path.as_uri()), run)
    with pytest.raises(Reject) as told:
        app.tasks[TASK_ANSWER]({})
    assert told.value.requeue
    assert told.value.__suppress_context__


def test_each_application_has_its_own_job(tmp_path: Path) -> None:
    """Celery shares tasks with every application of the process, unless told otherwise."""
    ran: list[str] = []
    settings = WorkerSettings(media_url=tmp_path.as_uri())

    def runs(name: str) -> Celery:
        return create_app(settings, lambda _id, _payload: ran.append(name))

    apps = {name: runs(name) for name in "abc"}
    for name, app in apps.items():
        app.tasks[TASK_ANSWER]({})
        assert ran.pop() == name
