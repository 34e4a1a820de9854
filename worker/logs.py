"""Lines of both sides' logs, with the id of the request they are about, without media, prompts or answers."""

from __future__ import annotations

import json
import logging
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from types import TracebackType

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
"""Of the request that is being served; asyncio's tasks and threads inherit it."""

_ExcInfo = tuple[type[BaseException], BaseException, "TracebackType | None"] | tuple[None, None, None]


def without_content(error: BaseException) -> str:
    """Types and stacks of `error` and of what caused it, without messages: they may quote a question."""
    told = f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return told if cause is None else f"{without_content(cause)}then {told}"


class _WithoutContent(logging.Formatter):
    """Whoever logs an exception: its message stays out."""

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 (logging's own name)
        return without_content(ei[1]) if ei[1] else ""


class TextLines(_WithoutContent):
    """One line a record, for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.request_id = REQUEST_ID.get()
        return super().format(record)


class JsonLines(_WithoutContent):
    """One JSON object a line, for machines: `time`, `level`, `logger`, `request_id`, `message`, `stack`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": REQUEST_ID.get(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(log_format: LogFormat, level: LogLevel) -> None:
    """Sends the whole process's lines, and Python's warnings, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
