"""What a server without a keys file may not serve: it shows every adapter to everybody."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safelora_vllm.errors import GuardError
from safelora_vllm.store.name_record import AdapterRecord, tenant_of

_ADMIN = "admin"  # no tenant's name: the keys of admins have ids ADMIN/ID
NO_KEYS_FILE = "it is a tenant's, and without a keys file everybody could use it"


def is_a_tenants(record: AdapterRecord) -> bool:
    """Whether a name TENANT/NAME belongs to a tenant: they, or a server that knows tenants, made a version.

    A slash alone makes no tenant: without a keys file an admin may use one as they like.
    """
    tenant = tenant_of(record.name)
    return bool(tenant) and any(
        version.apart or (tenant != _ADMIN and version.by.startswith(f"{tenant}/"))
        for version in record.versions
    )


def check_keyless(root: str | Path, records: Iterable[AdapterRecord]) -> None:
    """Check a store's names for a server without a keys file.

    Raises:
        GuardError: one is a tenant's.
    """
    if owned := sorted(record.name for record in records if is_a_tenants(record)):
        more = f" and {len(owned) - 1} more" if len(owned) > 1 else ""
        raise GuardError(
            f"the adapter store has adapters of tenants ({owned[0]!r}{more}), and without a keys file "
            "everybody could use them. Give --keys FILE (one without tenants keeps them for admins), another "
            f"--adapter-store, or remove them: safelora-vllm store rm NAME --adapter-store {root}"
        )
