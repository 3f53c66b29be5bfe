"""Tenants whose exams are others than the server's: mode, threshold, ladder, limits, and edits of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.errors import KeysError
from safelora_vllm.integration.server.exam.limits import ExamLimits, Limit, TooManyExams
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_exam import FakeTokenizer
from tests.server.fake_server import SECRET, Place
from tests.server.test_exam_again import until
from tests.server.test_exam_server import (  # noqa: F401
    LADDER,
    Start,
    adapters,
    answer_of_lookup,
    place,
    start,
)


def write_keys(place: Place, exam: str = "", more: str = "") -> str:  # noqa: F811
    """A keys file whose tenant acme has these rules of exams. It is renamed over the former one."""
    table = f"[tenants.acme.exam]\n{exam}\n" if exam else ""
    new = place.keys.with_name("new")
    new.touch(0o600)
    new.write_text(f'[tenants.acme]\n{more}\n{table}[tenants.acme.keys]\nci = "{SECRET}"\n')
    new.rename(place.keys)
    return str(place.keys)


def test_a_tenant_is_examined_where_others_are_only_reported(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
) -> None:
    keys = write_keys(place, f'mode = "enforce"\nladder = "{LADDER}"', more="less_strict = true")
    with start(exam="report", ladder=None, policy={"method": "safe-lora"}, keys=keys) as server:
        http, acme = server.client(ADMIN_KEY), server.client(SECRET)
        assert upload(http, "bad", adapters["harmful"]).status_code == 201
        assert upload(acme, "acme/bad", adapters["harmful"]).status_code == 422
        assert upload(http, "acme/bad", adapters["harmful"]).status_code == 422, "an admin's upload too"
        assert upload(acme, "acme/x", adapters["careless"]).json()["policy"]["select"] == "all"
        # An edit of the file holds for what is served, without a restart.
        write_keys(place)
        until(server, lambda: _policy(server, "acme/x") == "threshold")
        assert upload(acme, "acme/bad", adapters["harmful"]).status_code == 201
        write_keys(place, 'mode = "enforce"')
        until(server, lambda: answer_of_lookup(server, "acme/bad") == 422)
        assert answer_of_lookup(server, "bad") == 200
        write_keys(place, 'mode = "sometimes"')  # nothing changes by a file that is wrong
        assert upload(acme, "acme/y", adapters["harmful"]).status_code == 422


def _policy(server, name: str) -> str | None:  # type: ignore[no-untyped-def]
    served = server.app.state.safelora.registry[name].served
    return served.report.policy.select if served else None


def test_a_tenants_own_threshold(start: Start, adapters: dict[str, Path], place: Place) -> None:  # noqa: F811
    engine = {"drop": lambda _: 0.01}
    with start(engine=engine, keys=write_keys(place, "threshold = 0.005")) as server:
        assert upload(server.client(ADMIN_KEY), "x", adapters["useful"]).status_code == 201
        assert upload(server.client(SECRET), "acme/x", adapters["useful"]).status_code == 422, "same copy"
        write_keys(place, "threshold = 0.015")
        assert upload(server.client(SECRET), "acme/x", adapters["useful"]).status_code == 201
        write_keys(place, "threshold = 0.005")
        until(server, lambda: answer_of_lookup(server, "acme/x") == 422)
        assert answer_of_lookup(server, "x") == 200


def test_a_tenants_own_limits(start: Start, adapters: dict[str, Path], place: Place) -> None:  # noqa: F811
    with start(keys=write_keys(place, "per_minute = 1")) as server:
        acme = server.client(SECRET)
        assert upload(acme, "acme/a", adapters["useful"]).status_code == 201
        over = upload(acme, "acme/b", adapters["other"])
        assert over.status_code == 429 and "1 exams of new content in a minute" in over.text
        write_keys(place, "per_minute = 2")
        assert upload(acme, "acme/b", adapters["other"]).status_code == 201


def test_a_limit_of_none() -> None:
    limits = ExamLimits()
    with (
        limits.share("acme", Limit(a_day=0)) as ticket,
        pytest.raises(TooManyExams, match="0 exams") as error,
    ):
        ticket()
    assert error.value.seconds == 86401
    with limits.share("acme") as ticket:
        ticket()


def test_where_the_exam_is_off_a_tenant_that_needs_it_is_not_served(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
) -> None:
    """The aligned model is no measure: a report says so, and what is to be enforced fails closed."""
    helpful = FakeTokenizer()
    helpful.says = "Sure! First, take a crowbar."
    given = {
        "exam": "report",
        "ladder": None,
        "policy": {"method": "safe-lora"},
        "engine": {"tokenizer": helpful},
    }
    with start(**given, keys=write_keys(place)) as server:
        assert upload(server.client(SECRET), "acme/old", adapters["useful"]).status_code == 201
        assert upload(server.client(ADMIN_KEY), "shared", adapters["useful"]).status_code == 201
    with start(**given, keys=write_keys(place, 'mode = "enforce"')) as server:
        answer = upload(server.client(SECRET), "acme/x", adapters["useful"])
        assert answer.status_code == 503 and "refuses" not in answer.text
        assert answer_of_lookup(server, "acme/old") == 503
        assert answer_of_lookup(server, "shared") == 200


@pytest.mark.parametrize(
    ("exam", "settings", "message"),
    [
        ('mode = "report"', {}, r"tenants\.acme\.exam is less strict .*mode = report"),
        ('mode = "off"', {}, "mode = off"),
        ("threshold = 0.03", {}, r"threshold = 0\.03"),
        ('ladder = "safe-lora:0.1"', {}, "safe-lora:0.1"),
        (  # a rung of the default ladder, which is milder than the policy that the operator chose
            'ladder = "input-removal:0.05"',
            {"ladder": None, "policy": {"method": "safe-lora", "select": "all"}},
            r"less strict .*input-removal:0\.05",
        ),
        (  # what takes any score needs a rung of the server's that does, not its policy's opinion
            'ladder = "safe-lora:0.3+opinion"',
            {"policy": {"method": "safe-lora", "threshold": 0.2, "opinion": True}},
            r"less strict .*safe-lora:0\.3\+opinion",
        ),
        ('ladder = "safe-lora:0.3+opinion"', {"policy": {"opinion": True}}, "less strict"),
        ('ladder = "safe-lora"', {"exam": "report", "ladder": None}, "ladder has no effect"),
        ('mode = "report"', {"exam": "off", "ladder": None}, "has no effect with --exam off"),
    ],
)
def test_a_tenant_may_only_be_stricter(
    start: Start,  # noqa: F811
    place: Place,  # noqa: F811
    exam: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(KeysError, match=message), start(keys=write_keys(place, exam), **settings):
        pass
    if "less strict" in message:  # the operator's word
        with start(keys=write_keys(place, exam, more="less_strict = true"), **settings):
            pass


def test_a_tenants_rungs_on_a_server_with_opinions(start: Start, place: Place) -> None:  # noqa: F811
    """Each has the server's opinion, and is compared so."""
    given: dict[str, Any] = {"policy": {"opinion": True}, "ladder": "safe-lora:0.2,safe-lora:0.3+opinion"}
    for ladder in ("safe-lora:0.2", "safe-lora:0.3+opinion,safe-lora"):
        with start(keys=write_keys(place, f'ladder = "{ladder}"'), **given):
            pass
    with (
        pytest.raises(KeysError, match=r"less strict .*safe-lora:0\.2\+opinion"),
        start(keys=write_keys(place, 'ladder = "safe-lora:0.2+opinion"'), **given),
    ):
        pass
