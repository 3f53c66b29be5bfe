"""How many lines a tenant's repeated refusals make in the audit log."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the package of the server needs vLLM")

from safelora_vllm.integration.server import refusal_limit
from safelora_vllm.integration.server.refusal_limit import LINES, SECONDS, RefusalLimit, Refused

Lines = list[tuple[str, str, str, int]]
QUOTA = {"decision": "refused", "reasons": ["quota"]}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(refusal_limit, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def limited() -> tuple[RefusalLimit, Lines]:
    lines: Lines = []

    async def write(line: Refused) -> None:
        lines.append((line.actor, line.action, line.adapter, line.count))

    return RefusalLimit(write), lines


def refuse(limit: RefusalLimit, times: int, tenant: str = "acme") -> None:
    for number in range(times):
        asyncio.run(limit.refused(tenant, Refused(f"{tenant}/ci", "upload", f"{tenant}/{number}", QUOTA)))


def test_the_documented_limit() -> None:
    assert (LINES, SECONDS) == (10, 60.0)


def test_a_few_refusals_have_a_line_each(clock: SimpleNamespace) -> None:
    limit, lines = limited()
    refuse(limit, LINES)
    clock.now += SECONDS
    asyncio.run(limit.flush())
    assert lines == [("acme/ci", "upload", f"acme/{number}", 1) for number in range(LINES)]


def test_many_are_one_line_with_their_count(clock: SimpleNamespace) -> None:
    limit, lines = limited()
    refuse(limit, LINES + 1000)
    assert len(lines) == LINES
    clock.now += SECONDS - 0.1
    asyncio.run(limit.flush())
    assert len(lines) == LINES
    clock.now += 0.1
    asyncio.run(limit.flush())
    asyncio.run(limit.flush())
    assert lines[LINES:] == [("acme/ci", "upload", f"acme/{LINES + 999}", 1000)]
    assert sum(count for *_, count in lines) == LINES + 1000, "none is missing, none is counted twice"


@pytest.mark.usefixtures("clock")
def test_a_count_is_of_what_was_said() -> None:
    """Of replacing by the same content, too, which is no refusal."""
    lines: list[Refused] = []

    async def write(line: Refused) -> None:
        lines.append(line)

    limit = RefusalLimit(write)
    same = Refused("acme/ci", "upload", "acme/x", {"decision": "unchanged", "reasons": [], "version": 3})
    for _ in range(LINES + 2):
        asyncio.run(limit.refused("unchanged acme", same))
    asyncio.run(limit.flush(all_of_them=True))
    assert lines[-1].count == 2 and lines[-1].details == {"decision": "unchanged", "reasons": []}


def test_the_next_minute_begins_with_the_count_of_the_last(clock: SimpleNamespace) -> None:
    limit, lines = limited()
    refuse(limit, LINES + 5)
    clock.now += SECONDS
    refuse(limit, 1)
    assert [count for *_, count in lines[LINES:]] == [5, 1]


@pytest.mark.usefixtures("clock")
def test_one_tenants_flood_hides_nothing_of_another() -> None:
    limit, lines = limited()
    refuse(limit, 5 * LINES)
    refuse(limit, 3, "globex")
    assert [name for _, _, name, _ in lines[LINES:]] == ["globex/0", "globex/1", "globex/2"]


@pytest.mark.usefixtures("clock")
def test_what_is_left_when_the_server_stops() -> None:
    limit, lines = limited()
    refuse(limit, LINES + 2)
    asyncio.run(limit.flush(all_of_them=True))
    assert lines[-1][3] == 2


def test_counts_that_are_written_at_the_same_time_are_written_once(clock: SimpleNamespace) -> None:
    lines: Lines = []

    async def write(line: Refused) -> None:
        await asyncio.sleep(0)
        lines.append((line.actor, line.action, line.adapter, line.count))

    async def use() -> None:
        limit = RefusalLimit(write)
        for tenant in ("acme", "globex", "third"):
            for _ in range(LINES + 2):
                await limit.refused(tenant, Refused("ci", "upload", tenant, QUOTA))
        clock.now += SECONDS
        one = Refused("ci", "upload", "third", QUOTA)
        await asyncio.gather(limit.flush(), limit.flush(), limit.refused("third", one))

    asyncio.run(use())
    assert [count for *_, count in lines if count > 1] == [2, 2, 2]
    assert sum(count for *_, count in lines) == 3 * (LINES + 2) + 1


def test_a_count_has_the_codes_of_all() -> None:
    """And no digest, which is of one."""
    lines: list[Refused] = []

    async def write(line: Refused) -> None:
        lines.append(line)

    async def use() -> None:
        limit = RefusalLimit(write)
        for number in range(LINES + 3):
            details = {"decision": "refused", "digest": str(number), "reasons": ["nan", f"rank-{number}"]}
            await limit.refused("gate acme", Refused("ci", "upload", f"acme/{number}", details))
        await limit.flush(all_of_them=True)

    asyncio.run(use())
    assert [line.details["digest"] for line in lines[:-1]] == [str(number) for number in range(LINES)]
    assert lines[-1].details == {"decision": "refused", "reasons": ["nan", "rank-10", "rank-11", "rank-12"]}
    assert lines[-1].count == 3
