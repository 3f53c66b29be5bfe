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
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_exam import ExaminedEngine
from tests.server.fake_server import SECRET, FakeServer, Place
from tests.server.test_exam_again import until
from tests.server.test_exam_opinion import who_answers
from tests.server.test_exam_override import override
from tests.server.test_exam_server import adapters, answer_of, place
from tests.server.test_exam_tenants import write_keys

__all__ = ["adapters", "place"]
NONE = {"select": "none"}
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
