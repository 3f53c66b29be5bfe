"""Parts of the exam in the server: rungs, limits, verdicts, what a worker refuses."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from safelora_vllm.errors import AdapterRefused, ExamUnavailable, GuardError, StoreUnavailable
from safelora_vllm.exam.ladder import follows, parse
from safelora_vllm.exam.score import Score
from safelora_vllm.integration.server.background import Background
from safelora_vllm.integration.server.exam import reports
from safelora_vllm.integration.server.exam import start as begin
from safelora_vllm.integration.server.exam.counts import Counted, Counts
from safelora_vllm.integration.server.exam.hidden_name import HIDDEN_NAME, without_hidden
from safelora_vllm.integration.server.exam.limits import (
    A_DAY,
    A_MINUTE,
    AT_ONCE,
    EVERYBODYS,
    ExamLimits,
    NoTurn,
    TooManyExams,
)
from safelora_vllm.integration.server.exam.modes import Exam
from safelora_vllm.integration.server.exam.start import model_parts
from safelora_vllm.integration.server.exam.terms import Terms
from safelora_vllm.policy import Policy
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store.verdicts import Examined, Verdicts
from safelora_vllm.tenants.principal import check_name
from safelora_vllm.tenants.rules import SERVERS, Rules, TenantRules, rules_of
from tests.server.fake_exam import ANSWER, FakeTokenizer

LADDER = parse("input-removal:0.1,input-removal:0.4,safe-lora", Policy())


def exam(
    chosen: bool = False, threshold: float = 0.02, ladder: list[Policy] = LADDER, named: bool = False
) -> Exam:
    sheets = SimpleNamespace(first=SimpleNamespace(digest="e"))
    examiner = cast(Any, SimpleNamespace(sheets=sheets, background=None, limits=None))
    return Exam(examiner, cast(Any, None), Terms("enforce", threshold, tuple(ladder), chosen, named))


@pytest.mark.parametrize(
    ("chosen", "tenant", "own", "energies"),
    [
        (False, {}, {}, [0.1, 0.4, "safe-lora"]),
        (True, {}, {}, [0.2, 0.4]),
        (False, {"energy": 0.4}, {}, [0.4]),
        (False, {"energy": 0.3}, {}, [0.3, 0.4]),
        (False, {"max_total_norm": 0.5}, {}, [0.1, 0.4, "safe-lora"]),
        (False, {}, {"energy": 0.3}, [0.3]),
        (False, {"opinion": True}, {}, [0.1, 0.4, "safe-lora"]),
        (False, {"energy": 0.3, "opinion": True}, {}, [0.3, 0.4]),
    ],
)
def test_the_rungs_of_a_name(
    chosen: bool, tenant: dict[str, Any], own: dict[str, Any], energies: list[Any]
) -> None:
    server, rules = Policy(), TenantRules(tenant)
    base = rules_of(server, rules, own, False)
    rungs = exam(chosen).rungs(server, rules, base, bool(own))
    policies = [server.with_values(rung.policy) for rung in rungs]
    assert [p.energy if p.method == "input-removal" else p.method for p in policies] == energies
    assert all(p.max_total_norm == tenant.get("max_total_norm", 1.0) for p in policies)
    assert all(p.opinion == tenant.get("opinion", False) for p in policies)
    # The gate takes no rung that is less strict without the word for it.
    assert [rung.override for rung in rungs] == [not p.at_least_as_strict(server) for p in policies]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {"method": "safe-lora", "select": "all"},
        {"method": "safe-lora", "threshold": 0.35},
        {"method": "safe-lora", "select": "number", "number": 5},
        {"method": "csulora", "energy": 0.9},
        {"energy": 0.3},
        {},
    ],
)
@pytest.mark.parametrize("whose", ["server", "tenant"])
def test_no_rung_is_milder_than_a_chosen_policy(given: dict[str, Any], whose: str, named: bool) -> None:
    """Policies of two methods cannot be compared: only the operator's own ladder follows one with another."""
    server = Policy.from_mapping(given if whose == "server" else {})
    tenant = TenantRules({"method": "input-removal", **given} if whose == "tenant" else {}, less_strict=True)
    made = exam(whose == "server", named=named)
    rungs = made.rungs(server, tenant, rules_of(server, tenant, {}, False), False)
    first, *others = [server.with_values(rung.policy) for rung in rungs]
    assert first == tenant.over(server)
    for rung in others:
        if whose == "tenant" or not named or rung.method == first.method:
            assert rung.at_least_as_strict(first) and rung != first
    if named and whose == "server" and first.method != "input-removal":
        assert any(rung.method == "input-removal" for rung in others)


@pytest.mark.parametrize("method", ["input-removal", "safe-lora", "csulora"])
def test_what_projects_nothing_follows_no_policy(method: str) -> None:
    nothing, chosen = Policy(select="none"), Policy(method=method)
    assert not follows(nothing, chosen, named=True) and follows(chosen, nothing, named=False)


@pytest.mark.parametrize("given", [{"opinion": True}, {"energy": 0.2, "opinion": True}])
def test_the_servers_opinion_is_every_rungs_and_opens_none(given: dict[str, Any]) -> None:
    server, ladder = Policy(**given), parse("as-uploaded,as-uploaded+opinion,input-removal:0.4", Policy())
    made = exam("energy" in given, ladder=ladder)
    policies = [
        server.with_values(rung.policy) for rung in made.rungs(server, SERVERS, Rules({}, False), False)
    ]
    first = "all" if "energy" in given else "none"
    assert [(p.select, p.energy) for p in policies] == [(first, 0.2), ("all", 0.4)]
    assert all(p.opinion for p in policies)
    terms = Terms("enforce", 0.02, tuple(ladder[::2]))  # without its rung with an opinion
    assert {terms.bound(policy) for policy in policies} == {0.02}
    assert terms.rung(policies[-1]) == "input-removal:0.4+opinion"
    # A tenant's rules that have none, which are the operator's word, have it on no rung.
    without = TenantRules({"opinion": False}, less_strict=True)
    base = rules_of(server, without, {}, False)
    mild = [server.with_values(rung.policy) for rung in exam().rungs(server, without, base, False)]
    assert len(mild) == 3 and not any(p.opinion for p in mild)


def test_other_settings_are_other_rules() -> None:
    """So that everything is judged anew."""
    rulesets = [exam(), exam(True), exam(threshold=0.03), exam(ladder=LADDER[1:]), exam(named=True)]
    assert (
        len({made.ruleset("r", SERVERS) for made in rulesets} | {exam().ruleset("other", SERVERS), "r"}) == 7
    )
    assert exam().ruleset("r", SERVERS) == exam().ruleset("r", SERVERS)


def test_a_tenant_has_a_share() -> None:
    now = [0.0]
    limits = ExamLimits(lambda: now[0])

    def take(tenant: str | None) -> None:
        with limits.share(tenant) as ticket:
            ticket()
            ticket()  # an upload with all its rungs is one

    for _ in range(A_MINUTE):
        take("acme")
    with pytest.raises(TooManyExams, match="in a minute") as error:
        take("acme")
    assert error.value.seconds == 61
    take("globex")
    for _ in range(A_DAY):
        take(None)
    for _ in range(A_DAY - A_MINUTE):
        now[0] += 60
        take("acme")
    now[0] += 60
    with pytest.raises(TooManyExams, match="in a day"):
        take("acme")
    now[0] += 86400
    take("acme")


def test_few_exams_of_a_tenant_are_under_way() -> None:
    """Each holds the place of an upload. Those that need no exam are not counted."""
    limits = ExamLimits()
    with ExitStack() as held:
        for _ in range(5):
            held.enter_context(limits.share("acme"))
        for _ in range(AT_ONCE):
            held.enter_context(limits.share("acme"))()
        with limits.share("acme") as ticket, pytest.raises(TooManyExams, match="are under way"):
            ticket()
        with limits.share("globex") as ticket:
            ticket()
    with limits.share("acme") as ticket:
        ticket()


def test_what_has_no_turn_does_not_count_but_a_second_part_does() -> None:
    """The first part, which was held, has told its author something."""
    limits = ExamLimits()
    for parts, counted in ((1, 0), (2, 1)):
        with pytest.raises(NoTurn), limits.share("acme") as ticket:
            for _ in range(parts):
                ticket()
            raise NoTurn("others have not ended")
        assert len(limits._times["acme"]) == counted


def test_a_verdict_is_of_the_very_bytes(tmp_path: Path) -> None:
    files: dict[str, dict[str, str]] = {"a" * 64: {"x": "1"}}
    published = cast(Any, SimpleNamespace(digests=files.get))
    verdicts, key = Verdicts(tmp_path, "e" * 64, published), "a" * 64
    found = Examined(Score(0.1, 0.2, 0.3, 8), 1.5, {"x": "1"})
    assert verdicts.get(key) is None
    verdicts.put(key, found)
    assert (
        verdicts.get(key) == verdicts.known(key) == Verdicts(tmp_path, "e" * 64, published).get(key) == found
    )
    assert Verdicts(tmp_path, "f" * 64, published).get(key) is None  # another exam's
    files[key] = {"x": "2"}
    assert verdicts.get(key) is None and verdicts.known(key) is None
    files[key] = {"x": "1"}
    (file,) = tmp_path.glob(f"exam/verdicts/{'e' * 64}/*.json")
    for damaged in ("", "{}", '{"score": {"drop": true}}', file.read_text().replace("0.2", '"0"')):
        file.write_text(damaged)
        assert Verdicts(tmp_path, "e" * 64, published).get(key) is None


def test_the_worse_verdict_about_the_same_bytes_counts(tmp_path: Path) -> None:
    a, b, c, other = ("abcd"[number] * 64 for number in range(4))
    files = {key: {"x": "1"} for key in (a, b, c)} | {other: {"x": "2"}}
    published = cast(Any, SimpleNamespace(digests=files.get))
    one, two = (Verdicts(tmp_path, "e" * 64, published) for _ in range(2))
    assert one.of_same_files(c) is None
    found = {bound: Examined(Score(0.1, bound, 0.3, 8), 1.5, {"x": "1"}) for bound in (0.01, 0.2)}
    one.put(a, found[0.01])
    two.put(b, found[0.2])
    assert one.of_same_files(a) == found[0.01], "its own"
    assert one.of_same_files(c) == one.get(c) == two.get(c) == found[0.2]
    assert one.of_same_files(other) is None and one.of_same_files("f" * 64) is None


def test_verdicts_of_the_same_files_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while another process writes and removes some."""
    keys = [letter * 64 for letter in "abcd"]
    files = {key: {"x": "1"} for key in keys[:3]} | {keys[3]: {"x": "2"}}
    published = cast(Any, SimpleNamespace(digests=files.get))
    verdicts = Verdicts(tmp_path, "e" * 64, published)
    mild, bad = (Examined(Score(drop, drop, drop, 8), 1.0, {"x": "1"}) for drop in (0.1, 0.9))
    verdicts.put(keys[0], mild)
    verdicts.put(keys[1], bad)
    (tmp_path / "exam" / "verdicts" / ("e" * 64) / ".new").touch()
    scandir = os.scandir

    def with_one_that_goes(folder: Path) -> Any:
        gone = SimpleNamespace(name=f"{'0' * 64}.json", stat=lambda: Path("/nowhere").stat())
        with scandir(folder) as found:
            return nullcontext([gone, *found])

    monkeypatch.setattr(os, "scandir", with_one_that_goes)
    verdicts.share(keys)
    assert [verdicts.get(key) for key in keys] == [mild, bad, bad, None]

    def too_many_files(_: Path) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "scandir", too_many_files)
    with pytest.raises(StoreUnavailable, match="Too many open files"):  # never as if there were none
        verdicts.of_same_files(keys[3])


def test_a_verdict_of_another_process_is_seen(tmp_path: Path) -> None:
    a, b = "a" * 64, "b" * 64
    files = {key: {"x": "1"} for key in (a, b)}
    published = cast(Any, SimpleNamespace(digests=files.get))
    one, two = (Verdicts(tmp_path, "e" * 64, published) for _ in range(2))
    assert not one.read_changed([a, b])
    for score in (0.2, 0.3):
        two.put(a, found := Examined(Score(0.1, score, 0.3, 8), 1.5, {"x": "1"}, 7.0))
        assert one.read_changed([a, b]) and one.known(a) == found and one.known(b) is None
        assert not one.read_changed([a, b])
    two.put(a, again := Examined(Score(0.1, 0.4, 0.3, 8), 1.5, {"x": "1"}, 8.0))
    assert not one.read_changed([b]), "nobody asked about that one"
    assert one.known(a) == again, "which is known all the same"


def test_a_part_never_replaces_the_whole(tmp_path: Path) -> None:
    """Two servers may examine a copy, one for a tenant with a smaller threshold."""
    a, b = "a" * 64, "b" * 64
    files = {key: {"x": "1"} for key in (a, b)}
    published = cast(Any, SimpleNamespace(digests=files.get))
    one, two = (Verdicts(tmp_path, "e" * 64, published) for _ in range(2))
    part = Examined(Score(0.3, 0.4, 0.5, 16, 48), 1.0, {"x": "1"}, 7.0)
    whole = Examined(Score(0.1, 0.2, 0.3, 64), 2.0, {"x": "1"}, 8.0)
    one.put(a, part)
    assert one.get(a) == two.get(a) == two.of_same_files(b) == part
    two.put(b, whole)
    assert one.of_same_files(a) == whole, "which holds for every threshold"
    one.put(a, part)
    assert one.get(a) == one.known(a) == two.get(a) == whole
    files[a] = {"x": "2"}
    one.put(a, changed := Examined(Score(0.3, 0.4, 0.5, 16, 48), 1.0, {"x": "2"}, 9.0))
    assert Verdicts(tmp_path, "e" * 64, published).get(a) == changed


def test_counts_of_all_processes(tmp_path: Path) -> None:
    one = Counts(tmp_path)
    one.count("passed", "safe-lora", 0.3)
    (tmp_path / "exams-0.json").write_text((next(tmp_path.glob("exams-*.json"))).read_text())
    (tmp_path / "exams-1.json").write_text("damaged")
    one.count("failed", "policy", 400.0)
    found = one.all()
    assert found.exams == {("passed", "safe-lora"): 2, ("failed", "policy"): 1}
    assert sum(found.buckets) == 3 and found.buckets[-1] == 1 and found.seconds == pytest.approx(400.6)
    assert Counted() == Counts(tmp_path / "nowhere").all()


def test_no_caller_can_give_the_hidden_name() -> None:
    with pytest.raises(Exception, match="not a valid adapter name"):
        check_name(HIDDEN_NAME)
    text = f'a{{x="1"}} 2\nvllm:lora_requests_info{{running="acme/x,{HIDDEN_NAME}"}} 1\nb 3\n'
    assert without_hidden(text) == 'a{x="1"} 2\nb 3\n'


def test_how_a_model_is_served_is_part_of_its_exam(tmp_path: Path) -> None:
    """Its revision, tokenizer and configuration too: a verdict of another one says nothing."""
    config, served = SimpleNamespace(revision=None, hf_overrides={}), str(tmp_path)
    engine = SimpleNamespace(model_config=config, vllm_config=SimpleNamespace(cache_config=SimpleNamespace()))
    seen = []

    def look() -> None:
        parts = model_parts(engine, served, cast(Any, SimpleNamespace(projectors="p")))
        assert parts == model_parts(engine, served, cast(Any, SimpleNamespace(projectors="p")))
        seen.append(json.dumps(parts))

    look()
    (tmp_path / "tokenizer.json").write_text("{}")
    look()
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    look()
    config.hf_overrides = {"rope_theta": 2}
    look()
    engine.vllm_config.cache_config.cache_dtype = "fp8"
    look()
    engine.vllm_config.speculative_config = SimpleNamespace(method="ngram")
    look()
    (other := tmp_path / "other").mkdir()
    (other / "tokenizer.json").write_text("[]")
    config.tokenizer = str(other)
    look()
    assert len(set(seen)) == len(seen) == 7


def test_a_model_of_the_hub_is_looked_at_in_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(begin, "locate_model", lambda name: asked.append(name) or Path("/nowhere"))
    config = SimpleNamespace(revision="abc")
    model_parts(SimpleNamespace(model_config=config), "org/x", cast(Any, SimpleNamespace(projectors="p")))
    assert asked == ["org/x@abc"]


def test_an_exam_is_not_last_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler with priorities that is always busy never gets to its last request."""
    pytest.importorskip("vllm")
    engine_model = pytest.importorskip("safelora_vllm.integration.server.exam.engine_model")
    monkeypatch.setattr(engine_model, "_PATIENCE_SECONDS", 0.05)
    asked: list[tuple[str, int]] = []

    async def generate(_: Any, __: Any, request: str, *, priority: int, **___: Any) -> Any:
        asked.append((request, priority))
        if priority:
            await asyncio.sleep(60)
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ANSWER)])

    scheduler = SimpleNamespace(scheduler_config=SimpleNamespace(policy="priority"))
    engine = SimpleNamespace(model_config=SimpleNamespace(), generate=generate, vllm_config=scheduler)
    model = engine_model.EngineModel(engine, FakeTokenizer(), "x")
    other = engine_model.EngineModel(engine, FakeTokenizer(), "x")
    for one in (model, other):
        assert len(asyncio.run(one.answer(["p"] * 20, 4))) == 20
    urgent = [request for request, priority in asked if priority == 0]
    assert len(urgent) == 40 and len({request for request, _ in asked}) == len(asked)


@pytest.mark.parametrize(("others", "patience", "most"), [(False, 30.0, 8), (True, 30.0, 2), (True, -1.0, 8)])
def test_few_probes_go_at_once_beside_others(
    monkeypatch: pytest.MonkeyPatch, others: bool, patience: float, most: int
) -> None:
    """For a while: a server that always answers somebody would never end it."""
    pytest.importorskip("vllm")
    engine_model = pytest.importorskip("safelora_vllm.integration.server.exam.engine_model")
    monkeypatch.setattr(engine_model, "_PATIENCE_SECONDS", patience)
    hidden = SimpleNamespace(lora_name=engine_model.HIDDEN + "1")
    states = {"x": SimpleNamespace(lora_request=None)} if others else {}
    seen = []

    async def generate(_: Any, __: Any, request: str, **___: Any) -> Any:
        states[request] = SimpleNamespace(lora_request=hidden)
        await asyncio.sleep(0)
        seen.append(len(states) - others)
        del states[request]
        given = [{token: SimpleNamespace(logprob=-1.0)} for token in (ord("p"), *ANSWER)]
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ANSWER)], prompt_logprobs=given)

    engine = SimpleNamespace(
        model_config=SimpleNamespace(),
        generate=generate,
        output_processor=SimpleNamespace(request_states=states),
    )
    model = engine_model.EngineModel(engine, FakeTokenizer(), "x")
    said = asyncio.run(model.likelihoods(["p"] * 20, [tuple(ANSWER)] * 20, cast(Any, hidden)))
    assert said == [-1.0] * 20 and max(seen) == most


@pytest.mark.parametrize(("others", "most"), [(False, 8), (True, 2)])
def test_answers_go_on_while_further_prompts_are_read(others: bool, most: int) -> None:
    """Only a prompt makes the steps long that others wait for."""
    engine_model = pytest.importorskip("safelora_vllm.integration.server.exam.engine_model")
    hidden = SimpleNamespace(lora_name=engine_model.HIDDEN + "1")
    states = {"x": SimpleNamespace(lora_request=None)} if others else {}
    reading, seen = set[str](), list[tuple[int, int]]()

    async def generate(_: Any, __: Any, request: str, **___: Any) -> Any:
        states[request] = SimpleNamespace(lora_request=hidden)
        reading.add(request)
        for token in range(len(ANSWER)):
            await asyncio.sleep(0.01)
            seen.append((len(reading), len(states) - others))
            reading.discard(request)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ANSWER[: token + 1])])
        await asyncio.sleep(0.2)
        del states[request]

    engine = SimpleNamespace(
        model_config=SimpleNamespace(),
        generate=generate,
        output_processor=SimpleNamespace(request_states=states),
    )
    model = engine_model.EngineModel(engine, FakeTokenizer(), "x")
    said = asyncio.run(model.answer(["p"] * 20, 4, cast(Any, hidden)))
    assert [tokens for tokens, _ in said] == [tuple(ANSWER)] * 20
    assert (max(read for read, _ in seen), max(running for _, running in seen)) == (most, 16)


def test_a_worker_takes_no_folder_while_exams_are_enforced() -> None:
    """Neither of --lora-modules that vLLM would load itself, nor of the offline LLM."""
    guard_module = pytest.importorskip("safelora_vllm.integration.worker.guard")
    guard, asked = (
        object.__new__(guard_module.WorkerGuard),
        SimpleNamespace(lora_name="x", lora_int_id=1, lora_path="/x", load_inplace=False),
    )
    guard._settings, guard._accepted = ServerSettings("p", exam="enforce"), {}
    with pytest.raises(AdapterRefused, match="only what an API server has examined"):
        guard.resolve(asked)
    for settings in (ServerSettings("p", second_opinion=16), ServerSettings("p", policy={"opinion": True})):
        guard._settings = settings
        with pytest.raises(AdapterRefused, match="only what an API server serves"):
            guard.resolve(asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exam": "on"}, "^--exam is 'on': expected off, report, enforce"),
        (
            {"exam": "enforce", "exam_threshold": float("nan")},
            "^--exam-threshold is nan: expected a finite number above 0",
        ),
        ({"exam": "enforce", "ladder": "lora"}, "'lora' is not a valid rung"),
        ({"exam": "report", "ladder": "safe-lora"}, "^--ladder has no effect without --exam enforce"),
        ({"exam_probes": "/x"}, "^--exam-probes, .* have no effect without --exam: .* add --exam report or"),
        ({"exam_every": "24h"}, "have no effect without --exam:"),
        ({"exam": "report", "exam_every": "daily"}, "^--exam-every: 'daily' is not a valid duration"),
        ({"exam": "report", "exam_every": "0h"}, "a number above 0 and a unit"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GuardError, match=message):
        ServerSettings("p", **settings)


def test_shared_names_have_the_servers_rules() -> None:
    assert (
        exam().rungs(Policy(), SERVERS, rules_of(Policy(), SERVERS, {}, False), False)[0].policy["energy"]
        == 0.1
    )


def test_a_report_without_a_score_is_tried_again_a_few_times(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the engine could not answer may have an answer soon; what is broken holds up nobody for ever."""
    monkeypatch.setattr(reports, "_LATER_SECONDS", 0.0)
    tries: list[tuple[str, str]] = []

    async def examine(name: str, key: str, _: object, ticket: Callable[[], None]) -> None:
        tries.append((name, key))
        ticket()
        if name == "t/busy" and tries.count((name, key)) == 2:
            return
        raise {"t/broken": OSError}.get(name, ExamUnavailable)("no score")

    async def run() -> None:
        background = Background()
        limits = ExamLimits()
        queue = reports.Reports(background, limits, lambda _: EVERYBODYS, examine)
        for name, key in (("t/busy", "a"), ("t/never", "b"), ("t/broken", "c")):
            queue.add(name, key, Policy())
        await asyncio.gather(*background.tasks)
        assert len(limits._times["t"]) == 3, "one for each copy, however often it is tried"
        queue.add("t/never", "b", Policy())
        await asyncio.gather(*background.tasks)
        assert not queue.waiting and not queue._in_vain

    asyncio.run(run())
    busy, never, broken = "t/busy", "t/never", "t/broken"
    assert [name for name, _ in tries] == [busy, never, broken, busy, *[never] * 5]
    warned = [record.args[0] for record in caplog.records if isinstance(record.args, tuple)]
    assert warned == [busy, never, broken, *[never] * 5]
