"""One tenant's hostile adapters on a running server, and what they do to another tenant on it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from servers import Server

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.corpus import Hostile, Target

OUTCOMES = {
    "served": "as its author made it",
    "projected": "served, every module projected",
    "refused": "an error, and nothing was loaded",
    "failed": "loaded, but later its own requests failed or were answered with other weights",
    "disturbed": "another tenant got an error or another answer than before",
    "hung": "nobody got an answer within 20 s",
    "died": "the engine ended, and with it every tenant's requests",
}
HARM = ("disturbed", "hung", "died")
_SECONDS = 20.0
_PROMPT = "The capital of France is"


@dataclass
class Finding:
    """What one case did. load, use, health: HTTP statuses, 0 where there was no answer."""

    outcome: str
    load: int = 0
    use: int | None = None
    health: int = 200
    reasons: list[str] = field(default_factory=list)


class Attack:
    """One running server, attacked by one tenant and used by another."""

    def __init__(self, kind: str, server: Server, target: Target, neighbour: Path) -> None:
        self.guarded, self.server, self.target = kind == "guarded", server, target
        headers = {"Authorization": f"Bearer {server.key}"}
        url = f"http://127.0.0.1:{server.port}"
        self.http = httpx.Client(base_url=url, headers=headers, timeout=_SECONDS)
        self._post("/v1/load_lora_adapter", {"lora_name": "neighbour", "lora_path": str(neighbour)})
        self.before = self._say("static")
        if self.before[0] != 200:
            raise RuntimeError(f"the other tenant's adapter answers {self.before} on a new server")

    def attempt(self, case: Hostile, folder: Path) -> Finding:
        """Load and use one adapter, and see what the other tenant gets."""
        path = case.write(folder, self.target)
        if case.archive:
            status, answer = self._upload(case, path)
        else:
            status, answer = self._post(
                "/v1/load_lora_adapter", {"lora_name": case.served_as, "lora_path": str(path)}
            )
        found = Finding("refused" if status else "failed", load=status, reasons=_reasons(answer))
        if status in (200, 201):
            self._use(case, path, found)
        self._look_at_others(found)
        return found

    def _use(self, case: Hostile, path: Path, found: Finding) -> None:
        """Use what was loaded, after its eviction too where its folder changes meanwhile; unload it."""
        said = self._say(case.served_as)
        found.use, found.outcome = said[0], "served" if said[0] == 200 else "failed"
        if self.guarded and said[0] == 200:
            report = json.loads(self._get(f"/v1/adapters/{case.served_as}")[1])
            changing = [module for module in report["modules"] if module["relative_norm"]]
            if all(module["decision"] == "projected" for module in changing):
                found.outcome = "projected"
        if case.later is not None:
            case.later(path)
            self._say("static"), self._say("neighbour")  # the pool holds two
            if self._say(case.served_as) != said:
                found.outcome = "failed"
        self._post("/v1/unload_lora_adapter", {"lora_name": case.served_as})

    def _look_at_others(self, found: Finding) -> None:
        said, listed = self._say("static"), self._get("/v1/models")[0]
        if said == self.before and listed == 200:
            return
        found.health = self._get("/health")[0]
        if found.health == 200 and said[0] == 0:
            found.outcome = "hung"
            return
        deadline = time.monotonic() + 10.0  # an engine that ends takes its server with it, a moment later
        while found.health == 200 and time.monotonic() < deadline:
            time.sleep(0.5)
            found.health = self._get("/health")[0]
        found.outcome = "disturbed" if found.health == 200 else "died"

    def _say(self, model: str) -> tuple[int, str]:
        status, answer = self._post(
            "/v1/completions", {"model": model, "prompt": _PROMPT, "max_tokens": 8, "temperature": 0}
        )
        return status, json.loads(answer)["choices"][0]["text"] if status == 200 else ""

    def _upload(self, case: Hostile, path: Path) -> tuple[int, str]:
        files = {"archive": path.read_bytes()}
        return self._answer("POST", "/v1/adapters", data={"name": case.served_as}, files=files)

    def _post(self, path: str, body: Mapping[str, object]) -> tuple[int, str]:
        # json.dumps writes ASCII, also for lone surrogates, which httpx would not send.
        headers = {"Content-Type": "application/json"}
        return self._answer("POST", path, content=json.dumps(body), headers=headers)

    def _get(self, path: str) -> tuple[int, str]:
        return self._answer("GET", path)

    def _answer(self, method: str, path: str, **more: Any) -> tuple[int, str]:
        """Status and text; 0 where nothing was answered in time."""
        try:
            answer = self.http.request(method, path, **more)
        except httpx.HTTPError:
            return 0, ""
        return answer.status_code, answer.text


def _reasons(answer: str) -> list[str]:
    try:
        return list(dict.fromkeys(reason["code"] for reason in json.loads(answer)["error"]["reasons"]))
    except (ValueError, KeyError, TypeError):
        return []
