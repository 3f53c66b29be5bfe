"""What the keys file says of signatures: a tenant's public keys, and whether its uploads need one."""

from __future__ import annotations

from typing import Any

from safelora_vllm.errors import KeysError, UsageError
from safelora_vllm.signatures.keys import key_id, public_key
from safelora_vllm.signatures.rule import SigningRule

ENTRIES = ("signing_keys", "require_signature")
_MOST = 20


def signing_rule(entry: str, table: dict[str, Any]) -> SigningRule | None:
    """The rule in a tenant's table; None where there are no keys.

    Args:
        entry: of the keys file, for messages.
        table: the tenant's.

    Raises:
        KeysError: a key is of another kind or there twice, or a signature is required without keys.
    """
    keys, required = table.get("signing_keys", []), table.get("require_signature", False)
    if not isinstance(keys, list) or len(keys) > _MOST or not all(isinstance(pem, str) for pem in keys):
        raise KeysError(
            f"{entry}.signing_keys is {keys!r:.40}: expected a list of at most {_MOST} public keys in PEM"
        )
    if not isinstance(required, bool):
        raise KeysError(f"{entry}.require_signature is {required!r:.40}; give true or false")
    if required and not keys:
        raise KeysError(f"{entry}.require_signature is true without keys: expected signing_keys in [{entry}]")
    found: dict[str, str] = {}
    for number, pem in enumerate(keys, start=1):
        try:
            identity = key_id(public_key(pem))
        except UsageError as error:
            raise KeysError(f"{entry}.signing_keys, number {number}: {error}") from None
        if identity in found:
            raise KeysError(f"{entry}.signing_keys, number {number}: the key {identity} is there twice")
        found[identity] = pem
    return SigningRule(found, required) if found else None
