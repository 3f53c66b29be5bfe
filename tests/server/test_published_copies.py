"""Published copies, as an API server asks for them, and how it watches the store's names. No server runs."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from safelora_vllm.gate.protocol import Judgement
from safelora_vllm.integration.server import published_copies
from safelora_vllm.integration.server.published_copies import Copies
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.store_watch import StoreWatch
from safelora_vllm.policy import Policy
from safelora_vllm.report import Report
from safelora_vllm.tenants.rules import SERVERS, TenantRules
from tests.server.test_reconcile import Published

REPORT = Report("another name", "d" * 64, "p", Policy(), True, [], [])


class Gate:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def ensure(self, *arguments: object, **named: object) -> Any:
        self.asked.append(("ensure", arguments, named))
        return Judgement(REPORT, "k", 1, "r")

    def admit(self, *arguments: object, **named: object) -> Any:
        self.asked.append(("admit", arguments, named))
        return Judgement(REPORT, "k", 1, "r")


def test_the_gate_is_asked_by_the_rules_of_a_name() -> None:
    """The server's, the tenant's or the adapter's own, and a digest of those of the name."""
    gate, strict = Gate(), TenantRules({"energy": 0.5})
    friend = TenantRules({"energy": 0.1}, less_strict=True)
    tenants = {"strict/x": strict, "friend/x": friend}
    state = SimpleNamespace(policy=Policy(), ruleset_digest="r")
    copies = Copies(
        cast(Any, gate), cast(Any, state), cast(Any, Published()), lambda name: tenants.get(name, SERVERS)
    )

    async def ask() -> None:
        unprojected = {"mode": "report-only"}
        assert (await copies.ensure("d", "x", unprojected, True))[1:3] == ("r", True)
        assert (await copies.ensure("d", "x", unprojected, False))[1:3] == ("r", False)
        assert (await copies.ensure("d", "strict/x", {}, False))[1:3] == (strict.ruleset("r"), False)
        assert (await copies.admit("/a", "friend/x", {}, None))[1:3] == (friend.ruleset("r"), True)
        assert (await copies.adopt(Entry("y", 1, folder=Path("/adapters/y")))).key == "k"
        await copies.adopt(Entry("friend/x", 1, folder=Path("/adapters/y")))

    asyncio.run(ask())
    asked = [(call, arguments[:2], fields(arguments[2]), named) for call, arguments, named in gate.asked]
    assert asked == [
        ("ensure", ("d", "x"), {"mode": "report-only"}, {"override": True}),
        ("ensure", ("d", "x"), {}, {"override": False}),
        ("ensure", ("d", "strict/x"), {"energy": 0.5}, {"override": False}),
        (
            "admit",
            ("/a", "friend/x"),
            {"energy": 0.1},
            {"override": True, "allowance": None, "signing": None},
        ),
        ("admit", ("/adapters/y", "y"), {}, {"override": False, "keep": False}),
        ("admit", ("/adapters/y", "friend/x"), {"energy": 0.1}, {"override": True, "keep": False}),
    ]


def fields(policy: dict[str, Any]) -> dict[str, Any]:
    """Those that differ from the server's."""
    server = dataclasses.asdict(Policy())
    return {field: value for field, value in policy.items() if value != server[field]}


def test_files_that_cannot_be_seen_have_no_state() -> None:
    def state(_: str) -> None:
        raise PermissionError("not yours")

    copies = Copies(cast(Any, None), cast(Any, None), cast(Any, SimpleNamespace(state=state)))
    assert copies.file_states("k") == ()


def test_the_gate_is_asked_several_things_at_once() -> None:
    """One adapter that takes minutes does not hold up what another only has to find."""
    assert published_copies._GATE_CALLS == 32
    copies = Copies(cast(Any, None), cast(Any, None), cast(Any, None))
    together = threading.Barrier(4)

    async def ask() -> None:
        await asyncio.gather(*(copies.ask(together.wait, 20) for _ in range(4)))

    asyncio.run(ask())


def test_each_kind_of_change_of_a_folder_is_seen_once(tmp_path: Path) -> None:
    folder, beside = tmp_path / "names", tmp_path / "beside"
    folder.mkdir()
    beside.touch()
    watch = StoreWatch(folder)
    file = folder / "a"
    changes: list[Callable[[], object]] = [
        lambda: beside.rename(file), lambda: file.write_text("x"), lambda: file.rename(folder / "b"),
        lambda: (folder / "b").rename(beside), lambda: file.symlink_to("b"), file.unlink,
    ]  # fmt: skip
    assert not watch.changed()
    for change in changes:
        change()
        assert watch.changed() and not watch.changed()
    for number in range(200):
        (folder / str(number)).touch()
    assert watch.changed() and not watch.changed(), "all of them are read at once"
    queue = watch._queue
    assert queue is not None
    watch.close()
    assert queue.closed and not watch.changed()
    watch.close()


def test_a_folder_that_cannot_be_watched_leaves_nothing_open(tmp_path: Path) -> None:
    watch = StoreWatch(tmp_path / "none")
    assert watch._queue is None and not watch.changed()
