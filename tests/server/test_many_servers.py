"""Two API server processes on one engine, another server on their store, a crash, and a restart."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server import ADMIN_KEY, Server, guarded, running

from safelora_vllm.projectors.cache import ProjectorCache
from tests.server.conftest import Q_V, UNI, client, say, upload, write_adapter

COUNT = 50
ADAPTERS = {f"adapter-{index}": index for index in range(COUNT)}


@pytest.fixture(scope="module")
def many(projectors: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fifty adapters, each large enough that its answers differ from all others'."""
    root = tmp_path_factory.mktemp("many")
    cache = ProjectorCache(projectors)
    for name, seed in ADAPTERS.items():
        write_adapter(root / name, cache, Q_V, 8, seed=1000 + seed, size=0.6)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own-store")


def command(aligned: Path, projectors: Path, store: Path, *options: str) -> list[str]:
    """One module of 60 is projected, so that answers tell the adapters apart."""
    return guarded(
        aligned, projectors, store, "--method=safe-lora", "--select=number", "--number=1",
        "--max-loras=4", "--max-cpu-loras=64", "--max-lora-rank=16", *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair_of_servers(
    aligned: Path, projectors: Path, own_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Server:  # type: ignore[misc]
    log = tmp_path_factory.mktemp("log") / "pair.log"
    with running(command(aligned, projectors, own_store, "--api-server-count=2"), log) as started:
        yield started


def everywhere(server: Server, path: str, times: int = 24) -> list[httpx.Response]:
    """The same GET over new connections, which the kernel deals out to both API servers."""
    answers = []
    for _ in range(times):
        with client(server, ADMIN_KEY) as http:
            answers.append(http.get(path))
    return answers


def insist(server: Server, name: str, folder: Path, replace: bool = False) -> httpx.Response:
    """Upload over a new connection, coming back when the server says 429."""
    while True:
        with client(server, ADMIN_KEY) as http:
            answer = upload(http, name, folder, replace)
        if answer.status_code != 429:
            return answer
        time.sleep(float(answer.headers["Retry-After"]) * random.random())


def test_fifty_uploads_over_two_servers_while_eight_chat(
    pair_of_servers: Server, many: dict[str, Path]
) -> None:
    server = pair_of_servers
    ready: list[str] = []
    wrong: list[object] = []
    said: dict[str, str] = {}
    finished = threading.Event()
    lock = threading.Lock()

    def chat(seed: int) -> None:
        choice = random.Random(seed)
        while not finished.is_set():
            name = choice.choice(ready) if ready else "aligned"
            try:
                with client(server, ADMIN_KEY) as http:
                    text = say(http, name)
            except httpx.HTTPError as error:
                wrong.append((name, repr(error)))
                continue
            with lock:
                if said.setdefault(name, text) != text:
                    wrong.append((name, text, said[name]))

    def put(name: str) -> None:
        answer = insist(server, name, many[name])
        if answer.status_code != 201:
            wrong.append((name, answer.status_code, answer.text))
        ready.append(name)

    chatters = [threading.Thread(target=chat, args=(seed,), daemon=True) for seed in range(8)]
    for thread in chatters:
        thread.start()
    with ThreadPoolExecutor(COUNT) as pool:
        list(pool.map(put, many))
    time.sleep(5)
    finished.set()
    for thread in chatters:
        thread.join()
    assert not wrong, wrong[:5]
    for answer in everywhere(server, "/v1/models"):
        assert {card["id"] for card in answer.json()["data"]} == {"aligned", *many}
    with client(server, ADMIN_KEY) as http:
        said |= {name: say(http, name) for name in many if name not in said}
    distinct = {said[name] for name in many}
    assert len(distinct) > 0.9 * COUNT, "the answers do not tell the adapters apart"


def test_swap_and_delete_are_in_force_everywhere_at_once(
    pair_of_servers: Server, many: dict[str, Path]
) -> None:
    """After a swap's 201, no server answers from the old version, prefix caching on; no request fails."""
    server = pair_of_servers
    first, second = many["adapter-1"], many["adapter-2"]
    with client(server, ADMIN_KEY) as http:
        assert upload(http, "swapped", first, replace=True).status_code == 201
        texts = {1: say(http, "swapped")}
        assert upload(http, "swapped", second, replace=True).status_code == 201
        texts[2] = say(http, "swapped")
    assert texts[1] != texts[2]
    failures: list[object] = []
    checked = 0
    finished = threading.Event()
    state = {"now": 2, "changing": False}

    def ask() -> None:
        nonlocal checked
        while not finished.is_set():
            before = dict(state)
            try:
                with client(server, ADMIN_KEY) as http:
                    text = say(http, "swapped")
            except httpx.HTTPError as error:
                failures.append(repr(error))
                continue
            if text not in texts.values():
                failures.append(("neither version", text))
            elif not before["changing"] and not state["changing"] and state["now"] == before["now"]:
                checked += 1
                if text != texts[int(state["now"])]:
                    failures.append(("old version", text, state))

    askers = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in askers:
        thread.start()
    for number in range(8):
        target = 1 + number % 2
        state["changing"] = True
        answer = insist(server, "swapped", first if target == 1 else second, replace=True)
        state["now"], state["changing"] = target, False
        if answer.status_code != 201:
            failures.append(answer.text)
        before, deadline = checked, time.monotonic() + 60
        while checked < before + 2 and not failures and time.monotonic() < deadline:
            time.sleep(0.05)  # until answers that lie between two swaps were looked at
    finished.set()
    for thread in askers:
        thread.join()
    assert not failures, failures[:5]
    assert checked >= 16
    with client(server, ADMIN_KEY) as http:
        assert http.delete("/v1/adapters/swapped").status_code == 200
    for answer in everywhere(server, "/v1/adapters/swapped"):
        assert answer.status_code == 404
    for answer in everywhere(server, "/metrics", 6):
        assert 'adapter="swapped"' not in answer.text


def test_a_second_server_on_the_same_store(
    pair_of_servers: Server, aligned: Path, projectors: Path, own_store: Path, many: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Another host on a shared folder: it has all names, new ones within a second."""
    with (
        running(command(aligned, projectors, own_store, UNI), tmp_path / "replica.log") as replica,
        client(pair_of_servers, ADMIN_KEY) as here,
        client(replica, ADMIN_KEY) as there,
    ):
        assert {c["id"] for c in there.get("/v1/models").json()["data"]} >= {"aligned", "adapter-7"}
        assert say(there, "adapter-7") == say(here, "adapter-7")
        assert upload(here, "shared-name", many["adapter-3"]).status_code == 201
        time.sleep(1)
        assert say(there, "shared-name") == say(here, "adapter-3")
        assert there.delete("/v1/adapters/shared-name").status_code == 200
        assert here.get("/v1/adapters/shared-name").status_code == 404


def test_restart_after_a_kill_serves_every_name(
    pair_of_servers: Server, aligned: Path, projectors: Path, own_store: Path, many: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """kill -9 while uploads, replacements and removals run; the next server has what was acknowledged.

    The last test of the pair, with all that the others left in its store.
    """
    server, store, unsure = pair_of_servers, own_store, set()
    with client(server, ADMIN_KEY) as http:
        for name in ("adapter-0", "adapter-1"):
            assert upload(http, name, many[name], replace=True).status_code in (200, 201)
        done = {report["adapter"]: report["digest"] for report in http.get("/v1/adapters").json()["data"]}
        said = {name: say(http, name) for name in ("adapter-0", "adapter-1")}

    def churn(seed: int) -> None:
        choice = random.Random(seed)
        with client(server, ADMIN_KEY) as own:
            for step in range(1000):
                name = f"churn-{seed}-{step % 3}"
                unsure.add(name)
                try:
                    if choice.random() < 0.3:
                        own.delete(f"/v1/adapters/{name}")
                        done.pop(name, None)
                    else:
                        answer = upload(own, name, many[f"adapter-{choice.randrange(COUNT)}"], True)
                        if answer.status_code in (200, 201):
                            done[name] = answer.json()["digest"]
                except httpx.HTTPError:
                    return
                unsure.discard(name)

    threads = [threading.Thread(target=churn, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(4)
    os.killpg(server.process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    verify = [str(Path(sys.executable).with_name("safelora-vllm")), "store", "verify"]
    checked = subprocess.run([*verify, f"--adapter-store={store}"], capture_output=True, text=True)
    assert f"{store}/raw" not in checked.stdout and f"{store}/names" not in checked.stdout, checked.stdout
    before = {path.name: path.stat().st_mtime_ns for path in (store / "published").iterdir()}
    line = command(aligned, projectors, store, UNI)
    with running(line, tmp_path / "second.log") as after_it, client(after_it, ADMIN_KEY) as http:
        served = {report["adapter"]: report["digest"] for report in http.get("/v1/adapters").json()["data"]}
        for name, digest in done.items():
            assert name in unsure or served.get(name) == digest, name
        assert set(served) - unsure == set(done) - unsure
        assert {name: say(http, name) for name in said} == said
        after = {path.name: path.stat().st_mtime_ns for path in (store / "published").iterdir()}
        assert before == after, "nothing was projected again"
