"""What the gate decided about an adapter, as an in-toto statement in a signed DSSE envelope.

It says what the audit log says. Whoever may write to the store may change that log before it is signed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safelora_vllm import __version__
from safelora_vllm.adapters.read import CONFIG, WEIGHTS, joined_digest
from safelora_vllm.errors import UsageError
from safelora_vllm.files import is_digest
from safelora_vllm.signatures.dsse import STATEMENT, sign
from safelora_vllm.signatures.keys import private_key
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.layout import AUDIT
from safelora_vllm.store.names import NameStore
from safelora_vllm.store.published import PublishedStore

PREDICATE = "https://safelora-vllm/decision/v1"
_DECISIONS = ("accepted", "refused", "unchanged")
_TOLD = (
    "adapter",
    "time",
    "actor",
    "action",
    "decision",
    "reasons",
    "version",
    "override",
    "reason",
    "exam_override",
)
_RULES = ("projectors", "policy", "ruleset", "release")


Wanted = Callable[[dict[str, Any]], bool]  # whether a record of the audit log is the one


def signed_statement(
    root: Path, name: str, key: bytes, version: int | None = None, digest: str | None = None
) -> dict[str, Any]:
    """The envelope of a decision about an adapter: without more, the one by which it is served.

    Args:
        root: of the adapter store.
        name: of the adapter.
        key: that signs, a private key in PEM.
        version: the decision that made or last judged this version.
        digest: the newest decision about this content, refused ones too.

    Raises:
        UsageError: there is no such decision, or the key cannot be used. StoreDamaged: the name's record is
        damaged, so that it is not known what is served.
    """
    signer = private_key(key)
    statement = statement_of(decision(root, name, version, digest), PublishedStore(root))
    return sign(json.dumps(statement, indent=1, sort_keys=True).encode(), signer)


def decision(root: Path, name: str, version: int | None = None, digest: str | None = None) -> dict[str, Any]:
    """The newest record of the audit log in which the gate decided about a content of a name.

    Whoever may upload under the name can have something refused there. So that is not taken for a decision
    about what is served, even if the content is the same: a refused attempt has no version.

    Args, Raises:
        As of `signed_statement`.
    """
    if version is not None:
        return _newest(root, name, lambda record: record.get("version") == version, f" of version {version}")
    if digest is not None:
        return _newest(root, name, lambda record: record.get("digest") == digest, f" of {digest:.64}")
    stored = NameStore(root).get(name)
    if stored is None:
        return _newest(root, name, lambda _: True, "")
    live = stored.live

    def of_live(record: dict[str, Any]) -> bool:
        refused = record["decision"] == "refused"
        same = (record["digest"], record.get("version")) == (live.digest, live.version)
        return same and refused is bool(live.refused)

    return _newest(root, name, of_live, f" of version {live.version}, which it has now")


def _newest(root: Path, name: str, wanted: Wanted, which: str) -> dict[str, Any]:
    def right(record: dict[str, Any]) -> bool:
        digest, decision = record.get("digest"), record.get("decision")
        of_name = record.get("adapter") == name and decision in _DECISIONS
        return of_name and is_digest(str(digest)) and wanted(record)

    log = AuditLog(root / AUDIT)
    found, all_seen = log.newest(right, 1, adapter=name)
    if not found and not all_seen:
        for record in log.read():
            found = [record] if right(record) else found
    if not found:
        raise UsageError(
            f"the audit log {root / AUDIT} has no decision about {name!r:.200}{which}: expected an adapter "
            "that the gate accepted or refused, as 'safelora-vllm audit' shows it"
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
        "_type": STATEMENT, "subject": subjects, "predicateType": PREDICATE, "predicate": predicate,
    }  # fmt: skip
