"""Two servers on one bucket: uploads beside chats, then kill -9 of one while the other goes on.

    python benchmarks/two_servers.py [--uploads 50] [--rounds 6] [--engine vllm|none]

Both servers have a store of their own and share a bucket of a local S3 (moto). First the uploads go to both
while clients chat. In each round, clients change names at both servers and chat. One server and all its
processes are killed after a random time, the other one goes on, and the killed one is started again. Each
answer to a chat is compared with what the name's contents at that moment say, by the acknowledged changes.
After each round both servers must serve the same: every acknowledged upload, and no name of which the removal
was acknowledged. With ``--engine none`` there is no engine, and so there are no chats.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import recording
from crash import FILES, bucket, check_store, kill, start
from soak import distance_apart, write_contents
from tqdm import tqdm
from two_servers_told import BEHIND_SECONDS, Run, ask, change, chat, check, now, settled, upload

from safelora_vllm.adapters.read import content_digest

HERE = Path(__file__).resolve().parent
_CACHE = HERE.parent / ".cache"

CONTENTS, CLIENTS, CHATTERS, NAMES_EACH = 8, 3, 2, 4
OPTIONS = ["--select=number", "--number=30", "--max-loras=2", "--max-cpu-loras=8"]  # as in soak.py
_AFTER_KILL_SECONDS = 5.0  # for which the other server goes on


def main() -> int:
    """Upload, kill, compare, write the JSON; exit code 1 if anything was lost or answered wrongly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--uploads", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--engine", choices=("none", "vllm"), default="vllm")
    parser.add_argument("--aligned", type=Path, default=_CACHE / "models" / "aligned")
    parser.add_argument("--projectors", type=Path, default=_CACHE / "projectors")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    args.mirror = True
    command = f"two_servers.py --uploads {args.uploads} --rounds {args.rounds} --engine {args.engine}"

    def write(found: dict[str, object]) -> Path:
        return recording.write(f"two_servers_{args.engine}", command, "default", found, args.out)

    with tempfile.TemporaryDirectory() as scratch, bucket():
        work = Path(scratch)
        run = Run(args, work, write_contents(work, args.projectors, CONTENTS))
        try:
            found = measure(run, write)
        finally:
            for process, _ in run.servers.values():
                kill(process)
    print(json.dumps(found, indent=1))
    print(f"written to {write(found)}")
    return 1 if run.faults else 0


def measure(run: Run, write: Callable[[dict[str, object]], object]) -> dict[str, object]:
    """Everything, and its figures, which are written after each part."""
    begin(run, (0, 1))
    uploads = [f"upload{number}" for number in range(run.args.uploads)]
    while_chatting(run, uploads, lambda: upload_all(run, uploads))
    settle(run, "after the uploads")
    write(figures(run, 0))
    moments = random.Random(0)
    for number in tqdm(range(run.args.rounds), unit="round"):
        victim = number % 2
        names = [f"client{client}-{name}" for client in range(CLIENTS) for name in range(NAMES_EACH)]
        while_chatting(run, [*names, *uploads], functools.partial(churn, run, victim, moments))
        check_store(run.work / f"store{victim}", run.faults, number)
        begin(run, (victim,))
        some = {*names, *moments.sample(uploads, min(8, len(uploads)))}
        settle(run, f"round {number}", some.__contains__)
        write(figures(run, number + 1))
    return figures(run, run.args.rounds)


def figures(run: Run, rounds: int) -> dict[str, object]:
    """What is known after some rounds."""
    return {
        "engine": run.args.engine,
        "uploads": run.args.uploads,
        "rounds": rounds,
        "counts": dict(run.ledger.counts),
        "least_distance": distance_apart(run.reference) if run.reference else None,
        "seconds_behind": round(run.behind, 1),
        "faults": run.faults,
    }


def begin(run: Run, numbers: Iterable[int]) -> None:
    """Start servers side by side; the first start also asks each content alone."""
    options = OPTIONS if run.args.engine == "vllm" else []

    def one(number: int) -> None:
        run.servers[number] = start(run.args, run.work, run.work / f"store{number}", options, 900)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, numbers))
    if run.reference or run.args.engine == "none":
        return
    _, http = run.servers[0]
    for number in range(CONTENTS):
        upload(http, f"reference{number}", run.contents[number]).raise_for_status()
        settled(run, f"reference{number}", number)
        run.reference.append(chat(http, f"reference{number}")[1])


def while_chatting(run: Run, names: list[str], work: Callable[[], None]) -> None:
    """Do ``work`` while clients chat with both servers."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=chatter, args=(run, server, names, stop, seed))
        for server in run.servers
        for seed in range(CHATTERS * (run.args.engine == "vllm"))
    ]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def upload_all(run: Run, names: list[str]) -> None:
    """Each name once, at the two servers in turn, four at a time."""

    def one(number: int) -> None:
        change(run, number % 2, names[number], number % CONTENTS)

    with ThreadPoolExecutor(2 * len(run.servers)) as pool:
        list(pool.map(one, range(len(names))))


def churn(run: Run, victim: int, moments: random.Random) -> None:
    """Clients change names at both servers until one is killed, and go on for a while at the other one."""
    stop, dead = threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=client, args=(run, victim, index, stop, dead, moments.random()))
        for index in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3 + 5.7 * moments.random())
    dead.set()
    kill(run.servers[victim][0])
    time.sleep(_AFTER_KILL_SECONDS)
    stop.set()
    for thread in threads:
        thread.join()


def client(
    run: Run, victim: int, index: int, stop: threading.Event, dead: threading.Event, seed: float
) -> None:
    """One client with names of its own, so that it knows what each should serve."""
    choice = random.Random(seed)
    while not stop.is_set():
        server = choice.randrange(2)
        name = f"client{index}-{choice.randrange(NAMES_EACH)}"
        if len(now(run, name)) > 1 or (dead.is_set() and server == victim):
            time.sleep(0.05)  # an interrupted change of this name is settled after the restart
            continue
        content = None if choice.random() < 0.25 else choice.randrange(CONTENTS)
        change(run, server, name, content, dead if server == victim else None)


def chatter(run: Run, server: int, names: list[str], stop: threading.Event, seed: int) -> None:
    """Asks random names of one server and compares."""
    choice, process = random.Random(seed), run.servers[server][0]
    while not stop.is_set():
        try:
            ask(run, server, choice.choice(names))
        except httpx.TransportError as error:
            time.sleep(0.2)  # the death of a killed process shows a little later
            if process.poll() is not None:
                return
            run.faults.append(f"a chat at a server that lives: {error!r}")


def settle(run: Run, when: str, asked: Callable[[str], bool] = lambda _: True) -> None:
    """Both servers serve what was acknowledged, and the same; names that are ``asked`` answer so."""
    begun = time.monotonic()
    digests = [content_digest(*(files[file] for file in FILES)) for files in run.contents]
    content_of = {digest: number for number, digest in enumerate(digests)}
    while True:
        served = [reports(http) for _, http in run.servers.values()]
        names = sorted({*run.ledger.states, *served[0], *served[1]})
        found = {name: [content_of.get(one.get(name, "")) for one in served] for name in names}
        wrong = {n: two for n, two in found.items() if two[0] != two[1] or two[0] not in now(run, n)}
        if not wrong or time.monotonic() - begun > BEHIND_SECONDS:
            break
        time.sleep(0.2)
    run.behind = max(run.behind, time.monotonic() - begun)
    for name, two in wrong.items():
        run.faults.append(f"{when}: {name}: servers have {two}, expected one of {now(run, name)}")
    for name, two in found.items():
        settled(run, name, two[0])
        run.writer.pop(name, None)
    if run.args.engine == "vllm":
        for name, two in found.items():
            for server, content in enumerate(two if asked(name) else []):
                check(run, server, name, content, when)


def reports(http: httpx.Client) -> dict[str, str]:
    """Name → digest of what a server serves."""
    with suppress(httpx.ReadTimeout):
        return {one["adapter"]: one["digest"] for one in http.get("/v1/adapters").json()["data"]}
    return {}


if __name__ == "__main__":
    sys.exit(main())
