"""Whether a server without a keys file may serve what a store has: it shows every adapter to everybody."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safelora_vllm.errors import GuardError
from safelora_vllm.files import make_folder, replace_file, writing
from safelora_vllm.store.layout import TENANTS
from safelora_vllm.store.name_record import AdapterRecord
from safelora_vllm.store.serving import tenant_of


def mark_kept_apart(root: str | Path) -> None:
    """Note in a store that a server with a keys file serves it: its names TENANT/NAME are a tenant's.

    Raises:
        StoreUnavailable: the disk is full or not writable.
    """
    if not (marker := Path(root) / TENANTS).exists():
        with writing(Path(root)):
            make_folder(Path(root))
            replace_file(marker, b"")


def check_keyless(root: str | Path, records: Iterable[AdapterRecord]) -> None:
    """Check a store and its names for a server without a keys file.

    Raises:
        GuardError: it has a tenant's adapter: one that they uploaded, or any TENANT/NAME where a server with
            a keys file has served the store.
    """
    apart = (Path(root) / TENANTS).exists()
    owned = sorted(r.name for r in records if tenant_of(r.name) and (apart or _is_a_tenants(r)))
    if owned:
        more = f" and {len(owned) - 1} more" if len(owned) > 1 else ""
        raise GuardError(
            f"the adapter store has adapters of tenants ({owned[0]!r}{more}), and without a keys file "
            "everybody could use them. Give --keys FILE (one without tenants keeps them for admins), another "
            "--adapter-store, or remove them: safelora-vllm store rm NAME"
        )


def _is_a_tenants(record: AdapterRecord) -> bool:
    """Whether a key of the tenant made a version. Their ids are TENANT/ID."""
    return any(version.by.startswith(f"{tenant_of(record.name)}/") for version in record.versions)
