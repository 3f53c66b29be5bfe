"""Refusals of remote sources that are not about an adapter's bytes.

    AdapterRefused
    ├── SourceForbidden    the server may not or will not go there
    └── SourceUnavailable  the other side does not answer; the call may be repeated

No message has more of an address than its text without the query, and none has what the other side said.
"""

from __future__ import annotations

from safelora_vllm.errors import AdapterRefused, Reason


class SourceForbidden(AdapterRefused):
    """An address outside of the allowlist, a forbidden network address, or a redirect."""


class SourceUnavailable(AdapterRefused):
    """The other side cannot be reached, is slow, or breaks off again and again."""


def forbidden(code: str, message: str) -> SourceForbidden:
    """Shorthand for one reason."""
    return SourceForbidden([Reason(code, message)])


def unavailable(code: str, message: str) -> SourceUnavailable:
    """Shorthand for one reason."""
    return SourceUnavailable([Reason(code, message)])
