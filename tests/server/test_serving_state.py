"""What an API server tells ``store ls``, through a file that it writes when something has changed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from safelora_vllm.errors import StoreUnavailable, refuse
from safelora_vllm.integration.server import serving_state
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.serving_state import ServingState
from safelora_vllm.integration.server.store_sync import TAKEN
from safelora_vllm.store import Version
from safelora_vllm.store.layout import SERVING
from safelora_vllm.store.serving import Serving, load

VERSION = Version(1, "a" * 64, 1, 1, 0.0, "ops")


class Rules:
    """A server's rules, and those of one tenant."""

    servers_ruleset = "server's"

    def ruleset(self, name: str) -> str:
        return "acme's" if name.startswith("acme/") else "server's"


def told(root: Path) -> Serving:
    found = load(root)
    assert found is not None
    return found


def test_what_is_told(tmp_path: Path) -> None:
    entries = (
        Entry("acme/x", 1, VERSION),
        Entry("globex/x", 1, VERSION, problem=refuse("nan", "a NaN")),
        Entry("lost", 1, VERSION, problem=StoreUnavailable("the upload is damaged")),
        Entry("static", 1, folder=tmp_path, problem=StoreUnavailable("not of the store")),
    )
    state = ServingState({entry.name: entry for entry in entries}, cast(Any, Rules()), tmp_path)
    asyncio.run(state.tell({"aligned": TAKEN}))
    found = told(tmp_path)
    assert (found.ruleset, found.rulesets) == ("server's", {"acme": "acme's"})
    assert found.unavailable == {"lost": "the upload is damaged", "aligned": TAKEN} and found.written


def test_it_is_written_when_something_has_changed(tmp_path: Path) -> None:
    registry = {"x": Entry("x", 1, VERSION)}
    state = ServingState(registry, cast(Any, Rules()), tmp_path)
    asyncio.run(state.tell({}))
    (tmp_path / SERVING).unlink()
    asyncio.run(state.tell({}))
    assert load(tmp_path) is None
    registry["x"] = Entry("x", 1, VERSION, problem=StoreUnavailable("gone"))
    asyncio.run(state.tell({}))
    assert told(tmp_path).unavailable == {"x": "gone"}


def test_a_store_that_cannot_be_written_is_complained_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StoreUnavailable("the disk is full")

    state = ServingState({}, cast(Any, Rules()), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(serving_state, "save", full)
        for _ in range(3):
            asyncio.run(state.tell({}))
    assert caplog.text.count("'safelora-vllm store ls' does not see what is served: the disk is full") == 1
    asyncio.run(state.tell({}))
    assert told(tmp_path).unavailable == {}
