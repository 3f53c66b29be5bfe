"""Exams by a script, for crash.py: which adapter passes where; and whether what is served has passed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from safelora_vllm.report import Report
from tests.server.fake_engine import FakeEngine
from tests.server.fake_exam import ExaminedEngine

USEFUL, CARELESS, HARMFUL = "useful", "careless", "harmful"
LADDER, LAST, THRESHOLD = "safe-lora:0.35,safe-lora", "all", 0.02
_DROPS = {USEFUL: (0.0, 0.0), CARELESS: (0.5, 0.0), HARMFUL: (1.0, 1.0)}  # nats a token, by rung
_SECONDS = 0.05  # of an answer: an exam takes long enough to be killed in


class Kinds(dict[str, str]):
    """Digest of a content → its kind."""

    @classmethod
    def of(cls, digests: Sequence[str]) -> Kinds:
        """A third of each kind."""
        return cls({digest: (USEFUL, CARELESS, HARMFUL)[at % 3] for at, digest in enumerate(digests)})

    @classmethod
    def read(cls, file: Path) -> Kinds:
        """As `write` wrote it."""
        return cls(json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        """For another process."""
        file.write_text(json.dumps(self))

    def drop(self, digest: str, policy: Mapping[str, Any]) -> float:
        """Nats a token that a content loses by a policy of the ladder."""
        return _DROPS[self[digest]][policy["select"] == LAST]


def examined_engine(engine: FakeEngine, store: Path, kinds: Kinds) -> ExaminedEngine:
    """The tests' engine, which answers as the kinds say."""

    def drop(report: Report) -> float:
        return kinds.drop(report.digest, report.to_dict()["policy"])

    async def before() -> None:
        await asyncio.sleep(_SECONDS)

    return ExaminedEngine(engine.answers, store=store, drop=drop, before=before)


def unexamined(served: Sequence[Mapping[str, Any]], store: Path, kinds: Kinds) -> list[str]:
    """What is served without having passed. Read from the disk, without the code that decides.

    served: reports, as a server lists them.
    """
    passed = [key for file in store.glob("exam/verdicts/*/*.json") if (key := _passed(file, store))]
    copies = [_report(store, key)["report"] for key in passed]
    faults = []
    for report in served:
        digest, policy = report["digest"], report["policy"]
        if kinds.drop(digest, policy) > THRESHOLD:
            faults.append(f"{report['adapter']} serves {kinds[digest]} {digest} by {policy}")
        if not any(copy["digest"] == digest and copy["policy"] == policy for copy in copies):
            faults.append(f"{report['adapter']} serves {digest} by {policy}, which no verdict lets pass")
    return faults


def without_verdict(store: Path) -> set[str]:
    """Keys of published copies that no exam has judged."""
    judged = {file.stem for file in store.glob("exam/verdicts/*/*.json")}
    return {folder.name for folder in store.glob("published/[0-9a-f]*")} - judged


def _passed(verdict: Path, store: Path) -> str | None:
    """The key of a verdict that lets the very bytes of a published copy pass."""
    found, key = json.loads(verdict.read_text()), verdict.stem
    if found["score"]["bound"] <= THRESHOLD and found["files"] == _report(store, key).get("sha256"):
        return key
    return None


def _report(store: Path, key: str) -> dict[str, Any]:
    """Of a published copy; empty where it is gone."""
    try:
        return dict(json.loads((store / "published" / key / "report.json").read_text()))
    except OSError:
        return {}
