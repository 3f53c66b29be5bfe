"""A tenant's quota against what the store keeps of theirs, before an upload and when it gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from safelora_vllm.errors import QuotaExceeded
from safelora_vllm.store import AdapterRecord, NameStore, Version
from safelora_vllm.store.name_record import KEPT_VERSIONS
from safelora_vllm.tenants.principal import Principal
from safelora_vllm.tenants.quotas import Allowance, Quota, allowed, check_quota

Content = tuple[str, int]  # a letter for its digest, and its bytes
A, B, C = ("a", 40), ("b", 30), ("c", 31)
ACME = {"acme/one": [A], "acme/two": [B]}  # 70 bytes


def principal(**limits: int | None) -> Principal:
    """The tenant acme with these limits."""
    return Principal("tenant", "acme/ci", "acme", Quota(**limits))


def record(name: str, contents: Sequence[Content], rank: int = 4) -> AdapterRecord:
    """A name with these versions, of which the last is served."""
    made = AdapterRecord(name)
    for letter, size in contents:
        made = made.with_version(Version(0, letter * 64, size, rank, 0.0, "acme/ci"))
    return made


def stored(root: Path, names: dict[str, list[Content]]) -> NameStore:
    """A store with these names."""
    store = NameStore(root)
    for name, contents in names.items():
        new = record(name, contents)
        store.update(name, lambda _, new=new: new)
    return store


def many(count: int) -> list[Content]:
    """Contents of 1, 2, 4… bytes: their sum says which of them are in it."""
    return [("0123456789abcdef"[number], 2**number) for number in range(count)]


@pytest.mark.parametrize(
    ("names", "new", "quota", "told"),
    [
        (ACME, record("acme/new", [B]), {"bytes": 70}, ""),
        (ACME, record("acme/new", [C]), {"bytes": 101}, ""),
        (ACME, record("acme/new", [C]), {"bytes": 100}, "max_bytes is 100, 101 would be needed"),
        (ACME, record("acme/one", [A, C]), {"bytes": 100}, "max_bytes is 100, 101 would be needed"),
        (ACME, record("acme/one", [C]), {"bytes": 61}, ""),
        (ACME, record("acme/one", [C]), {"bytes": 60}, "max_bytes is 60, 61 would be needed"),
        ({"acme/one": [A, B]}, record("acme/new", [C]), {"bytes": 100}, "max_bytes is 100, 101 would be"),
        ({"acme2/x": [A], "acm/x": [A], "acme": [A], "x": [A]}, record("acme/new", [C]), {"bytes": 31}, ""),
        ({"acme2/x": [A], "acm/x": [A], "acme": [A], "x": [A]}, record("acme/new", [C]), {"adapters": 1}, ""),
        (ACME, record("acme/new", [C]), {"adapters": 3}, ""),
        (ACME, record("acme/new", [C]), {"adapters": 2}, "max_adapters is 2, 3 would be needed"),
        (ACME, record("acme/two", [B, C]), {"adapters": 2}, ""),
        (ACME, record("acme/new", [C], rank=8), {"rank": 8}, ""),
        (ACME, record("acme/new", [C], rank=9), {"rank": 8}, "max_rank is 8, 9 would be needed"),
        (ACME, record("acme/new", [C]), {}, ""),
    ],
    ids=[
        "a-content-counts-once", "as-much-as-allowed", "a-byte-too-much", "another-version", "kept-instead",
        "kept-instead-too-much", "older-versions-count", "others-bytes", "others-adapters",
        "as-many-as-allowed", "one-too-many", "a-name-counts-once", "rank-as-allowed", "rank-too-large",
        "no-limits",
    ],
)  # fmt: skip
def test_what_a_name_may_get(
    names: dict[str, list[Content]], new: AdapterRecord, quota: dict[str, int], told: str, tmp_path: Path
) -> None:
    store = stored(tmp_path, names)
    check_quota(store, Principal("admin", "admin/ops"), new)
    if not told:
        return check_quota(store, principal(**quota), new)
    with pytest.raises(QuotaExceeded, match=told):
        check_quota(store, principal(**quota), new)


def test_the_rank_is_that_of_the_version_to_be_served(tmp_path: Path) -> None:
    store, tenant = stored(tmp_path, {}), principal(rank=8)
    large, small = record("acme/x", [A], rank=16), record("acme/x", [B], rank=8)
    check_quota(store, tenant, large.with_version(small.live))
    with pytest.raises(QuotaExceeded, match="max_rank is 8, 16 would be needed"):
        check_quota(store, tenant, small.with_version(large.live))


def test_what_is_left_for_new_content(tmp_path: Path) -> None:
    store = stored(tmp_path, {**ACME, "acme/three": [A], "acme2/x": [C], "x": [C]})
    admin, tenant = Principal("admin", "admin/ops"), principal(bytes=100, rank=8)
    owned = {"a" * 64, "b" * 64}
    for name in ("acme/new", "acme/one"):
        left = allowed(store, tenant, name, store.get(name))
        assert left is not None and (left.bytes, left.rank, set(left.owned)) == (30, 8, owned)
        assert allowed(store, principal(rank=8), name, store.get(name)) == Allowance(rank=8)
        assert allowed(store, principal(), name, store.get(name)) == Allowance()
        none = allowed(store, principal(bytes=0), name, store.get(name))
        assert none is not None and none.bytes == -70, "a limit of nothing is a limit"
        assert allowed(store, admin, name, store.get(name)) is None


def test_of_a_name_with_all_its_versions_the_oldest_makes_room(tmp_path: Path) -> None:
    for count in (1, KEPT_VERSIONS - 1, KEPT_VERSIONS):
        contents = many(count)
        store = stored(tmp_path / str(count), {"acme/x": contents})
        stay = contents[1:] if count == KEPT_VERSIONS else contents
        left = allowed(store, principal(bytes=5000), "acme/x", store.get("acme/x"))
        assert left is not None and left.bytes == 5000 - sum(size for _, size in stay)
        assert list(left.owned) == [letter * 64 for letter, _ in stay] and left.rank is None
        other = allowed(store, principal(bytes=5000), "acme/new", None)
        assert other is not None and other.bytes == 5000 - sum(size for _, size in contents)


@pytest.mark.parametrize("count", [1, KEPT_VERSIONS - 1, KEPT_VERSIONS])
def test_content_as_large_as_what_is_left_gets_its_name(count: int, tmp_path: Path) -> None:
    store, tenant = stored(tmp_path, {"acme/x": many(count), "acme/y": [A]}), principal(bytes=2000)
    for name in ("acme/x", "acme/new"):
        before = store.get(name)
        left = allowed(store, tenant, name, before)
        assert left is not None
        for size, fits in ((left.bytes or 0, True), ((left.bytes or 0) + 1, False)):
            new = Version(0, "f" * 64, size, 4, 0.0, "acme/ci")
            after = (before or AdapterRecord(name)).with_version(new)
            if fits:
                check_quota(store, tenant, after)
            else:
                with pytest.raises(QuotaExceeded, match="max_bytes is 2000, 2001 would be needed"):
                    check_quota(store, tenant, after)


def test_another_adapter_needs_a_place_before_it_is_looked_at(tmp_path: Path) -> None:
    store, full = stored(tmp_path, ACME), principal(adapters=2)
    with pytest.raises(QuotaExceeded, match="max_adapters is 2, 3 would be needed"):
        allowed(store, full, "acme/new", None)
    assert allowed(store, full, "acme/one", store.get("acme/one")) == Allowance()
    assert allowed(store, principal(adapters=3), "acme/new", None) == Allowance()
