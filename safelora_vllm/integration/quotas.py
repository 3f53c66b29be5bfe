"""A tenant's quota against what the store keeps of his: all versions of all names, each content once."""

from __future__ import annotations

from collections.abc import Mapping

from safelora_vllm.access import Principal
from safelora_vllm.allowance import Allowance
from safelora_vllm.store import AdapterRecord, NameStore
from safelora_vllm.store.records import KEPT_VERSIONS


def check_quota(names: NameStore, who: Principal, record: AdapterRecord) -> None:
    """Whether a name may get this record.

    Raises:
        QuotaExceeded: it may not; admins have no quota.
    """
    if who.tenant is not None:
        own = {**_own(names, who.tenant), record.name: record}
        who.quota.check(len(own), sum(_sizes(own).values()), record.live.rank)


def allowed(names: NameStore, who: Principal, name: str, previous: AdapterRecord | None) -> Allowance | None:
    """What is left for new content of a name; None where nothing bounds it.

    Raises:
        QuotaExceeded: there is no room for another adapter.
    """
    if who.tenant is None:
        return None
    own = _own(names, who.tenant)
    if previous is not None:  # its oldest version goes when there is one more
        own[name] = AdapterRecord(name, 0, previous.versions[1 - KEPT_VERSIONS :])
    who.quota.check(len({*own, name}), 0, 0)
    sizes = _sizes(own)
    if who.quota.bytes is None:
        return Allowance(rank=who.quota.rank)
    return Allowance(who.quota.bytes - sum(sizes.values()), list(sizes), who.quota.rank)


def _own(names: NameStore, tenant: str) -> dict[str, AdapterRecord]:
    return {name: record for name, record in names.all().items() if name.startswith(f"{tenant}/")}


def _sizes(records: Mapping[str, AdapterRecord]) -> dict[str, int]:
    """Digest → bytes of all contents."""
    return {version.digest: version.bytes for record in records.values() for version in record.versions}
