"""Who is calling: the principal of the request being answered, for whatever the request reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from safelora_vllm.errors import Unauthorized
from safelora_vllm.tenants.principal import Principal

_caller: ContextVar[Principal | None] = ContextVar("safelora_caller", default=None)
_identify: ContextVar[Callable[[], Principal] | None] = ContextVar("safelora_identify", default=None)


def caller() -> Principal | None:
    """The caller of the request being answered; None in work that no request asked for."""
    return _caller.get()


def caller_now(who: Principal) -> Principal:
    """The same caller as the keys file has them now: an upload with its exams may last for hours.

    Raises:
        Unauthorized: their key is not in force any more.
    """
    identify = _identify.get()
    if identify is None:
        return who
    now = identify()
    if (now.kind, now.key_id) != (who.kind, who.key_id):
        raise Unauthorized(f"the key {who.key_id} was taken out meanwhile: nothing was changed")
    return now


@contextmanager
def acting_as(principal: Principal | None, identify: Callable[[], Principal] | None = None) -> Iterator[None]:
    """Answer for this caller until the block ends. identify: who their key belongs to at any time."""
    tokens = _caller.set(principal), _identify.set(identify)
    try:
        yield
    finally:
        _caller.reset(tokens[0])
        _identify.reset(tokens[1])
