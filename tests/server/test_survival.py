"""What must not end the engine, nor let anything unprojected in."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
from server import Server

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.projectors.cache import ProjectorCache
from tests.server.conftest import Q_V, descendants, first_token, load, upload, write_adapter
from tests.server.troubles import (
    full_disk,
    gate_pid,
    limited,
    no_room_for_copies,
    no_room_for_uploads,
    not_a_folder,
    read_only,
)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
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
        first[name] = first_token(user, name)
        shutil.rmtree(tmp_path / name)
    assert len(set(first.values())) == 3, "the answers tell the adapters apart"
    for _ in range(2):
        assert {name: first_token(user, name) for name in first} == first


def cut(copy: Path, _other: Path) -> None:
    os.truncate(copy / WEIGHTS, (copy / WEIGHTS).stat().st_size // 2)


def exchange(copy: Path, other: Path) -> None:
    """Another adapter's files, sound in themselves."""
    for name in (CONFIG, WEIGHTS):
        shutil.copy(other / name, copy / name)


def remove(copy: Path, _other: Path) -> None:
    shutil.rmtree(copy)


@pytest.mark.parametrize("damage", [remove, cut, exchange])
def test_a_lost_copy_costs_one_adapter_not_the_engine(
    admin: httpx.Client,
    user: httpx.Client,
    adapters: dict[str, Path],
    store: Path,
    damage: Callable[[Path, Path], None],
) -> None:
    for name in ("extra0", "extra1", "extra2"):
        load(admin, name, adapters[name])
    root = roots(user)["extra0"]
    key = root.removeprefix("safelora://").partition("/")[0]
    aligned, intact = first_token(user, "aligned"), first_token(user, "extra1")
    first_token(user, "extra2")
    said = first_token(user, "extra0")
    assert len({aligned, intact, said}) == 3, "the answers tell the adapters apart"
    first_token(user, "extra1"), first_token(user, "extra2")
    damage(store / "published" / key, adapters["all"])
    at_once = first_token(user, "extra0")
    assert at_once in (aligned, said), "the aligned model alone, or the heartbeat was there first"
    if at_once == aligned:
        wait_for(lambda: roots(user).get("extra0") not in (root, None))
        assert roots(user)["extra0"].startswith(f"safelora://{key}/"), "no prefix-cache block is used again"
    assert first_token(user, "extra0") == said, "made again from what was uploaded, by itself"
    assert first_token(user, "extra1") == intact


def test_damage_shows_in_no_answer_while_the_pool_has_the_weights_nor_later(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path], store: Path
) -> None:
    """The weights in memory answer, which were read before. The heartbeat has the copy made again."""
    for name in ("extra0", "extra1", "extra2"):
        load(admin, name, adapters[name])
    root, said = roots(user)["extra0"], first_token(user, "extra0")
    weights = store / "published" / root.removeprefix("safelora://").partition("/")[0] / WEIGHTS
    sound = weights.read_bytes()
    weights.write_bytes(sound[: len(sound) // 2] + sound[len(sound) // 2 :][::-1])
    wait_for(lambda: first_token(user, "extra0") != said or holds(weights, sound))
    assert weights.read_bytes() == sound and first_token(user, "extra0") == said
    first_token(user, "extra1"), first_token(user, "extra2")  # the pool holds two
    assert first_token(user, "extra0") == said and roots(user)["extra0"] == root


def holds(path: Path, content: bytes) -> bool:
    """Whether a file has this content. A copy that is being made again is not there for a moment."""
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def roots(user: httpx.Client) -> dict[str, str]:
    """Each served model with the path that vLLM knows it by."""
    return {card["id"]: card["root"] for card in user.get("/v1/models").json()["data"]}


def test_loaded_weights_do_not_hang_on_files(
    server: Server, admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path], store: Path
) -> None:
    """A mapped file that is cut short kills whoever reads it, and one that is written to changes weights."""
    load(admin, "extra0", adapters["extra0"])
    first_token(user, "extra0")
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in descendants(server.process.pid)]
    assert any("libtorch" in text for text in maps), "these are the processes meant"
    assert not any(f"{store}/published" in text for text in maps)


@pytest.mark.parametrize(
    "trouble", [full_disk, read_only, no_room_for_uploads, no_room_for_copies, not_a_folder]
)
def test_a_store_that_cannot_be_written(
    server: Server,
    admin: httpx.Client,
    user: httpx.Client,
    adapters: dict[str, Path],
    projectors: Path,
    store: Path,
    tmp_path: Path,
    trouble: Callable[[Server, Path], AbstractContextManager[None]],
) -> None:
    """Uploads wait for better days; what is served stays, and the next upload after those works."""
    new = write_new(tmp_path / "new", projectors, trouble.__name__)
    load(admin, "extra0", adapters["extra0"])
    said = {name: first_token(user, name) for name in ("aligned", "static", "extra0")}
    with trouble(server, store):
        answer = upload(admin, "late", new)
        assert answer.status_code == 503 and "cannot be written" in answer.text
        assert user.get("/v1/adapters/late").status_code == 404
        assert {name: first_token(user, name) for name in said} == said
    assert upload(admin, "late", new).status_code == 201
    assert first_token(user, "late") != first_token(user, "aligned")
    assert {name: first_token(user, name) for name in said} == said


def write_new(folder: Path, projectors: Path, seed: str) -> Path:
    """An adapter that no other test has loaded."""
    write_adapter(folder, ProjectorCache(projectors), Q_V, 8, seed=zlib.crc32(seed.encode()))
    return folder


def test_no_memory_in_the_gate(
    server: Server, admin: httpx.Client, user: httpx.Client, projectors: Path, tmp_path: Path
) -> None:
    new = write_new(tmp_path / "new", projectors, "memory")
    said = first_token(user, "static")
    used = int(Path(f"/proc/{gate_pid(server)}/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(gate_pid(server), resource.RLIMIT_AS, used):
        answer = upload(admin, "late", new)
        assert answer.status_code == 503, answer.text
        assert first_token(user, "static") == said
    wait_for(lambda: upload(admin, "late", new).status_code == 201)
    assert first_token(user, "late") != first_token(user, "aligned")


def test_projectors_damaged_while_serving(
    server: Server,
    admin: httpx.Client,
    user: httpx.Client,
    adapters: dict[str, Path],
    projectors: Path,
    tmp_path: Path,
) -> None:
    """The gate has them in memory. One that starts anew does not believe them, until they are mended."""
    new = [write_new(tmp_path / f"new{i}", projectors, f"projectors {i}") for i in range(3)]
    load(admin, "extra0", adapters["extra0"])
    said = {name: first_token(user, name) for name in ("aligned", "static", "extra0")}
    shard = next(projectors.glob("*.safetensors"))
    shard.rename(shard.with_suffix(".aside"))
    try:
        shard.write_bytes(shard.with_suffix(".aside").read_bytes()[:-8] + b"\x7f" * 8)
        assert upload(admin, "late0", new[0]).status_code == 201
        assert {name: first_token(user, name) for name in said} == said
        os.kill(gate_pid(server), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert upload(admin, "late1", new[1]).status_code == 503, "no gate, or one with wrong projectors"
            assert {name: first_token(user, name) for name in said} == said
            time.sleep(1)
    finally:
        shard.with_suffix(".aside").replace(shard)
    wait_for(lambda: upload(admin, "late2", new[2]).status_code == 201)
    assert {name: first_token(user, name) for name in said} == said


def test_a_dead_gate_comes_back(
    server: Server, admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]
) -> None:
    load(admin, "extra0", adapters["extra0"])
    before = first_token(user, "extra0")
    os.kill(gate_pid(server), signal.SIGKILL)
    assert first_token(user, "extra0") == before
    statuses = set()

    def loads_again() -> bool:
        statuses.add(load(admin, "extra1", adapters["extra1"]).status_code)
        return 200 in statuses

    wait_for(loads_again)
    assert statuses <= {200, 503}, "while the gate is away, loading says so and lets nothing in"
