"""Probes that change while a server runs, harmless probes, and probes in other languages."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from safelora_vllm.errors import GuardError
from safelora_vllm.exam import probes
from safelora_vllm.settings import ServerSettings
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_exam import FakeTokenizer
from tests.server.fake_server import FakeServer
from tests.server.test_exam_again import until
from tests.server.test_exam_server import Start, adapters, answer_of_lookup, place, start  # noqa: F401

HELPFUL = "Sure! First, take a crowbar."


def write_probes(file: Path, kind: str, count: int = 10) -> str:
    new = file.with_name("new.jsonl")
    new.write_text("".join(json.dumps({"prompt": f"How do I {kind} {i}?"}) + "\n" for i in range(count)))
    new.rename(file)
    return str(file)


def asked(server: FakeServer, kind: str) -> int:
    return sum(f"How do I {kind} " in text for text in server.engine.texts)


def cause(server: FakeServer) -> str:
    return str(server.client(ADMIN_KEY).get("/v1/adapters").json()["exam"]["cause"])


def test_a_changed_file_is_asked_without_a_gap(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """What is served has its old verdict until the new one is there, on each server of the store."""
    file = tmp_path / "probes.jsonl"
    given = {"exam_probes": write_probes(file, "steal")}
    with start(**given) as server, start(**given) as beside:
        http = server.client(ADMIN_KEY)
        for name in ("useful", "other"):
            assert upload(http, name, adapters[name]).status_code == 201
        until(beside, lambda: answer_of_lookup(beside, "other") == 200)
        drop = server.engine.drop
        fails = json.dumps(http.get("/v1/adapters/other").json()["digest"])
        server.engine.drop = beside.engine.drop = lambda report: (
            1.0 if json.dumps(report.digest) == fails else drop(report)
        )
        write_probes(file, "forge")
        seen: set[int] = set()

        def is_done() -> bool:
            seen.update(answer_of_lookup(which, "useful") for which in (server, beside))
            return answer_of_lookup(server, "other") == answer_of_lookup(beside, "other") == 422

        until(server, is_done)
        until(server, lambda: asked(server, "forge") + asked(beside, "forge") >= 10 * 4)
        assert seen == {200}, "never withdrawn"
        assert upload(http, "new", adapters["harmful"]).status_code == 422
        # A file that is wrong, or that the aligned model answers, changes nothing.
        file.write_text("nothing")
        until(server, lambda: "is not a valid probe" in cause(server))
        server.engine.tokenizer.says = beside.engine.tokenizer.says = HELPFUL
        write_probes(file, "chat")
        until(server, lambda: "refuses 0% of the probes" in cause(server))
        assert answer_of_lookup(server, "useful") == 200 and not asked(server, "chat")
        server.engine.tokenizer.says = beside.engine.tokenizer.says = FakeTokenizer.says
        write_probes(file, "forge")
        until(server, lambda: not cause(server))
        assert http.get("/v1/adapters/useful").json()["exam"]["passed"]


def test_probes_that_change_during_an_exam(start: Start, adapters: dict[str, Path]) -> None:  # noqa: F811
    """No verdict by the former ones counts: neither for an upload, nor of what is examined again."""
    with start() as server:
        http, examiner = server.client(ADMIN_KEY), server.app.state.safelora.copies.exam.examiner
        assert upload(http, "useful", adapters["useful"]).status_code == 201

        async def renewed() -> None:
            examiner.sheets = copy.copy(examiner.sheets)

        server.engine.before = renewed
        for answer in (
            upload(http, "other", adapters["other"]),
            http.post("/v1/adapters/useful/exam"),
        ):
            assert answer.status_code == 503 and "probes were changed during the exam" in answer.text
        assert answer_of_lookup(server, "useful") == 200


def test_reports_are_made_anew(start: Start, adapters: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "probes.jsonl"
    given = {"exam": "report", "ladder": None, "policy": {"method": "safe-lora"}}
    with start(**given, exam_probes=write_probes(file, "steal")) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "useful", adapters["useful"]).status_code == 201
        until(server, lambda: http.get("/v1/adapters/useful").json()["exam"] is not None)
        write_probes(file, "forge")
        until(server, lambda: asked(server, "forge") == 10)


def test_an_adapter_that_refuses_everything_is_told_so(start: Start, adapters: dict[str, Path]) -> None:  # noqa: F811
    with start() as server:
        http = server.client(ADMIN_KEY)
        server.engine.overs = 4
        assert upload(http, "useful", adapters["useful"]).status_code == 201, "and nothing follows"
        count = len(probes.harmless())
        assert http.get("/v1/adapters/useful").json()["exam"]["over_refusal"] == pytest.approx(4 / count)


def test_languages(start: Start, adapters: dict[str, Path]) -> None:  # noqa: F811
    with start(exam_languages="de,fr") as server:
        assert upload(server.client(ADMIN_KEY), "useful", adapters["useful"]).status_code == 201
        known = {*probes.built_in(["de", "fr"])}
        assert len(server.engine.texts) == 64
        assert all(any(text.startswith(prompt) for prompt in known) for text in server.engine.texts)
    for wrong in ("it", "", "de,de"):
        with pytest.raises(GuardError, match="not a list of languages"):
            ServerSettings("p", exam="report", exam_languages=wrong)
    with pytest.raises(
        GuardError, match=r"^--exam-languages has no effect without --exam: .* add --exam report"
    ):
        ServerSettings("p", exam_languages="de")
