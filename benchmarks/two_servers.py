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
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import httpx
import recording
from crash import FILES, bucket, check_store, kill, start
from soak import Answer, distance, distance_apart, write_contents
from soak import Ledger as Timeline
from tqdm import tqdm

from safelora_vllm.store import content_digest

HERE = Path(__file__).resolve().parent
_CACHE = HERE.parent / ".cache"

CONTENTS, CLIENTS, CHATTERS, NAMES_EACH = 8, 3, 2, 4
OPTIONS = ["--select=number", "--number=30", "--max-loras=2", "--max-cpu-loras=8"]  # as in soak.py
BEHIND_SECONDS = (
    60.0  # until the server that did not make a change has to know it: it judges the upload itself
)
_TOLERANCE = 0.1  # of a log probability, as in soak.py
_AFTER_KILL_SECONDS = 5.0  # for which the other server goes on


@dataclass
class Run:
    """The servers, what clients were told, and what was found."""

    args: argparse.Namespace
    work: Path
    contents: list[dict[str, bytes]]
    servers: dict[int, tuple[Popen[bytes], httpx.Client]] = field(default_factory=dict)
    reference: list[Answer] = field(default_factory=list)
    ledger: Timeline = field(default_factory=Timeline)
    writer: dict[str, int | None] = field(
        default_factory=dict
    )  # the server that answered a name's last change
    behind: float = 0.0  # the longest that the other server needed

    @property
    def faults(self) -> list[str]:
        return self.ledger.faults


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
    with tempfile.TemporaryDirectory() as scratch, bucket():
        work = Path(scratch)
        run = Run(args, work, write_contents(work, args.projectors, CONTENTS))
        try:
            figures = measure(run)
        finally:
            for process, _ in run.servers.values():
                kill(process)
    print(json.dumps(figures, indent=1))
    command = f"two_servers.py --uploads {args.uploads} --rounds {args.rounds} --engine {args.engine}"
    print(
        f"written to {recording.write(f'two_servers_{args.engine}', command, 'default', figures, args.out)}"
    )
    return 1 if run.faults else 0


def measure(run: Run) -> dict[str, object]:
    """Everything, and its figures."""
    begin(run, (0, 1))
    uploads = [f"upload{number}" for number in range(run.args.uploads)]
    while_chatting(run, uploads, lambda: upload_all(run, uploads))
    settle(run, "after the uploads")
    moments = random.Random(0)
    for number in tqdm(range(run.args.rounds), unit="round"):
        victim = number % 2
        names = [f"client{client}-{name}" for client in range(CLIENTS) for name in range(NAMES_EACH)]
        while_chatting(run, [*names, *uploads], lambda: churn(run, victim, moments))  # noqa: B023
        check_store(run.work / f"store{victim}", run.faults, number)
        begin(run, (victim,))
        settle(run, f"round {number}")
    return {
        "engine": run.args.engine,
        "uploads": run.args.uploads,
        "rounds": run.args.rounds,
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


def change(
    run: Run, server: int, name: str, content: int | None, dead: threading.Event | None = None
) -> None:
    """Upload, replace or remove, and note what was acknowledged."""
    _, http = run.servers[server]
    run.writer[name] = None
    before = now(run, name)
    run.ledger.now(name, *before, content)
    what = "removed" if content is None else "uploaded or replaced"
    try:
        if content is None:
            answer = http.delete(f"/v1/adapters/{name}")
            good = answer.status_code in (200, 404)
        else:
            answer = upload(http, name, run.contents[content])
            good = answer.status_code in (200, 201)  # 200: the name has this content
    except httpx.TransportError as error:
        run.ledger.counts["interrupted"] += 1
        if dead is None or not dead.is_set():
            run.faults.append(f"{name} at a server that lives: {error!r}")
        return
    if not good:
        run.faults.append(f"{name}: {answer.status_code} {answer.text:.200}")
        return
    run.ledger.counts[what] += 1
    run.ledger.now(name, content)
    run.writer[name] = server


def now(run: Run, name: str) -> set[int | None]:
    """What a name may have: several contents after an interrupted change."""
    states = run.ledger.states[name]
    return states[-1][1] if states else {None}


def settled(run: Run, name: str, content: int | None) -> None:
    """A name's state is known again, wherever it is asked."""
    run.ledger.now(name, content)


def upload(http: httpx.Client, name: str, files: dict[str, bytes]) -> httpx.Response:
    """An upload that may replace."""
    return http.post(
        "/v1/adapters?replace=true", data={"name": name}, files={file: files[file] for file in FILES}
    )


def chat(http: httpx.Client, name: str) -> tuple[int, Answer]:
    """The status, and the first token's likeliest candidates."""
    body = {"model": name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body |= {"max_tokens": 2, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    answer = http.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        return answer.status_code, {}
    first = answer.json()["choices"][0]["logprobs"]["content"][0]
    return 200, {candidate["token"]: candidate["logprob"] for candidate in first["top_logprobs"]}


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


def ask(run: Run, server: int, name: str) -> None:
    """One chat, whose answer must be one of what the name had meanwhile, at a server that may be behind."""
    begun, known = time.monotonic(), run.writer.get(name) == server
    before = now(run, name)
    status, answer = chat(run.servers[server][1], name)
    late = 0.0 if known else BEHIND_SECONDS
    allowed = before | (run.ledger.between(name, begun - late) if run.ledger.states[name] else set())
    run.ledger.counts[f"chats answered {status}"] += 1
    right = [
        content for content in allowed
        if (status == 404 if content is None else status == 200 and close(run, answer, content))
    ]  # fmt: skip
    if status == 503 and not known:  # it is judging what another server was sent
        return
    if not right:
        run.faults.append(f"{name} at server {server}: {status} {nearest(run, answer)}, expected {allowed}")


def close(run: Run, answer: Answer, content: int) -> bool:
    return distance(answer, run.reference[content]) < _TOLERANCE


def nearest(run: Run, answer: Answer) -> str:
    """The content that says nearly the same, for the message."""
    distances = [distance(answer, one) for one in run.reference]
    return f"content {distances.index(min(distances))} at {min(distances):.3g}" if answer else "no answer"


def settle(run: Run, when: str) -> None:
    """Both servers serve what was acknowledged, and the same; each name is asked at both."""
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
            for server, content in enumerate(two):
                check(run, server, name, content, when)


def check(run: Run, server: int, name: str, content: int | None, when: str) -> None:
    """A chat after everything is settled."""
    status, answer = chat(run.servers[server][1], name)
    run.ledger.counts["chats after a round"] += 1
    right = status == 404 if content is None else status == 200 and close(run, answer, content)
    if not right:
        expected = f"{status} {nearest(run, answer)}, expected {content}"
        run.faults.append(f"{when}: {name} at server {server}: {expected}")


def reports(http: httpx.Client) -> dict[str, str]:
    """Name → digest of what a server serves."""
    with suppress(httpx.ReadTimeout):
        return {one["adapter"]: one["digest"] for one in http.get("/v1/adapters").json()["data"]}
    return {}


if __name__ == "__main__":
    sys.exit(main())
