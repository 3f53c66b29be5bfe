"""A request for an adapter that is not ready yet waits for it a moment, instead of being sent away at once.

After a start, a change of rules or a lost copy, names are known whose published copies the gate has still to
make. Nothing is served meanwhile, and nothing but the copy that the gate made afterwards. Imports no vllm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from safelora_vllm.integration.server.visibility import visible
from safelora_vllm.tenants.principal import Principal

if TYPE_CHECKING:
    from safelora_vllm.integration.server.reconcile import Reconciler

_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.05
_MAX_BODY = 64 * 1024  # requests with longer prompts are not looked into, and do not wait
_READ_SECONDS = 5.0  # in which the body has to be there


async def wait_until_ready(reconciler: Reconciler, who: Principal, scope: Scope, receive: Receive) -> Receive:
    """Wait for the adapter that a request names, if this caller may use it and it is being prepared.

    For requests to routes that use models, by callers who may. A body that is long or comes slowly is not
    waited for: its route reads it, and answers 503 where the adapter is not ready.
    A name whose last try failed is not waited for until the next try is due.

    Returns:
        What the request is read from afterwards.
    """
    unready = reconciler.served.unready
    if not unready or not _may_name_a_model(scope):
        return receive
    messages = await _body(receive)
    name = _model(b"".join(message.get("body", b"") for message in messages))
    if name in unready and visible({name: reconciler.registry[name]}, who):
        deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
        while reconciler.wake(name) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
    return replayed(messages, receive)


def _may_name_a_model(scope: Scope) -> bool:
    """Whether it is a JSON request that is small enough to look into."""
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and headers.get("content-type", "").startswith("application/json")
        and length.isdecimal()
        and int(length) <= _MAX_BODY
    )


def _model(text: bytes) -> str:
    """The ``model`` of a request; empty where there is none. What is wrong with it, its route says."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    name = body.get("model") if isinstance(body, dict) else None
    return name if isinstance(name, str) else ""


async def _body(receive: Receive) -> list[Message]:
    """What comes of a body in time."""
    messages: list[Message] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_READ_SECONDS):
            while not messages or messages[-1].get("more_body"):
                messages.append(await receive())
    return messages


def replayed(messages: list[Message], receive: Receive) -> Receive:
    """Give the messages that were read once more, then what comes after them."""
    waiting = messages[::-1]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
