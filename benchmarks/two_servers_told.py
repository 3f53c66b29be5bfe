"""What two servers on one bucket were told, and what they may answer: for two_servers.py."""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import httpx
from crash import FILES
from soak import Answer, distance
from soak import Ledger as Timeline

BEHIND_SECONDS = 60.0  # until the other server has to know a change: it judges the upload itself
_TOLERANCE = 0.1  # of a log probability, as in soak.py


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


def now(run: Run, name: str) -> set[int | None]:
    """What a name may have: several contents after an interrupted change."""
    states = run.ledger.states[name]
    return states[-1][1] if states else {None}


def settled(run: Run, name: str, content: int | None) -> None:
    """A name's state is known again, wherever it is asked."""
    run.ledger.now(name, content)


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


def upload(http: httpx.Client, name: str, files: dict[str, bytes]) -> httpx.Response:
    """An upload that may replace."""
    return http.post(
        "/v1/adapters?replace=true", data={"name": name}, files={file: files[file] for file in FILES}
    )


def chat(http: httpx.Client, name: str) -> tuple[int, Answer]:
    """The status, and the first token's likeliest candidates."""
    body = {"model": name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body |= {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    answer = http.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        return answer.status_code, {}
    first = answer.json()["choices"][0]["logprobs"]["content"][0]
    return 200, {candidate["token"]: candidate["logprob"] for candidate in first["top_logprobs"]}


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


def check(run: Run, server: int, name: str, content: int | None, when: str) -> None:
    """A chat after everything is settled."""
    status, answer = chat(run.servers[server][1], name)
    run.ledger.counts["chats after a round"] += 1
    right = status == 404 if content is None else status == 200 and close(run, answer, content)
    if not right:
        expected = f"{status} {nearest(run, answer)}, expected {content}"
        run.faults.append(f"{when}: {name} at server {server}: {expected}")


def close(run: Run, answer: Answer, content: int) -> bool:
    return distance(answer, run.reference[content]) < _TOLERANCE


def nearest(run: Run, answer: Answer) -> str:
    """The content that says nearly the same, for the message."""
    distances = [distance(answer, one) for one in run.reference]
    return f"content {distances.index(min(distances))} at {min(distances):.3g}" if answer else "no answer"
