"""What the gate decided about an adapter, as an in-toto statement in a signed DSSE envelope.

It says what the audit log says. Whoever may write to the store may change that log before it is signed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safelora_vllm import __version__
from safelora_vllm.adapters.read import CONFIG, WEIGHTS, joined_digest
from safelora_vllm.errors import UsageError
from safelora_vllm.files import is_digest
from safelora_vllm.signatures.dsse import sign
from safelora_vllm.signatures.keys import private_key
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.layout import AUDIT
from safelora_vllm.store.published import PublishedStore

PREDICATE = "https://safelora-vllm/decision/v1"
_STATEMENT = "https://in-toto.io/Statement/v1"
_DECISIONS = ("accepted", "refused", "unchanged")
_TOLD = ("adapter", "time", "actor", "action", "decision", "reasons", "version", "override", "reason")
_RULES = ("projectors", "policy", "ruleset", "release")


def signed_statement(root: Path, name: str, key: bytes) -> dict[str, Any]:
    """The envelope of the newest decision about an adapter.

    Args:
        root: of the adapter store.
        name: of the adapter.
        key: that signs, a private key in PEM.

    Raises:
        UsageError: there is no such decision, or the key cannot be used.
    """
    signer = private_key(key)
    statement = statement_of(newest_decision(root, name), PublishedStore(root))
    return sign(json.dumps(statement, indent=1, sort_keys=True).encode(), signer)


def newest_decision(root: Path, name: str) -> dict[str, Any]:
    """The newest record of the audit log in which the gate decided about a content of a name.

    Raises:
        UsageError: there is none.
    """

    def wanted(record: dict[str, Any]) -> bool:
        digest, decision = record.get("digest"), record.get("decision")
        return record.get("adapter") == name and decision in _DECISIONS and is_digest(str(digest))

    log = AuditLog(root / AUDIT)
    found, all_seen = log.newest(wanted, 1, adapter=name)
    if not found and not all_seen:
        for record in log.read():
            found = [record] if wanted(record) else found
    if not found:
        raise UsageError(
            f"the audit log {root / AUDIT} has no decision about {name!r:.200}: expected the name of an "
            "adapter that the gate accepted or refused, as 'safelora-vllm audit' shows it"
        )
    return found[0]


def statement_of(record: dict[str, Any], published: PublishedStore) -> dict[str, Any]:
    """A record as an in-toto statement. What an older release did not record is null.

    The digest of a folder is that of model-signing: the sha256 of its two files' sha256.
    """
    subjects = [{"name": "upload", "digest": {"sha256": record["digest"]}}]
    key = record.get("published") or ""
    if is_digest(key) and published.find(key) is not None and (files := published.digests(key)):
        sides = (bytes.fromhex(files[name]) for name in (CONFIG, WEIGHTS))
        subjects.append({"name": "published", "digest": {"sha256": joined_digest(*sides)}})
    predicate = {field: record.get(field) for field in (*_TOLD, *_RULES)}
    predicate |= {"published": key or None, "signed_by": record.get("signed_by"), "stated_by": __version__}
    return {
        "_type": _STATEMENT, "subject": subjects, "predicateType": PREDICATE, "predicate": predicate,
    }  # fmt: skip
