"""A tenant's new versions in a minute and a day have a bound, an admin's have none."""

from __future__ import annotations

import pytest

from safelora_vllm.integration.server.change_limit import A_DAY, A_MINUTE, ChangeLimit, TooManyChanges


def test_a_tenant_has_its_share_of_a_minute() -> None:
    now = [100.0]
    limit = ChangeLimit(lambda: now[0])
    for _ in range(A_MINUTE):
        limit.take("acme")
        now[0] += 0.5
    with pytest.raises(
        TooManyChanges, match=f"{A_MINUTE} new versions in a minute; try again in 31 s"
    ) as refused:
        limit.take("acme")
    assert refused.value.seconds == 31
    limit.take("other")
    now[0] += 30.0
    limit.take("acme")
    with pytest.raises(TooManyChanges, match="try again in 1 s"):
        limit.take("acme")


def test_a_tenant_has_its_share_of_a_day() -> None:
    """Each version takes ids of adapters, which never come back."""
    now = [0.0]
    limit = ChangeLimit(lambda: now[0])
    for _ in range(A_DAY):
        limit.take("acme")
        now[0] += 60.0
    with pytest.raises(TooManyChanges, match="its 1,000 new versions in a day; try again in 26401 s"):
        limit.take("acme")
    now[0] = 86400.0
    limit.take("acme")


def test_admins_have_no_bound() -> None:
    limit = ChangeLimit()
    for _ in range(2 * A_MINUTE):
        limit.take(None)
