"""Who is calling: the principal of the request being answered, for whatever the request reaches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from safelora_vllm.tenants.principal import Principal

_caller: ContextVar[Principal | None] = ContextVar("safelora_caller", default=None)


def caller() -> Principal | None:
    """The caller of the request being answered; None in work that no request asked for."""
    return _caller.get()


@contextmanager
def acting_as(principal: Principal | None) -> Iterator[None]:
    """Answer for this caller until the block ends."""
    token = _caller.set(principal)
    try:
        yield
    finally:
        _caller.reset(token)
