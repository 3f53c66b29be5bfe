"""The refusals that a gate remembers: how many, under whose name, and from several threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from safelora_vllm.errors import Reason
from safelora_vllm.gate.protocol import Judgement
from safelora_vllm.gate.refusals import Refusals
from safelora_vllm.policy import Policy
from safelora_vllm.report import Report

REPORT = Report("first", "digest", "cache", Policy(), False, [Reason("dora", "no DoRA")], [])
REFUSED = Judgement(REPORT, None, 7, "rules")


def test_the_newest_are_remembered_under_the_name_that_is_asked_for() -> None:
    refusals = Refusals()
    for number in range(257):
        refusals.add(str(number), REFUSED)
    assert refusals.find("0", "a") is None and refusals.find("none", "a") is None
    found = refusals.find("256", "second")
    assert found is not None and found.report.adapter == "second" and found.key is None
    assert (found.bytes, found.ruleset_digest) == (7, "rules")


def test_several_threads_forget_at_once() -> None:
    refusals, start = Refusals(), threading.Barrier(4)

    def fill(thread: int) -> None:
        start.wait()
        for number in range(2000):
            refusals.add(f"{thread} {number}", REFUSED)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    assert sum(refusals.find(f"{t} {n}", "a") is not None for t in range(4) for n in range(2000)) == 256
