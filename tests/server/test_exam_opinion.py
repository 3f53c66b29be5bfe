"""Rungs with a second opinion: what fails without one is served with one, and never without."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from safelora_vllm.errors import GuardError, Unavailable, UsageError
from safelora_vllm.exam.ladder import largest_bound, parse
from safelora_vllm.integration.server.app import _give_opinions
from safelora_vllm.integration.server.second_opinion import ByPolicy, SecondOpinion
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_exam import ExaminedEngine
from tests.server.fake_server import SECRET, FakeServer, Place
from tests.server.test_exam_again import until
from tests.server.test_exam_override import override
from tests.server.test_exam_server import Start, adapters, answer_of, is_listed, place, start
from tests.server.test_exam_tenants import write_keys

__all__ = ["adapters", "place", "start"]
LADDER = "as-uploaded,as-uploaded+opinion"


def who_answers(server: FakeServer, name: str) -> list[str | None]:
    """The adapters that the engine is asked for one request, None for the model itself."""
    return who_answers_to(server, server.app.state.openai_serving_models.lora_requests[name])


def who_answers_to(server: FakeServer, request: LoRARequest) -> list[str | None]:
    """The same of a request that was looked up before."""

    async def ask() -> None:
        prompt, params = {"prompt_token_ids": [1]}, SamplingParams(max_tokens=4)
        async for _ in server.engine.generate(prompt, params, "safelora-exam-x", lora_request=request):
            pass

    server.engine.answered.clear()
    asyncio.run(ask())
    return _sorted(server.engine.answered)


def _sorted(names: list[str | None]) -> list[str | None]:
    """The adapter first: the questions are asked at once."""
    return sorted(names, key=lambda name: name is None)


def test_what_fails_as_uploaded_is_served_with_an_opinion(start: Start, adapters: dict[str, Path]) -> None:
    with start(ladder=LADDER) as server:
        http = server.client(ADMIN_KEY)
        useful, harmful = (upload(http, name, adapters[name]).json() for name in ("useful", "harmful"))
        assert "opinion" not in useful["policy"] and harmful["policy"]["opinion"] is True
        assert {module["decision"] for module in harmful["modules"]} == {"kept"}
        assert useful["exam"]["passed"] and harmful["exam"]["passed"]
        assert len(set(server.engine.asked)) == 2, "both rungs of harmful publish the same bytes"
        assert who_answers(server, "useful") == ["useful"]
        assert who_answers(server, "harmful") == ["harmful", None, None]  # the last is what is served
        probes = server.engine.asked.copy()
    with start(ladder=LADDER) as again:
        assert is_listed(again.client(ADMIN_KEY), "harmful") and not again.engine.asked and probes
        assert who_answers(again, "harmful") == ["harmful", None, None]
    with start(ladder="as-uploaded,safe-lora") as stricter:  # no rung with an opinion any more
        assert answer_of(stricter, "useful") == 200 and answer_of(stricter, "harmful") == 422


def test_the_log_says_in_words_what_passes(
    start: Start, adapters: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="vllm.safelora.exam")
    with start(ladder="as-uploaded,safe-lora:0.2+opinion") as server:
        assert upload(server.client(ADMIN_KEY), "harmful", adapters["harmful"]).status_code == 201
    first, second = (r.message for r in caplog.records if r.message.startswith("exam of adapter"))
    assert "by as-uploaded: failed" in first and "at most 0.02 passes" in first
    assert "by safe-lora:0.2+opinion: passed" in second and "any passes with a second opinion" in second


@pytest.mark.parametrize("ladder", [LADDER, f"{LADDER},safe-lora"])
def test_a_start_warns_of_rungs_that_are_hardly_tried(
    start: Start, caplog: pytest.LogCaptureFixture, ladder: str
) -> None:
    with start(ladder=ladder):
        found = [r.message for r in caplog.records if "hardly ever tried" in r.message]
    assert len(found) == (ladder != LADDER)


def test_a_re_examination_does_not_take_it_away(start: Start, adapters: dict[str, Path]) -> None:
    with start(ladder=LADDER) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "harmful", adapters["harmful"]).status_code == 201
        again = http.post("/v1/adapters/harmful/exam").json()
        assert again["bound"] > again["threshold"] and again["passed"] and not again["withdrawn"]
        assert again["by_opinion"] is True
        assert is_listed(http, "harmful")


def test_an_adapter_without_likelihoods_fails_with_an_opinion_too(
    start: Start,
    adapters: dict[str, Path],
) -> None:
    with start(ladder=LADDER, engine={"drop": lambda _: math.nan}) as server:
        assert upload(server.client(ADMIN_KEY), "harmful", adapters["harmful"]).status_code == 422


def test_an_override_of_the_exam_keeps_the_ladders_opinion(
    start: Start,
    adapters: dict[str, Path],
    place: Place,
) -> None:
    """A cautious operator has it waive the exam alone. That it is without an opinion has to be said."""
    with start(ladder=LADDER) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "harmful", adapters["harmful"]).status_code == 201
        answer = override(server, "harmful", True)
        assert answer.status_code == 200 and answer.json()["exam_override"]
        assert answer.json()["policy"]["select"] == "threshold", "the server's, as without an exam"
        assert answer.json()["policy"]["opinion"] is True
        assert who_answers(server, "harmful") == ["harmful", None, None]
        # What is served now is examined afterwards, by what its opinion makes of its score.
        until(server, lambda: http.get("/v1/adapters/harmful").json()["exam"])
        assert http.get("/v1/adapters/harmful").json()["exam"]["by_opinion"] is True
        *_, told = (line for line in AuditLog(place.store / "audit").read() if line["action"] == "exam")
        assert told["actor"] == "server" and told["reasons"] == []
        assert 'safelora_exams_total{verdict="failed",rung="policy"}' not in http.get("/metrics").text
    with start(ladder=LADDER) as server:
        assert who_answers(server, "harmful") == ["harmful", None, None]
        http = server.client(ADMIN_KEY)
        for policy, opinion in (({"opinion": False}, False), ({}, True), ({"threshold": 0.9}, True)):
            answer = http.put("/v1/adapters/harmful/policy", json={"policy": policy})
            assert answer.status_code == 200 and answer.json()["exam_override"]
            assert answer.json()["policy"].get("opinion", False) is opinion, policy
        assert http.put("/v1/adapters/harmful/policy", json={"policy": {"opinion": False}}).status_code == 200
    with start(ladder=LADDER) as server:
        assert who_answers(server, "harmful") == ["harmful"]
    with start(ladder="as-uploaded,safe-lora") as server:  # no rung of it has one
        http = server.client(ADMIN_KEY)
        assert http.put("/v1/adapters/harmful/policy", json={"policy": {}}).status_code == 200
        assert who_answers(server, "harmful") == ["harmful"]


def test_a_policy_with_an_opinion_is_no_way_around_a_ladder_without(
    start: Start,
    adapters: dict[str, Path],
) -> None:
    """A tenant may ask for what is stricter. That the exam does not count then, only the operator can say."""
    with start() as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "careless", adapters["careless"]).status_code == 201
        policy = {"method": "safe-lora", "threshold": 0.2, "opinion": True}
        asked: dict[str, Any] = {"policy": policy, "override": True, "reason": "test"}
        assert http.put("/v1/adapters/careless/policy", json=asked).status_code == 422
        assert who_answers(server, "careless") == ["careless"]


def test_callers_see_the_opinion_and_the_verdict(
    start: Start, adapters: dict[str, Path], place: Place
) -> None:
    with start(ladder=LADDER, keys=write_keys(place)) as server:
        admin, acme = server.client(ADMIN_KEY), server.client(SECRET)
        for name in ("useful", "harmful"):
            assert upload(acme, f"acme/{name}", adapters[name]).status_code == 201
        harmful, useful = admin.get("/v1/overview").json()["adapters"]
        assert (harmful["second_opinion"], useful["second_opinion"]) == (True, False)
        assert harmful["exam"] == {
            "passed": True, "by_opinion": True, "rung": "as-uploaded+opinion", "bound": 1.0,
            "enforced": True,
        }  # fmt: skip
        assert useful["exam"]["rung"] == "as-uploaded" and useful["exam"]["by_opinion"] is False
        seen = acme.get("/v1/overview").json()["adapters"][0]["exam"]
        assert seen == {**harmful["exam"], "bound": None, "by_opinion": None}
        assert admin.get("/v1/adapters/acme/harmful").json()["exam"]["by_opinion"] is True
        assert acme.get("/v1/adapters/acme/harmful").json()["exam"]["by_opinion"] is None
        used = acme.get("/v1/usage").json()["adapters"]
        assert [adapter["second_opinion"] for adapter in used] == [True, False]
        assert 'second_opinion="true"' in admin.get("/metrics").text
    with start(exam="off", ladder=None, second_opinion=16, keys=write_keys(place)) as server:
        admin = server.client(ADMIN_KEY)
        assert upload(admin, "acme/new", adapters["useful"]).status_code == 201
        for path in ("overview", "usage?tenant=acme"):
            (new,) = (a for a in admin.get(f"/v1/{path}").json()["adapters"] if a["name"] == "acme/new")
            assert new["second_opinion"] and new.get("exam") is None
        assert 'second_opinion="false"' not in admin.get("/metrics").text


def test_an_adapters_own_policy_may_ask_for_one(start: Start, adapters: dict[str, Path]) -> None:
    with start(exam="off", ladder=None) as server:
        http = server.client(ADMIN_KEY)
        upload(http, "useful", adapters["useful"])
        assert who_answers(server, "useful") == ["useful"]
        answer = http.put("/v1/adapters/useful/policy", json={"policy": {"opinion": True}})
        assert answer.status_code == 200 and answer.json()["policy"]["opinion"] is True
        assert who_answers(server, "useful") == ["useful", None, None]
        loosened = http.put("/v1/adapters/useful/policy", json={"policy": {"opinion": False}})
        assert loosened.status_code == 200, "the server's own policy has none"


def test_an_override_may_take_the_servers_opinion_away(
    cache: ProjectorCache,
    tmp_path: Path,
    adapters: dict[str, Path],
    place: Place,  # for the admin's key
) -> None:
    assert not place.service.state().policy.opinion
    (tmp_path / "own").mkdir()
    with (
        Place.start(cache, tmp_path / "own", opinion=True) as own,
        own.server(engine=ExaminedEngine(own.engine().answers, store=own.store)) as server,
    ):
        http = server.client(ADMIN_KEY)
        assert upload(http, "useful", adapters["useful"]).json()["policy"]["opinion"] is True
        asked: dict[str, Any] = {"policy": {"opinion": False}}
        assert http.put("/v1/adapters/useful/policy", json=asked).status_code == 400
        answer = http.put("/v1/adapters/useful/policy", json={**asked, "override": True, "reason": "trusted"})
        assert answer.status_code == 200 and "opinion" not in answer.json()["policy"]
        versions = http.get("/v1/adapters/useful/versions").json()["versions"]
        assert [version["policy"].get("opinion") for version in versions] == [None, False]
        assert who_answers(server, "useful") == ["useful"]
        assert http.put("/v1/adapters/useful/policy", json={"policy": {}}).json()["policy"]["opinion"] is True
        assert who_answers(server, "useful") == ["useful", None, None]


def test_a_tenant_with_opinions_keeps_the_ladder(
    start: Start,
    adapters: dict[str, Path],
    place: Place,
) -> None:
    keys = write_keys(place, more="policy = {opinion = true}")
    with start(keys=keys) as server:
        acme = server.client(SECRET)
        careless = upload(acme, "acme/careless", adapters["careless"]).json()
        assert careless["policy"]["select"] == "all" and careless["policy"]["opinion"] is True
        assert upload(acme, "acme/harmful", adapters["harmful"]).status_code == 422
        assert who_answers(server, "acme/careless") == ["acme/careless", None, None]


def test_a_request_for_what_is_served_no_more_has_an_opinion(
    start: Start,
    adapters: dict[str, Path],
) -> None:
    """It was looked up before the adapter changed."""
    with start(exam="off", ladder=None) as server:
        http = server.client(ADMIN_KEY)
        upload(http, "useful", adapters["useful"])
        models = server.app.state.openai_serving_models.lora_requests
        before = models["useful"]
        http.put("/v1/adapters/useful/policy", json={"policy": {"opinion": True}})
        assert who_answers_to(server, before) == ["useful", None, None]


@pytest.mark.parametrize("opinion", [False, True])
def test_a_beam_search_ends_as_it_began(opinion: bool) -> None:
    """vLLM asks for it step by step. Where the adapter is replaced meanwhile, it ends on the old weights."""
    old, new = LoRARequest("x", 1, "safelora://old"), LoRARequest("x", 2, "safelora://new")
    registry: dict[str, Any] = {"x": _served(old, opinion=opinion)}
    asked: list[str] = []

    async def generate(*_: Any, lora_request: Any = None, **__: Any) -> AsyncIterator[str]:
        asked.append(lora_request.lora_path)
        yield "a token"

    by_it = ByPolicy(registry)
    judged = SecondOpinion(generate, 16, pytest.fail, by_it.wanted, ends=by_it.ends)
    step = SamplingParams(max_tokens=1, logprobs=4, detokenize=False)

    async def ask() -> None:
        async for _ in judged.generate({"prompt_token_ids": [1]}, step, "r", lora_request=old):
            pass

    for registry_now in (registry["x"], _served(new, opinion=True), None):
        registry.pop("x", None)
        if registry_now is not None:
            registry["x"] = registry_now
        with pytest.raises(UsageError, match="beam search") if opinion else nullcontext():
            asyncio.run(ask())
    assert asked == ([] if opinion else ["safelora://old"] * 3)


def _served(request: LoRARequest, opinion: bool) -> Any:
    report = SimpleNamespace(policy=Policy(opinion=opinion))
    return SimpleNamespace(served=SimpleNamespace(request=request, report=report))


@pytest.mark.parametrize(
    "settings",
    [{"exam": "enforce", "ladder": LADDER}, {"policy": {"opinion": True}}, {"second_opinion": 16}],
)
def test_without_text_a_server_with_opinions_does_not_start(settings: dict[str, Any]) -> None:
    engine = SimpleNamespace(model_config=SimpleNamespace(skip_tokenizer_init=True))
    with pytest.raises(GuardError, match="needs vLLM's tokenizer"):
        _give_opinions(engine, {}, ServerSettings("/cache", **settings), cast(Any, None), [])


def test_without_text_a_policy_that_is_set_later_answers_nothing() -> None:
    engine = SimpleNamespace(
        model_config=SimpleNamespace(skip_tokenizer_init=True), generate=lambda *_, **__: pytest.fail("asked")
    )
    _give_opinions(engine, {}, ServerSettings("/cache"), cast(Any, SimpleNamespace(refused=None)), [])
    request = LoRARequest("gone", 1, "/x")  # in no registry: as an adapter whose policy asks for an opinion

    async def ask() -> None:
        async for _ in engine.generate(
            {"prompt_token_ids": [1]}, SamplingParams(), "r", lora_request=request
        ):
            pass

    with pytest.raises(Unavailable, match="without --skip-tokenizer-init"):
        asyncio.run(ask())


def test_the_largest_bound() -> None:
    ladder = parse("as-uploaded,input-removal:0.1,as-uploaded+opinion", Policy())
    assert largest_bound(ladder[0], ladder, 0.02) == largest_bound(ladder[1], ladder, 0.02) == 0.02
    assert largest_bound(ladder[2], ladder, 0.02) == math.inf
    assert largest_bound(dataclasses.replace(ladder[1], opinion=True), ladder, 0.02) == math.inf
    assert largest_bound(dataclasses.replace(ladder[2], max_total_norm=9.0), ladder, 0.02) == math.inf
    assert largest_bound(Policy(method="safe-lora", opinion=True), ladder, 0.02) == math.inf
    assert largest_bound(ladder[2], ladder[:2], 0.02) == 0.02
