"""From this package's exceptions to HTTP answers in OpenAI's form."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

from fastapi.responses import JSONResponse

from safelora_vllm.errors import (
    AdapterNotFound,
    AdapterRefused,
    AlreadyLoaded,
    ChangedMeanwhile,
    ExamUnavailable,
    Forbidden,
    GuardError,
    QuotaExceeded,
    SafeLoRAError,
    StoreDamaged,
    Unauthorized,
    Unavailable,
    UnknownAdapter,
    UnknownRoute,
    UsageError,
)
from safelora_vllm.integration.server.access_check import MethodNotAllowed
from safelora_vllm.integration.server.callers import caller
from safelora_vllm.integration.server.change_limit import TooManyChanges
from safelora_vllm.integration.server.exam.limits import TooManyExams
from safelora_vllm.integration.server.registry import AwaitsExam
from safelora_vllm.integration.server.schemas import ErrorBody
from safelora_vllm.integration.server.uploads import TooLarge, TooManyUploads, UploadTimeout
from safelora_vllm.remote.refusals import SourceForbidden, SourceUnavailable

logger = logging.getLogger("vllm.safelora.http")


class NotServing(SafeLoRAError):
    """This server was started without LoRA."""


def without_lora() -> NotServing:
    """The answer of routes that need LoRA."""
    return NotServing("this server was started without LoRA; start it with --enable-lora")


_STATUS: dict[type[SafeLoRAError], tuple[int, str]] = {
    Unauthorized: (401, "AuthenticationError"),
    Forbidden: (403, "PermissionDeniedError"),
    QuotaExceeded: (403, "QuotaExceededError"),
    UnknownAdapter: (404, "NotFoundError"),
    UnknownRoute: (404, "NotFoundError"),
    AdapterNotFound: (404, "NotFoundError"),
    MethodNotAllowed: (405, "MethodNotAllowedError"),
    UploadTimeout: (408, "RequestTimeoutError"),
    AlreadyLoaded: (409, "ConflictError"),
    ChangedMeanwhile: (409, "ConflictError"),
    TooLarge: (413, "RequestTooLargeError"),
    SourceForbidden: (403, "PermissionDeniedError"),
    SourceUnavailable: (502, "BadGatewayError"),
    AdapterRefused: (422, "AdapterRefusedError"),
    TooManyChanges: (429, "RateLimitError"),
    TooManyExams: (429, "RateLimitError"),
    TooManyUploads: (429, "RateLimitError"),
    UsageError: (400, "InvalidUserInput"),
    Unavailable: (503, "ServiceUnavailableError"),
    StoreDamaged: (503, "ServiceUnavailableError"),
    GuardError: (503, "ServiceUnavailableError"),
    NotServing: (503, "ServiceUnavailableError"),
}
# A path in quotes up to the closing one, with its spaces; else up to a space, without punctuation before it.
_END = r"""(?=[]\[(){}<>'"`,;:.]*(?:\s|$))"""
_PLACE = re.compile(
    rf"""(?P<address>\b[a-z][a-z0-9+.-]*://\S*?{_END})"""
    rf"""|(?P<quote>['"`])/.*?(?P=quote)(?!\w)|(?<![\w/])/\S*?{_END}"""
)
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "2"},
}


def error_response(error: SafeLoRAError) -> JSONResponse:
    """An OpenAI-style error. A refusal also lists its reasons.

    Where the server itself is out of order, only admins are told the paths of its files and its addresses.
    """
    status, kind = next(
        (answer for cls, answer in _STATUS.items() if isinstance(error, cls)),
        (500, "InternalServerError"),
    )
    message = str(error)
    refused = isinstance(error, AdapterRefused)
    if status >= 500 and not refused and not ((who := caller()) and who.kind == "admin"):
        # Each request for an adapter that waits its turn is answered so: nothing is out of order.
        logger.log(logging.DEBUG if isinstance(error, AwaitsExam) else logging.ERROR, "%s", message)
        message = _PLACE.sub(_hidden, message)
    body: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": status}
    if isinstance(error, AdapterRefused):
        body["reasons"] = [dataclasses.asdict(reason) for reason in error.reasons]
        if (who := caller()) and who.kind == "admin":
            body |= error.for_admins
    headers = _HEADERS.get(status)
    if isinstance(error, MethodNotAllowed):
        headers = {"Allow": ", ".join(error.methods)}
    if isinstance(error, TooManyChanges | TooManyExams | ExamUnavailable):
        headers = {"Retry-After": str(error.seconds)}
    return JSONResponse({"error": body}, status_code=status, headers=headers)


def _hidden(place: re.Match[str]) -> str:
    quote = place["quote"] or ""
    return "(an address)" if place["address"] else f"{quote}(a path){quote}"


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses``: these errors have `ErrorBody`."""
    return {status: {"model": ErrorBody} for status in statuses}
