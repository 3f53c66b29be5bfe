"""What a tenant's quota leaves, to the byte and to the rank."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from safelora_vllm.errors import QuotaExceeded
from safelora_vllm.policy import Policy
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.tenants.quotas import Allowance


def report(ranks: Sequence[int]) -> Report:
    """A report on modules of these ranks."""
    modules = [ModuleReport(f"m{n}", rank, 0.1, 0.1, 0.1, 0.1, "projected") for n, rank in enumerate(ranks)]
    return Report("acme/x", "a" * 64, "b" * 64, Policy(), True, [], modules)


def exactly(told: str) -> str:
    """A pattern for the whole message."""
    return "^" + re.escape(f"over the tenant's quota: {told}") + "$"


@pytest.mark.parametrize(
    ("left", "nbytes", "told"),
    [
        (None, 10**15, ""), (2000, 2000, ""), (0, 0, ""),
        (2000, 2001, "the adapter has 2,001 bytes, 2,000 are left of max_bytes"),
        (1, 2, "the adapter has 2 bytes, 1 are left of max_bytes"),
        (0, 1, "the adapter has 1 bytes, 0 are left of max_bytes"),
        (-5, 1, "the adapter has 1 bytes, 0 are left of max_bytes"),
    ],
)  # fmt: skip
def test_new_content_fits_into_what_is_left(left: int | None, nbytes: int, told: str) -> None:
    allowance = Allowance(bytes=left, owned=["a" * 64])
    allowance.check_bytes("a" * 64, nbytes)  # it is stored already and takes no more
    if not told:
        return allowance.check_bytes("b" * 64, nbytes)
    advice = "Remove an adapter, or ask the operator to raise the limit in the keys file"
    with pytest.raises(QuotaExceeded, match=exactly(f"{told}. {advice}")):
        allowance.check_bytes("b" * 64, nbytes)


@pytest.mark.parametrize(
    ("largest", "ranks", "told"),
    [
        (None, [512], ""), (0, [], ""), (8, [8, 1], ""),
        (8, [4, 9, 1], "the adapter has rank 9, max_rank is 8"),
        (0, [1], "the adapter has rank 1, max_rank is 0"),
    ],
)  # fmt: skip
def test_no_module_has_a_larger_rank(largest: int | None, ranks: list[int], told: str) -> None:
    allowance = Allowance(rank=largest)
    if not told:
        return allowance.check_rank(report(ranks))
    advice = "Train it with a smaller one, or ask the operator to raise the limit in the keys file"
    with pytest.raises(QuotaExceeded, match=exactly(f"{told}. {advice}")):
        allowance.check_rank(report(ranks))
