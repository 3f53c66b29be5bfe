"""Whether a server without a keys file may serve what a store has."""

from __future__ import annotations

from collections.abc import Iterable

from safelora_vllm.errors import GuardError
from safelora_vllm.store.name_record import AdapterRecord
from safelora_vllm.store.serving import tenant_of


def check_keyless(records: Iterable[AdapterRecord]) -> None:
    """Check a store's names for a server without tenants, where everybody may use every adapter.

    Raises:
        GuardError: a tenant has uploaded one.
    """
    owned = sorted(record.name for record in records if _is_a_tenants(record))
    if owned:
        more = f" and {len(owned) - 1} more" if len(owned) > 1 else ""
        raise GuardError(
            f"the adapter store has what tenants uploaded ({owned[0]!r}{more}), and without a keys file "
            "everybody could use it. Give --keys FILE (one without tenants keeps it for admins), another "
            "--adapter-store, or remove it: safelora-vllm store rm NAME"
        )


def _is_a_tenants(record: AdapterRecord) -> bool:
    """Whether a key of the tenant made a version: keys have the ids TENANT/ID, as names are TENANT/NAME."""
    tenant = tenant_of(record.name)
    return bool(tenant) and any(version.by.startswith(f"{tenant}/") for version in record.versions)
