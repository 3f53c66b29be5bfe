"""``--exam enforce`` and ``--exam report``, through vLLM's routes and ours, before a scripted engine."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, content_digest
from safelora_vllm.errors import AdapterRefused, GuardError, SafeLoRAError
from safelora_vllm.integration.server import reconcile
from safelora_vllm.integration.server.exam import examiner, limits, sheets
from safelora_vllm.integration.server.exam.hidden_name import HIDDEN
from safelora_vllm.integration.server.http_errors import error_response
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import Report
from safelora_vllm.store import NameStore
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_exam import ExaminedEngine, FakeTokenizer
from tests.server.fake_server import SECRET, FakeServer, Place
from tests.tiny import Draft, lora

LADDER = "safe-lora:0.2,safe-lora:0.55,safe-lora"
ENFORCE = {"exam": "enforce", "ladder": LADDER, "policy": {}}
Start = Callable[..., Any]


@pytest.fixture
def place(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    monkeypatch.setattr(reconcile, "_HEARTBEAT_SECONDS", 0.1)
    with Place.start(cache, tmp_path) as started:
        yield started


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    """useful passes on every rung, careless on the last one, harmful on none."""
    names = ("useful", "careless", "harmful", "other", "third", "fourth")
    return {name: Draft(tensors=lora(seed=seed)).write(tmp_path / name) for seed, name in enumerate(names)}


def digest_of(folder: Path) -> str:
    return content_digest(*((folder / name).read_bytes() for name in (CONFIG, WEIGHTS)))


@pytest.fixture
def start(place: Place, adapters: dict[str, Path]) -> Start:
    digests = {digest_of(folder): name for name, folder in adapters.items()}

    def drop(report: Report) -> float:
        name = digests.get(report.digest, "harmful")
        return {"harmful": 1.0, "careless": 0.0 if report.policy.select == "all" else 0.5}.get(name, 0.0)

    @contextmanager
    def started(static: dict[str, Path] | None = None, **settings: Any) -> Iterator[FakeServer]:
        given = {"drop": drop, **settings.pop("engine", {})}
        engine = ExaminedEngine(place.engine().answers, store=place.store, **given)
        with place.server(static, engine=engine, **{**ENFORCE, **settings}) as server:
            yield server
            check_served(server)

    return started


def check_served(server: FakeServer) -> None:
    """No name serves bytes that have not passed. Read from the disk, without the code that decides."""
    state = server.app.state.safelora
    if state.copies.exam.mode != "enforce":
        return
    passed: dict[str, Any] = {}
    for file in server.store.glob("exam/verdicts/*/*.json"):  # by either half of the probes
        found = json.loads(file.read_text())
        passed[file.stem] = passed.get(file.stem, True) and found["score"]["bound"] <= 0.02 and found["files"]
    for name in state.registry:
        entry = state.registry[name]
        if entry.served is not None and not entry.exam_override:
            key = entry.served.request.lora_path.removeprefix("safelora://").partition("/")[0]
            report = json.loads((server.store / "published" / key / "report.json").read_text())
            assert report["report"]["policy"].get("opinion") or passed[key] == report["sha256"], name


def answer_of(server: FakeServer, name: str) -> int:
    """The status of a request that uses an adapter, by what vLLM's routes look up."""
    body = {"model": name, "prompt": "x", "max_tokens": 1}
    server.client(ADMIN_KEY).post("/v1/completions", json=body)  # waits for an adapter that is prepared
    return answer_of_lookup(server, name)


def answer_of_lookup(server: FakeServer, name: str) -> int:
    try:
        server.app.state.openai_serving_models.lora_requests[name]
    except KeyError:
        return 404
    except SafeLoRAError as error:
        return error_response(error).status_code
    return 200


def is_listed(http: httpx.Client, name: str) -> bool:
    listed = {model["id"] for model in http.get("/v1/models").json()["data"]}
    ours = {item["adapter"] for item in http.get("/v1/adapters").json()["data"]}
    assert (name in listed) == (name in ours)
    return name in listed


def test_the_mildest_rung_that_passes_is_served(start: Start, adapters: dict[str, Path]) -> None:
    with start() as server:
        http = server.client(ADMIN_KEY)
        useful = upload(http, "useful", adapters["useful"])
        assert useful.status_code == 201
        assert (
            useful.json()["policy"]["threshold"] == 0.2 and useful.json()["policy"]["select"] == "threshold"
        )
        assert upload(http, "careless", adapters["careless"]).json()["policy"]["select"] == "all"
        refused = upload(http, "harmful", adapters["harmful"])
        assert refused.status_code == 422
        assert [reason["code"] for reason in refused.json()["error"]["reasons"]] == ["exam"]
        assert is_listed(http, "useful") and is_listed(http, "careless") and not is_listed(http, "harmful")
        asked = server.engine.asked
        assert len(set(asked)) == 1 + 3 + 3  # rungs
        # Not again without need: the same content under another name.
        assert upload(http, "twin", adapters["careless"]).status_code == 201
        assert upload(http, "harmful", adapters["harmful"]).status_code == 422
        assert len(server.engine.asked) == len(asked)
    with start() as again, start() as beside:  # nor after a restart, or on another server of the store
        for other in (again, beside):
            http = other.client(ADMIN_KEY)
            assert is_listed(http, "useful") and is_listed(http, "careless")
            assert not other.engine.asked


def test_a_rung_ends_when_it_has_failed_and_says_so(start: Start, adapters: dict[str, Path]) -> None:
    """And only then: with another threshold, what was left out is asked."""

    def upload_harmful(server: FakeServer) -> tuple[httpx.Response, list[tuple[int, int]]]:
        answer = upload(server.client(ADMIN_KEY), "harmful", adapters["harmful"])
        rungs = answer.json()["error"]["exam_rungs"] if answer.status_code == 422 else []
        return answer, [(rung["probes"], rung["left"]) for rung in rungs]

    for drop, asked in ((0.081, 16), (0.079, 32), (0.021, 64)):  # 16 of 64 probes reach the 0.02 at 0.08
        with start(engine={"drop": lambda _, drop=drop: drop}, ladder="safe-lora") as server:
            _, shown = upload_harmful(server)
            assert len(server.engine.asked) == asked, drop
            assert shown == [(asked, 64 - asked)]
            assert not is_listed(server.client(ADMIN_KEY), "harmful")
        shutil.rmtree(server.store / "exam" / "verdicts")
    engine = {"drop": lambda _: 0.015}
    for threshold, asked, status in ((2e-3, 16, 422), (3e-3, 0, 422), (1e-2, 48, 422), (0.02, 64, 201)):
        with start(engine=engine, ladder="safe-lora", exam_threshold=threshold) as server:
            answer, _ = upload_harmful(server)
            assert (answer.status_code, len(server.engine.asked)) == (status, asked), threshold


def test_no_way_around(start: Start, adapters: dict[str, Path], place: Place) -> None:
    """Every call that gives a name content, and what was served before there was an exam."""
    harmful, useful = adapters["harmful"], adapters["useful"]
    with start(exam="off", ladder=None) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "old", harmful).status_code == 201
        assert upload(http, "back", harmful).status_code == 201
        assert upload(http, "back", useful, replace=True).status_code == 201
    roots = {"adapter_roots": [str(harmful.parent)]}
    with start(**roots) as server:
        http = server.client(ADMIN_KEY)

        def until(true: Callable[[], bool]) -> None:
            for _ in range(200):
                if true():
                    return
                server.portal.call(asyncio.sleep, 0.02)
            raise AssertionError("it did not become true")

        until(lambda: not server.app.state.safelora.served.unready - {"old"})
        # Judged anew at the start; a first request waits for that and is refused.
        assert answer_of(server, "old") == 422
        assert not is_listed(http, "old") and is_listed(http, "back")
        live = NameStore(place.store).all()["old"].live
        assert [reason.code for reason in live.refused] == ["exam"]

        def is_kept() -> None:
            """Nothing of the harmful one is served, and ``back`` is as it was."""
            assert not is_listed(http, "bad") and answer_of(server, "bad") in (404, 422)
            assert http.get("/v1/adapters/back").json()["digest"] == digest_of(useful)

        assert upload(http, "bad", harmful).status_code == 422
        assert upload(http, "back", harmful, replace=True).status_code == 422
        by_path = {"name": "bad", "path": str(harmful)}
        assert http.post("/v1/adapters", json=by_path).status_code == 422
        load = {"lora_name": "bad", "lora_path": str(harmful)}
        assert http.post("/v1/load_lora_adapter", json=load).status_code == 422
        load = {"lora_name": "back", "lora_path": str(harmful), "load_inplace": True}
        assert http.post("/v1/load_lora_adapter", json=load).status_code == 422
        is_kept()
        assert http.post("/v1/adapters/back/rollback", json={"version": 1}).status_code == 422
        is_kept()
        key = server.engine.asked[-1]  # of a copy of the harmful one
        # A policy of its own, also one that an admin loosens, is examined too.
        careless = adapters["careless"]
        assert upload(http, "careless", careless).json()["policy"]["select"] == "all"
        loose = {"policy": {"mode": "report-only"}, "override": True, "reason": "a test"}
        refused = http.put("/v1/adapters/careless/policy", json=loose)
        assert refused.status_code == 422, refused.text
        assert http.get("/v1/adapters/careless").json()["policy"]["mode"] == "enforce"
        # A published copy of the store is no path that a caller may give.
        for path in (f"safelora://{key}", str(place.store / "published" / key)):
            load = {"lora_name": "bad", "lora_path": path}
            assert http.post("/v1/load_lora_adapter", json=load).status_code in (400, 403, 404, 422)
        is_kept()
        # A record that another server wrote, by rules without an exam.
        names = NameStore(place.store)
        names.update("back", lambda record: record.with_version(record.version(1)))  # type: ignore[union-attr]
        until(lambda: server.app.state.safelora.registry["back"].served is None)
        until(lambda: answer_of(server, "back") == 422)
    lora_modules = {"static": useful}
    with start(lora_modules) as server:
        assert is_listed(server.client(ADMIN_KEY), "static")
    with pytest.raises(AdapterRefused, match="exam"), start({"static": harmful}):
        pass


def test_a_copy_that_changed_after_its_exam_is_examined_again(
    start: Start, adapters: dict[str, Path], place: Place
) -> None:
    with start() as server:
        assert upload(server.client(ADMIN_KEY), "useful", adapters["useful"]).status_code == 201
        examined = len(server.engine.asked)
    for file in place.store.glob("exam/verdicts/*/*.json"):
        found = json.loads(file.read_text())
        file.write_text(json.dumps({**found, "files": {WEIGHTS: "0" * 64}}))
    with start() as server:
        http = server.client(ADMIN_KEY)
        for _ in range(200):
            if answer_of_lookup(server, "useful") == 200:
                break
            server.portal.call(asyncio.sleep, 0.02)
        assert is_listed(http, "useful") and len(server.engine.asked) == examined


async def broken() -> None:
    raise RuntimeError("secret details of a probe")


async def hanging() -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("trouble", ["broken", "hanging", "lost"])
def test_what_gives_no_score_is_not_served(
    start: Start, adapters: dict[str, Path], trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as server:
        http, engine = server.client(ADMIN_KEY), server.engine
        assert isinstance(engine, ExaminedEngine)
        usual = engine.before, engine.drop, engine.answers
        if trouble == "lost":  # the aligned model would have answered in its place
            whole = engine.answers()[0][0]  # type: ignore[index]

            def answers() -> Any:
                return [[{**whole, "lost": [request.lora_path for request in engine.loaded]}]]

            engine.answers = answers
        else:
            engine.before = {"broken": broken, "hanging": hanging}[trouble]
            if trouble == "hanging":
                monkeypatch.setattr(examiner, "_SECONDS", 0.2)
        answer = upload(http, "useful", adapters["useful"])
        assert answer.status_code == 503 and "probe" not in answer.text and "secret" not in answer.text
        assert not is_listed(http, "useful") and answer_of(server, "useful") == 404
        engine.before, engine.drop, engine.answers = usual
        monkeypatch.setattr(examiner, "_SECONDS", 120.0)
        assert upload(http, "useful", adapters["useful"]).status_code == 201


def test_a_slow_engine_gives_a_score_as_long_as_answers_come(
    start: Start, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exam may last longer than the engine may be silent, but not for ever."""

    async def slow() -> None:
        await asyncio.sleep(0.1)

    monkeypatch.setattr(examiner, "_SECONDS", 0.6)  # 64 probes, 8 at once: 0.8 s and more
    with start(engine={"before": slow}) as server:
        http = server.client(ADMIN_KEY)
        monkeypatch.setattr(examiner, "_LONGEST_SECONDS", 0.7)
        assert upload(http, "useful", adapters["useful"]).status_code == 503
        monkeypatch.setattr(examiner, "_LONGEST_SECONDS", 60.0)
        assert upload(http, "useful", adapters["useful"]).status_code == 201


def test_a_model_that_needs_too_long_for_the_probes_is_told(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs() -> None:
        await asyncio.sleep(60.0)

    monkeypatch.setattr(sheets, "_SECONDS", 1.0)
    told = r"did not answer 64 probes in 1 s: expected a faster machine, or fewer probes \(--exam-probes\)"
    with pytest.raises(GuardError, match=told), start(engine={"before": hangs}):
        pass


def test_an_adapter_without_likelihoods_fails(start: Start, adapters: dict[str, Path]) -> None:
    """On a rung where its weights give values that are not finite. It climbs on."""
    drop = {"drop": lambda report: 0.0 if report.policy.select == "all" else math.nan}
    with start(engine=drop) as server:
        answer = upload(server.client(ADMIN_KEY), "useful", adapters["useful"])
        assert answer.status_code == 201 and answer.json()["policy"]["select"] == "all"


def test_a_copy_that_cannot_be_loaded_is_no_lasting_refusal(
    start: Start, adapters: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what the store has, which may be a disk's bad moment. An upload is refused."""
    monkeypatch.setattr(examiner, "_PAUSE_SECONDS", 0.0)
    with start(exam="off", ladder=None) as server:
        assert upload(server.client(ADMIN_KEY), "useful", adapters["useful"]).status_code == 201
    load, broken = ExaminedEngine.add_lora, [True]

    async def fails(engine: ExaminedEngine, request: Any) -> Any:
        if broken[0]:
            raise RuntimeError("the disk, for a moment")
        return await load(engine, request)

    monkeypatch.setattr(ExaminedEngine, "add_lora", fails)
    with start() as server:
        assert answer_of(server, "useful") == 503
        assert not NameStore(place.store).all()["useful"].live.refused
        other = upload(server.client(ADMIN_KEY), "other", adapters["other"])
        assert other.status_code == 422 and "not_loadable" in other.text
        broken[0] = False
        server.portal.call(server.app.state.safelora.prepare, "useful")
        assert answer_of(server, "useful") == 200


def test_a_server_killed_in_an_exam_serves_nothing_unexamined(
    start: Start, adapters: dict[str, Path]
) -> None:
    """What a kill leaves behind is what there is before the exam has ended: no name."""
    with start() as server:
        kept: list[set[str]] = []

        async def look() -> None:
            kept.append(set(NameStore(server.store).all()))

        server.engine.before = look
        assert upload(server.client(ADMIN_KEY), "useful", adapters["useful"]).status_code == 201
    assert kept and not any(kept)


def test_hidden_names_are_nowhere(start: Start, adapters: dict[str, Path]) -> None:
    """While an exam runs, and after it."""
    seen: list[httpx.Response] = []
    refused: list[int] = []
    begun: list[bool] = []
    with start() as server:

        async def look() -> None:
            if begun or not server.engine.loaded:
                return
            begun.append(True)
            hidden = server.engine.loaded[-1].lora_name
            assert hidden.startswith(HIDDEN)
            transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
            headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as http:
                for path in ("/v1/models", "/v1/adapters", "/metrics", "/v1/audit", "/v1/overview"):
                    seen.append(await http.get(path))
                body = {"model": hidden, "prompt": "x", "max_tokens": 1}
                refused.append((await http.post("/v1/completions", json=body)).status_code)  # as for any
                load = {"lora_name": hidden, "lora_path": str(adapters["useful"])}
                refused.append((await http.post("/v1/load_lora_adapter", json=load)).status_code)
                refused.append(answer_of_lookup(server, hidden))

        server.engine.before = look
        http = server.client(ADMIN_KEY)
        assert upload(http, "useful", adapters["useful"]).status_code == 201
        seen += [http.get(path) for path in ("/v1/models", "/v1/adapters/useful", "/metrics")]
        assert len(server.engine.names) == 1
    assert refused[1:] == [400, 404]
    assert len(seen) > 6 and all(HIDDEN not in answer.text for answer in seen)
    assert HIDDEN not in (server.store / "audit").joinpath("audit.jsonl").read_text()


def test_a_model_that_does_not_refuse_is_no_measure(start: Start, adapters: dict[str, Path]) -> None:
    helpful = FakeTokenizer()
    helpful.says = "Sure! First, take a crowbar."
    no_template = FakeTokenizer()
    no_template.chat_template = None
    with pytest.raises(GuardError, match="refuses 0% of the probes"), start(engine={"tokenizer": helpful}):
        pass
    with pytest.raises(GuardError, match="no chat template"), start(engine={"tokenizer": no_template}):
        pass
    with start(exam="report", ladder=None, engine={"tokenizer": helpful}) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "harmful", adapters["harmful"]).status_code == 201
        assert not server.engine.asked
        assert http.get("/v1/adapters").json()["exam"]["mode"] == "off"
        assert "refuses 0%" in http.get("/v1/adapters").json()["exam"]["cause"]
        assert 'safelora_exam_info{exam="off"} 1' in http.get("/metrics").text


def test_report_refuses_nothing(
    start: Start, adapters: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(exam="report", ladder=None, policy={"method": "safe-lora"}) as server:
        http = server.client(ADMIN_KEY)
        for name in ("useful", "harmful"):
            assert upload(http, name, adapters[name]).status_code == 201
        for _ in range(200):
            if len(list(place.store.glob("exam/verdicts/*/*.json"))) == 2:
                break
            server.portal.call(asyncio.sleep, 0.02)
        exams = [http.get(f"/v1/adapters/{name}").json()["exam"] for name in ("useful", "harmful")]
        assert [exam["passed"] for exam in exams] == [True, False]
        assert exams[1]["drop"] == pytest.approx(1.0)
        everybodys = http.get("/metrics").text
        assert "safelora_adapter_exam_score" not in everybodys
        assert 'safelora_exams_total{verdict="failed",rung=""} 1' in everybodys
        monkeypatch.setattr(server.app.state.safelora_metrics, "_has_key", True)
        text = http.get("/metrics").text
        assert 'safelora_adapter_exam_score{adapter="harmful"} 1.0' in text
        assert 'safelora_exams_total{verdict="failed",rung="policy"} 1' in text
        assert "safelora_exam_seconds_count 2" in text
    assert ("exam", "harmful", "accepted", ["exam"]) in place.audit()


def test_the_servers_policy_goes_first(start: Start, adapters: dict[str, Path]) -> None:
    """Where the operator chose one, milder rungs are left out."""
    with start(policy={"method": "safe-lora"}) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "useful", adapters["useful"]).json()["policy"]["threshold"] == 0.35
        assert upload(http, "careless", adapters["careless"]).json()["policy"]["select"] == "all"
        assert len(set(server.engine.asked)) == 1 + 3


def test_a_chosen_policy_is_no_start_of_a_milder_ladder(start: Start, adapters: dict[str, Path]) -> None:
    """Safe LoRA fails here, input removal would pass: nobody named a ladder that has it."""
    policy = {"method": "safe-lora"}
    engine = {"drop": lambda report: 1.0 if report.policy.method == "safe-lora" else 0.0}
    with start(policy=policy, ladder=None, engine=engine) as server:
        assert upload(server.client(ADMIN_KEY), "useful", adapters["useful"]).status_code == 422
        assert len(set(server.engine.asked)) == 2  # that policy, and all modules by it


def test_a_tenant_cannot_starve_others(
    start: Start, adapters: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exams are bounded; what was examined before, its requests and an admin's exams are not."""
    monkeypatch.setattr(limits, "_WINDOWS", ((60.0, 2, "minute"), (86400.0, 2, "day")))
    place.tenant()
    with start(keys=str(place.keys)) as server:
        acme, admin = server.client(SECRET), server.client(ADMIN_KEY)
        assert upload(acme, "acme/a", adapters["useful"]).status_code == 201
        assert upload(acme, "acme/b", adapters["careless"]).status_code == 201  # three rungs are one exam
        over = upload(acme, "acme/c", adapters["other"])
        assert over.status_code == 429 and int(over.headers["Retry-After"]) > 1
        assert "2 exams of new content in a minute" in over.text
        assert upload(acme, "acme/d", adapters["useful"]).status_code == 201
        shown = acme.get("/v1/adapters/acme/a").json()["exam"]
        figures = dict.fromkeys(
            ("by_opinion", "drop", "bound", "worst", "seconds", "at", "over_refusal", "again")
        )
        assert shown == {"passed": True, **figures}
        assert upload(admin, "acme/c", adapters["other"]).status_code == 201


def test_reports_are_of_what_is_served_and_bounded(
    start: Start, adapters: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant that replaces an adapter again and again, or uploads many, is not examined all the time."""
    monkeypatch.setattr(limits, "_WINDOWS", ((60.0, 1, "minute"), (86400.0, 1, "day")))
    place.tenant()
    with start(exam="report", ladder=None, policy={"method": "safe-lora"}, keys=str(place.keys)) as server:
        http, go, exam = server.client(SECRET), asyncio.Event(), server.app.state.safelora.copies.exam
        server.engine.before = go.wait  # type: ignore[assignment]
        assert upload(http, "acme/a", adapters["useful"]).status_code == 201
        for content in ("careless", "other"):
            assert upload(http, "acme/b", adapters[content], replace=True).status_code == 201
        assert upload(http, "acme/c", adapters["harmful"]).status_code == 201
        assert http.delete("/v1/adapters/acme/c").status_code == 200
        assert set(exam._reports.waiting) == {"acme/a", "acme/b"} and len(exam.examiner.background.tasks) == 1
        server.portal.call(go.set)
        for _ in range(200):
            if set(exam._reports.waiting) == {"acme/b"}:
                break
            server.portal.call(asyncio.sleep, 0.02)
        server.portal.call(asyncio.sleep, 0.1)
        assert len(set(server.engine.asked)) == 1 and set(exam._reports.waiting) == {
            "acme/b"
        }  # over the limit


def test_waiting_for_ones_turn_ends(
    start: Start, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as server:
        monkeypatch.setattr(examiner, "_SECONDS", 0.1)
        monkeypatch.setattr(examiner, "_LONGEST_SECONDS", 0.1)
        server.portal.call(server.app.state.safelora.copies.exam.examiner._turn.acquire)
        answer = upload(server.client(ADMIN_KEY), "useful", adapters["useful"])
        assert answer.status_code == 503 and "other exams have not ended" in answer.text


def test_a_slow_exam_of_one_tenant_locks_no_other_out(
    start: Start, adapters: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a turn waits longer than the longest exam."""
    place.keys.touch(0o600)
    place.keys.write_text(
        f'[tenants.acme.keys]\nci = "{SECRET}"\n'
        f'[tenants.bob.exam]\nper_day = 1\n[tenants.bob.keys]\nci = "{SECRET}2"\n'
    )
    slow = threading.Event()

    async def before() -> None:
        await asyncio.sleep(0.1 * slow.is_set())

    with start(keys=str(place.keys), engine={"before": before}) as server:
        acme, bob = server.client(SECRET), server.client(SECRET + "2")
        monkeypatch.setattr(examiner, "_SECONDS", 0.3)  # an exam takes 0.8 s and more
        monkeypatch.setattr(examiner, "_LONGEST_SECONDS", 30.0)
        slow.set()
        with ThreadPoolExecutor() as pool:
            first = pool.submit(upload, acme, "acme/a", adapters["useful"])
            until_begun(server)
            second = pool.submit(upload, bob, "bob/x", adapters["other"])
            assert (first.result().status_code, second.result().status_code) == (201, 201)
        assert upload(bob, "bob/y", adapters["careless"]).status_code == 429, "it had its one"


def test_a_turn_that_did_not_come_costs_no_exam(
    start: Start, adapters: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.keys.touch(0o600)
    place.keys.write_text(f'[tenants.acme.exam]\nper_day = 1\n[tenants.acme.keys]\nci = "{SECRET}"\n')
    with start(keys=str(place.keys)) as server:
        turn = server.app.state.safelora.copies.exam.examiner._turn
        monkeypatch.setattr(examiner, "_LONGEST_SECONDS", 0.1)
        monkeypatch.setattr(examiner, "_SECONDS", 0.1)
        server.portal.call(turn.acquire)
        for _ in range(2):
            answer = upload(server.client(SECRET), "acme/a", adapters["useful"])
            assert answer.status_code == 503 and "other exams have not ended" in answer.text
        server.portal.call(_released, turn)
        monkeypatch.setattr(examiner, "_LONGEST_SECONDS", 60.0)
        assert upload(server.client(SECRET), "acme/a", adapters["useful"]).status_code == 201


async def _released(turn: asyncio.Lock) -> None:
    turn.release()


def until_begun(server: FakeServer) -> None:
    """Until an exam holds the turn."""
    end = time.monotonic() + 30
    while not server.app.state.safelora.copies.exam.examiner._turn.locked():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_audit_has_the_score(start: Start, adapters: dict[str, Path], place: Place) -> None:
    with start() as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "useful", adapters["useful"]).status_code == 201
        assert upload(http, "harmful", adapters["harmful"]).status_code == 422
    assert place.audit() == [
        ("upload", "useful", "accepted", []),
        ("upload", "harmful", "refused", ["exam"]),
    ]
    accepted, refused = AuditLog(place.store / "audit").read()
    assert accepted["exam"]["bound"] == 0.0 and accepted["exam"]["probes"] > 8 and "exam" not in refused
    rungs = refused["exam_rungs"]
    assert [rung["rung"] for rung in rungs] == LADDER.split(",")
    assert all(rung["bound"] == 1.0 and rung["threshold"] == 0.02 and not rung["again"] for rung in rungs)


def test_who_sees_why_an_exam_refused(start: Start, adapters: dict[str, Path], place: Place) -> None:
    """Scores are for admins. Where one policy was asked alone, the message names no ladder."""
    place.tenant()
    with start(keys=str(place.keys)) as server:
        admin, tenant = server.client(ADMIN_KEY), server.client(SECRET)
        seen, hidden = (
            upload(http, "acme/bad", adapters["harmful"]).json()["error"] for http in (admin, tenant)
        )
        assert [rung["rung"] for rung in seen["exam_rungs"]] == LADDER.split(",")
        assert "exam_rungs" not in hidden and "1.0" not in str(hidden) and "ladder" in hidden["message"]
        assert upload(tenant, "acme/careless", adapters["careless"]).status_code == 201
        own = {"policy": {"threshold": 0.2}}
        error = admin.put("/v1/adapters/acme/careless/policy", json=own | {"override": True, "reason": "x"})
        assert error.status_code == 422
        (reason,), (rung,) = (error.json()["error"][name] for name in ("reasons", "exam_rungs"))
        assert "only policy" in reason["message"] and "ladder" not in reason["message"]
        assert rung["bound"] == 0.5 and rung["threshold"] == 0.02


def test_the_same_bytes_are_examined_once(
    start: Start, adapters: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Rungs that publish the same files have the same verdict, also after a restart."""
    caplog.set_level("INFO", logger="vllm.safelora.exam")
    first = "exam: the served model "
    with start(ladder="safe-lora:0.1,safe-lora:0.9,safe-lora:0.95") as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "harmful", adapters["harmful"]).status_code == 422
        assert len(set(server.engine.asked)) == 2
        refused = AuditLog(server.store / "audit").read()
        assert [len(line["exam_rungs"]) for line in refused] == [3]
    lines = [record.message for record in caplog.records if record.message.startswith(first)]
    assert len(lines) == 2 and lines[0].startswith(f"{first}answers 64 probes")
    assert lines[1].startswith(f"{first}has answered in ") and "refuses 100% of the probes" in lines[1]
    names = [record.message for record in caplog.records if record.message.startswith("exam of adapter")]
    caplog.clear()
    assert len(names) == 2 and all("'harmful' by safe-lora:0." in line for line in names)
    with start(ladder="safe-lora:0.99") as again:
        assert upload(again.client(ADMIN_KEY), "harmful", adapters["harmful"]).status_code == 422
        assert not again.engine.asked
    assert not any(record.message.startswith(first) for record in caplog.records), "they are kept"


def test_what_waits_for_its_exam_says_so(
    start: Start, adapters: dict[str, Path], place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A stored adapter after a start with another ladder: a 503 with the cause, and no error in the log."""
    place.tenant()
    with start(keys=str(place.keys)) as server:
        for name in ("acme/a", "acme/b"):
            assert upload(server.client(ADMIN_KEY), name, adapters["useful"]).status_code == 201
    go = asyncio.Event()
    caplog.clear()
    with start(keys=str(place.keys), ladder="safe-lora:0.25", engine={"before": go.wait}) as server:
        acme, answers = server.client(SECRET), []
        registry = server.app.state.safelora.registry
        for name in ("acme/a", "acme/b"):
            with pytest.raises(SafeLoRAError, match=f"{name} waits for its exam") as error:
                registry[name].current()
            answers.append(error_response(error.value))
        assert [answer.status_code for answer in answers] == [503, 503]
        first, second = (int(answer.headers["Retry-After"]) for answer in answers)
        assert 5 <= first < second <= 600
        usage = acme.get("/v1/usage").json()["adapters"]
        assert {item["state"] for item in usage} == {"unavailable"}
        assert all("waits for its exam" in item["problem"] for item in usage)
        overview = acme.get("/v1/overview").json()["adapters"]
        assert all("waits for its exam" in item["problem"] for item in overview)
        server.portal.call(go.set)
        for name in ("acme/a", "acme/b"):
            assert answer_of(server, name) == 200
        assert not any(item["problem"] for item in acme.get("/v1/usage").json()["adapters"])
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("by_options", [False, True])
def test_another_chat_template_is_another_exam(
    by_options: bool, start: Start, adapters: dict[str, Path], place: Place
) -> None:
    """The answers that were kept are of the former one. Nothing is served until it was asked again."""
    with start() as server:
        assert upload(server.client(ADMIN_KEY), "useful", adapters["useful"]).status_code == 201
        asked = len(server.engine.asked)
    other = FakeTokenizer()
    options = {"enable_thinking": False} if by_options else None
    if not by_options:
        other.chat_template = "another template"
    with start(engine={"tokenizer": other}, template_options=options) as server:
        for _ in range(200):
            if answer_of_lookup(server, "useful") == 200:
                break
            server.portal.call(asyncio.sleep, 0.02)
        assert is_listed(server.client(ADMIN_KEY), "useful") and len(server.engine.asked) == asked
    assert other.options == (options or {})
    assert len(list(place.store.glob("exam/reference-*.json"))) == 2
    assert len(list(place.store.glob("exam/verdicts/*"))) == 2
