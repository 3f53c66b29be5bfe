"""The same content under the same name again: controllers that reconcile load what they do not see listed."""

from __future__ import annotations

from safelora_vllm.errors import codes_of
from safelora_vllm.integration.server.published_copies import Judged
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.store import AdapterRecord

LOAD = "load"  # the action of vLLM's own call in the audit log


async def served_again(reconciler: Reconciler, before: AdapterRecord | None, judged: Judged) -> Entry | None:
    """The name's entry, when it serves the very content that was judged; nothing else is done then.

    A name that was withdrawn, or is being prepared, is brought back first, as the version that it is.

    Args:
        before: of the name, as the store has it.
        judged: what is to be loaded.

    Returns:
        None where the content is another one, or cannot be served as the record says.
    """
    if before is None or judged.report.digest != before.live.digest:
        return None
    if not is_served(reconciler, before.name):
        await reconciler.sync()
        await reconciler.prepare(before.name)
    entry = reconciler.registry.get(before.name)
    known = entry and entry.served and entry.version  # another server may have replaced it meanwhile
    return entry if known and known.digest == judged.report.digest else None


def is_overridden(before: AdapterRecord | None, judged: Judged) -> bool:
    """Whether an admin has the content that a name serves served whatever the rules say of it.

    That is no word on who signed it.
    """
    live = before and before.live
    allowed = live and live.digest == judged.report.digest and (live.override or live.exam_override)
    return bool(allowed) and "signature" not in codes_of(judged.report.reasons)


def is_unchanged(reconciler: Reconciler, before: AdapterRecord | None, judged: Judged) -> bool:
    """Whether a name serves the very copy that was judged: the same content, by the same rules.

    An override is for its content: uploading that again takes it back. So is one of the exam. Another key's
    signature is news.
    """
    entry = before and reconciler.registry.get(before.name)
    if not before or not entry or not entry.served or before.live.override or before.live.exam_override:
        return False
    signed = judged.report.signed_by in ("", before.live.signed_by)
    return signed and before.live.digest == judged.report.digest and entry.served.key == judged.judgement.key


def may_load(reconciler: Reconciler, before: AdapterRecord, judged: Judged) -> bool:
    """Whether a name that is not served takes a new version without being asked to replace what it has.

    It does for the same content, and where today's rules refuse what it has.
    """
    entry = reconciler.registry.get(before.name)
    if entry is None or entry.served:
        return False
    return entry.refusal is not None or judged.report.digest == before.live.digest


def is_served(reconciler: Reconciler, name: str) -> bool:
    """Whether a name answers requests now."""
    entry = reconciler.registry.get(name)
    return entry is not None and entry.served is not None


def live_number(reconciler: Reconciler, name: str) -> int | None:
    """The number of a name's version, as far as this process knows it."""
    entry = reconciler.registry.get(name)
    return entry.version.version if entry and entry.version else None
