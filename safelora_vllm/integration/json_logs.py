"""``--log-format json``: one JSON object a line, for log pipelines, with whose request it was about.

vLLM reads ``VLLM_LOGGING_CONFIG_PATH`` in all of its processes; the file beside this one names the formatter.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from re import compile as pattern

CONFIG = Path(__file__).with_name("json_logs.json")
VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
_REQUEST_ID = pattern(r"[\w.-]{1,64}")
_OF_ADAPTERS = ("adapter", "version", "copy")  # what a caller of the logger gives as `extra`
_about: ContextVar[Mapping[str, str]] = ContextVar("safelora_about", default={})  # noqa: B039  (never changed)


@contextmanager
def about_request(given: str | None, tenant: str | None) -> Iterator[str]:
    """Whose request is answered until the block ends, for every line that is logged meanwhile.

    Args:
        given: the caller's ``X-Request-Id``; another one is made where it is missing or not harmless.
        tenant: of the caller's key.
    """
    number = given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    token = _about.set({"request_id": number, **({"tenant": tenant} if tenant else {})})
    try:
        yield number
    finally:
        _about.reset(token)


def about() -> Mapping[str, str]:
    """``request_id`` and ``tenant`` of the request that is answered; empty in other work."""
    return _about.get()


class JsonFormatter(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Text without line breaks."""
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            **{name: found for name in _OF_ADAPTERS if (found := getattr(record, name, None)) is not None},
            **about(),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def print_audit(record: Mapping[str, object]) -> None:
    """A record of the audit log as a line of standard output."""
    print(json.dumps({"logger": "safelora.audit", **record, **about()}), flush=True)
