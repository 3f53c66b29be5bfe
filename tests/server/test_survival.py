"""What must not end the engine, nor let anything unprojected in."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import httpx
from server import Server

from tests.server.conftest import descendants, load, say


def wait_for(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def test_evicted_adapters_are_read_from_the_published_copy(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The pool holds two: loading more evicts, and by then the tenant's folders are gone."""
    first = {}
    for name in ("extra0", "extra1", "extra2"):
        shutil.copytree(adapters[name], tmp_path / name)
        assert load(admin, name, tmp_path / name).status_code == 200
        first[name] = say(user, name)
        shutil.rmtree(tmp_path / name)
    for _ in range(2):
        assert {name: say(user, name) for name in first} == first


def test_a_lost_copy_costs_one_adapter_not_the_engine(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path], store: Path
) -> None:
    for name in ("extra0", "extra1", "extra2"):
        load(admin, name, adapters[name])
    cards = {card["id"]: card["root"] for card in user.get("/v1/models").json()["data"]}
    key = cards["extra0"].removeprefix("safelora://").partition("/")[0]
    aligned, intact = say(user, "aligned"), say(user, "extra1")
    say(user, "extra2")
    said = say(user, "extra0")
    say(user, "extra1"), say(user, "extra2")
    shutil.rmtree(store / "published" / key)
    assert say(user, "extra0") == aligned, "a running request goes on with the aligned model alone"
    wait_for(
        lambda: user.get("/v1/adapters/extra0").status_code == 200 and (store / "published" / key).is_dir()
    )
    assert say(user, "extra0") == said, "made again from what was uploaded, by itself"
    assert say(user, "extra1") == intact
    cards = {card["id"]: card["root"] for card in user.get("/v1/models").json()["data"]}
    assert cards["extra0"] == f"safelora://{key}/1"


def test_a_dead_gate_comes_back(
    server: Server, admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]
) -> None:
    load(admin, "extra0", adapters["extra0"])
    before = say(user, "extra0")
    os.kill(gate_pid(server), signal.SIGKILL)
    assert say(user, "extra0") == before
    statuses = set()

    def loads_again() -> bool:
        statuses.add(load(admin, "extra1", adapters["extra1"]).status_code)
        return 200 in statuses

    wait_for(loads_again)
    assert statuses <= {200, 503}, "while the gate is away, loading says so and lets nothing in"


def gate_pid(server: Server) -> int:
    """The gate process among the descendants of the server."""
    return next(pid for pid, line in descendants(server.process.pid).items() if b"service.server" in line)
