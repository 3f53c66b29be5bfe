"""Adapters that no policy projects: something else looks at harm, whatever changes around them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.gate.protocol import GateConfig
from safelora_vllm.gate.server import _Handler, _Server
from safelora_vllm.gate.service import GateService
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import Report
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_exam import ExaminedEngine
from tests.server.fake_server import SECRET, FakeServer, Place
from tests.server.test_exam_again import until
from tests.server.test_exam_opinion import who_answers
from tests.server.test_exam_override import override
from tests.server.test_exam_server import adapters, answer_of, place
from tests.server.test_exam_tenants import write_keys
from tests.tiny import Draft

__all__ = ["adapters", "place"]
NONE = {"select": "none"}
WITH_OPINION = "as-uploaded,as-uploaded+opinion"
PROJECTS = {"method": "safe-lora"}
AS_UPLOADED = 'less_strict = true\npolicy = {select = "none"}'
_numbers = itertools.count()


@contextmanager
def gate(
    cache: ProjectorCache, store: Path, folder: Path, policy: dict[str, Any], **more: Any
) -> Iterator[Place]:
    """A gate with a policy, in process."""
    number = next(_numbers)
    settings = ServerSettings(str(cache.folder), str(store), policy, trust_served_model=True, **more)
    config = GateConfig(str(folder / f"{number}.sock"), "not compared", settings)
    service = GateService(config)
    with _Server(config.socket, type("Handler", (_Handler,), {"service": service})) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield Place(config, service, folder / f"keys-{number}.toml")
        server.shutdown()


@contextmanager
def started(place: Place, policy: dict[str, Any], **settings: Any) -> Iterator[FakeServer]:
    """A server whose exams fail what is served as it was uploaded."""

    def drop(report: Report) -> float:
        return 1.0 if report.policy.selects_none else 0.0

    engine = ExaminedEngine(place.engine().answers, store=place.store, drop=drop)
    with place.server(engine=engine, policy=policy, **settings) as server:
        yield server


def projects(answer: Any) -> bool:
    assert answer.status_code in (200, 201), answer.text
    return "projected" in {module["decision"] for module in answer.json()["modules"]}


def test_who_says_how_to_project_has_it_done(
    cache: ProjectorCache, tmp_path: Path, adapters: dict[str, Path], place: Place
) -> None:
    """Also in words that are the defaults: the server has another one."""
    assert place.service.state().policy.method == "safe-lora", "its gate is not the one that is asked here"
    with (
        gate(cache, tmp_path / "none", tmp_path, NONE, second_opinion=16) as other,
        started(other, NONE, second_opinion=16) as server,
    ):
        http = server.client(ADMIN_KEY)
        assert not projects(upload(http, "a", adapters["useful"]))
        for policy in ({"method": "input-removal"}, {"energy": 0.2}, {"energy": 0.4}, {"select": "all"}):
            assert projects(http.put("/v1/adapters/a/policy", json={"policy": policy})), policy
        assert not projects(http.put("/v1/adapters/a/policy", json={"policy": {}}))
    with gate(cache, tmp_path / "other", tmp_path, NONE, second_opinion=16) as other:
        keys = write_keys(other, more='policy = {method = "input-removal", energy = 0.2}')
        with started(other, NONE, second_opinion=16, keys=keys) as server:
            assert projects(upload(server.client(SECRET), "acme/a", adapters["useful"]))


def test_a_restart_without_the_servers_opinion_leaves_them_one(
    adapters: dict[str, Path], place: Place
) -> None:
    keys = write_keys(place, more=AS_UPLOADED)
    wanted = {"policy": NONE, "override": True, "reason": "the opinion looks"}
    with started(place, PROJECTS, keys=keys, second_opinion=16) as server:
        http = server.client(ADMIN_KEY)
        assert not projects(upload(server.client(SECRET), "acme/a", adapters["useful"]))
        for name in ("b", "c"):
            assert upload(http, name, adapters["careless"]).status_code == 201
        assert not projects(http.put("/v1/adapters/b/policy", json=wanted))
        bare = {**wanted, "policy": {**NONE, "opinion": False}}
        assert not projects(http.put("/v1/adapters/c/policy", json=bare))
    with started(place, PROJECTS, keys=keys) as server:
        for name in ("acme/a", "b"):
            assert who_answers(server, name) == [name, None, None], "one that is served, and its opinion"
        assert who_answers(server, "c") == ["c"], "an admin said so"


@pytest.mark.parametrize("exam", ["report", "off"])
def test_without_an_enforced_exam_they_have_an_opinion(
    exam: str, adapters: dict[str, Path], place: Place
) -> None:
    keys = write_keys(place, more=AS_UPLOADED)
    ladder = "as-uploaded,safe-lora"
    with started(place, PROJECTS, keys=keys, exam="enforce", ladder=ladder, exam_threshold=2.0) as server:
        assert not projects(upload(server.client(SECRET), "acme/passes", adapters["useful"]))
        assert who_answers(server, "acme/passes") == ["acme/passes"], "the exam looked"
    with started(place, PROJECTS, keys=keys, exam=exam) as server:
        until(server, lambda: answer_of(server, "acme/passes") == 200)
        assert who_answers(server, "acme/passes") == ["acme/passes", None, None]
        assert upload(server.client(SECRET), "acme/new", adapters["harmful"]).status_code == 201
        assert who_answers(server, "acme/new") == ["acme/new", None, None]


def test_an_override_that_was_given_of_a_projection_is_none_of_the_opinion(
    cache: ProjectorCache, tmp_path: Path, adapters: dict[str, Path], place: Place
) -> None:
    with started(place, PROJECTS, exam="enforce") as server:
        assert upload(server.client(ADMIN_KEY), "h", adapters["harmful"]).status_code == 201
        assert override(server, "h", True).status_code == 200
    with (
        gate(cache, place.store, tmp_path, NONE, exam="enforce") as other,
        started(other, NONE, exam="enforce") as server,
    ):
        http = server.client(ADMIN_KEY)
        until(server, lambda: answer_of(server, "h") == 200 and not projects(http.get("/v1/adapters/h")))
        assert who_answers(server, "h") == ["h", None, None]


def test_a_tenant_that_enforces_on_a_server_that_only_reports_has_one(
    cache: ProjectorCache, tmp_path: Path, adapters: dict[str, Path], place: Place
) -> None:
    policy = {**NONE, "mode": "report-only"}
    assert place.service.state().policy.enforcing, "its gate is not the one that is asked here"
    with gate(cache, tmp_path / "none", tmp_path, policy) as other:
        keys = write_keys(other, more='policy = {mode = "enforce"}')
        with started(other, policy, keys=keys) as server:
            assert not projects(upload(server.client(SECRET), "acme/a", adapters["harmful"]))
            assert who_answers(server, "acme/a") == ["acme/a", None, None]


def test_everybody_sees_that_nothing_is_projected(adapters: dict[str, Path], place: Place) -> None:
    keys = write_keys(place, more=AS_UPLOADED)
    with started(place, PROJECTS, keys=keys) as server:
        http = server.client(ADMIN_KEY)
        assert upload(server.client(SECRET), "acme/a", adapters["useful"]).status_code == 201
        (listed,) = http.get("/v1/overview").json()["adapters"]
        assert (listed["method"], listed["second_opinion"]) == ("none", True)
        assert 'method="none"' in http.get("/metrics").text


def opinions(server: FakeServer, name: str) -> dict[str, Any]:
    """Whether an adapter of acme has a second opinion, in the words of each place that says so."""
    admin, acme = server.client(ADMIN_KEY), server.client(SECRET)
    (listed,) = (a for a in acme.get("/v1/overview").json()["adapters"] if a["name"] == name)
    usage = acme.get("/v1/usage").json()
    (used,) = (a for a in usage["adapters"] if a["name"] == name)
    (summary,) = (a for a in acme.get("/v1/adapters").json()["data"] if a["adapter"] == name)
    info = (line for line in admin.get("/metrics").text.splitlines() if "safelora_adapter_info{" in line)
    *_, told = (line for line in AuditLog(server.store / "audit").read() if line["adapter"] == name)
    return {
        "report": acme.get(f"/v1/adapters/{name}").json()["policy"].get("opinion", False),
        "list": summary["policy"].get("opinion", False),
        "overview": listed["second_opinion"],
        "usage": used["second_opinion"],
        "metrics": any(f'adapter="{name}"' in line and 'second_opinion="true"' in line for line in info),
        "audit log": told["policy"].get("opinion", False),
        "requests": len(who_answers(server, name)) > 1,
    }


def of_uploads(server: FakeServer) -> list[bool]:
    """The same of the policy by which new uploads are judged."""
    admin, acme = server.client(ADMIN_KEY), server.client(SECRET)
    answers = admin.get("/v1/overview"), acme.get("/v1/overview"), acme.get("/v1/usage")
    return [answer.json()["policy"].get("opinion", False) for answer in answers]


def test_an_opinion_of_all_adapters_is_said_alike_everywhere(
    cache: ProjectorCache, tmp_path: Path, adapters: dict[str, Path], place: Place
) -> None:
    assert place.service.state().policy.method == "safe-lora", "its gate is not the one that is asked here"
    with gate(cache, tmp_path / "none", tmp_path, NONE, second_opinion=16) as other:
        keys = write_keys(other)
        with started(other, NONE, second_opinion=16, keys=keys) as server:
            uploaded = upload(server.client(SECRET), "acme/a", adapters["useful"])
            assert uploaded.status_code == 201 and uploaded.json()["policy"]["opinion"] is True
            assert of_uploads(server) == [True, True, True]
            assert set(opinions(server, "acme/a").values()) == {True}
            http = server.client(ADMIN_KEY)
            for policy in ({"select": "all"}, {"select": "all", "opinion": False}, {"opinion": False}):
                answer = http.put("/v1/adapters/acme/a/policy", json={"policy": policy})
                assert answer.status_code == 200 and answer.json()["policy"]["opinion"] is True, policy
                assert set(opinions(server, "acme/a").values()) == {True}, policy
            *_, last = http.get("/v1/adapters/acme/a/versions").json()["versions"]
            assert last["policy"]["opinion"] is False, "what the admin set is kept, for a server without"


def test_the_audit_log_has_the_opinion_of_all_in_each_of_its_decisions(
    cache: ProjectorCache, tmp_path: Path, adapters: dict[str, Path], place: Place
) -> None:
    assert place.service.state().policy.method == "safe-lora", "its gate is not the one that is asked here"
    dora = Draft()
    dora.config["use_dora"] = True
    store, projects_all = tmp_path / "store", {"select": "all"}
    with (
        gate(cache, store, tmp_path, projects_all, second_opinion=16) as other,
        started(other, projects_all, second_opinion=16, static={"static": adapters["useful"]}) as server,
    ):
        http = server.client(ADMIN_KEY)
        assert upload(http, "a", adapters["useful"]).status_code == 201
        assert upload(http, "a", adapters["useful"], replace=True).status_code == 200
        assert upload(http, "bad", dora.write(tmp_path / "bad")).status_code == 422
    stricter = {"method": "safe-lora", "select": "all"}
    with (
        gate(cache, store, tmp_path, stricter, second_opinion=16) as other,
        started(other, stricter, second_opinion=16) as server,
    ):
        until(server, lambda: "rejudge" in {line["action"] for line in AuditLog(store / "audit").read()})
    lines = [line for line in AuditLog(store / "audit").read() if "policy" in line]
    decided = {(line["action"], line["decision"]) for line in lines}
    assert decided >= {
        ("load", "accepted"), ("upload", "accepted"), ("upload", "unchanged"), ("upload", "refused"),
        ("rejudge", "accepted"),
    }  # fmt: skip
    assert all(line["policy"].get("opinion") is True for line in lines), lines


def test_the_policy_of_new_uploads_has_the_opinion_that_they_will_have(
    adapters: dict[str, Path], place: Place
) -> None:
    """A tenant whose adapters nothing projects, on a server with neither an opinion of all nor an exam."""
    with started(place, PROJECTS, keys=write_keys(place, more=AS_UPLOADED)) as server:
        assert of_uploads(server) == [False, True, True]
        assert upload(server.client(SECRET), "acme/a", adapters["useful"]).status_code == 201
        assert set(opinions(server, "acme/a").values()) == {True}
    said = 'less_strict = true\npolicy = {select = "none", opinion = false}'
    with started(place, PROJECTS, keys=write_keys(place, more=said)) as server:
        assert of_uploads(server) == [False, False, False]


@pytest.mark.parametrize(
    ("exam", "told"),
    [
        ("enforce", "by the ladder as-uploaded, then as-uploaded+opinion, norms up to"),
        ("report", "safe-lora, select threshold 0.35, norms up to"),
    ],
)
def test_the_log_of_the_start_names_what_decides(
    exam: str, told: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    ladder = WITH_OPINION if exam == "enforce" else None
    with caplog.at_level("INFO", "vllm.safelora"), started(place, {}, exam=exam, ladder=ladder):
        assert f"adapters are guarded: {told}" in caplog.text


@pytest.mark.parametrize(
    ("policy", "settings", "warned"),
    [
        (NONE, {"exam": "enforce", "second_opinion": 16}, True),
        ({**NONE, "opinion": True}, {"exam": "enforce"}, True),
        (NONE, {"exam": "enforce", "second_opinion": 16, "ladder": WITH_OPINION}, False),
        (NONE, {"exam": "enforce", "second_opinion": 16, "ladder": "as-uploaded,safe-lora"}, False),
        (NONE, {"exam": "report", "second_opinion": 16}, False),
        (NONE, {"exam": "enforce"}, False),
        (PROJECTS, {"exam": "enforce", "second_opinion": 16}, False),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_start_warns_where_what_fails_would_be_projected(
    cache: ProjectorCache,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    policy: dict[str, Any],
    settings: dict[str, Any],
    warned: bool,
) -> None:
    """A second opinion would do, and takes no skill."""
    with (
        gate(cache, tmp_path / "store", tmp_path, policy, **settings) as own,
        started(own, policy, **settings),
    ):
        found = [record for record in caplog.records if f"give --ladder {WITH_OPINION}" in record.message]
    assert len(found) == warned


@pytest.mark.parametrize(("exam", "enforced"), [("enforce", True), ("report", False)])
def test_the_overview_says_whether_a_verdict_decides(
    exam: str, enforced: bool, adapters: dict[str, Path], place: Place
) -> None:
    def verdict() -> Any:
        return http.get("/v1/overview").json()["adapters"][0]["exam"]

    with started(place, PROJECTS, exam=exam) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "a", adapters["useful"]).status_code == 201
        until(server, verdict)
        assert verdict()["enforced"] is enforced
        if enforced:
            assert override(server, "a", True).status_code == 200
            until(server, lambda: verdict() and not verdict()["enforced"])
