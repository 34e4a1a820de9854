"""What a front end logs, in the lines that worker and front end have in common (`worker.logs`)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from worker.logs import log_to_stderr

if TYPE_CHECKING:
    from service.settings import ServiceSettings

_QUIET = ("httpx", "httpcore", "kombu", "celery", "multipart", "python_multipart")
"""They tell of URLs and bodies below the level of warnings."""


def configure(settings: ServiceSettings) -> None:
    """As the settings say."""
    log_to_stderr(settings.log_format, settings.log_level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
