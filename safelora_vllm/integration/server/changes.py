"""Uploading, replacing, rolling back, re-judging and removing adapters, each one straight function.

Order of every change: the gate publishes, the workers load, the store's name is changed (the moment from
which it counts, on all servers), the audit log has it, this process serves it. What fails before the name
is changed leaves everything as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelora_vllm.errors import AdapterRefused, AlreadyLoaded, Forbidden, UsageError, refuse
from safelora_vllm.integration.server.commit import Commits, changed_meanwhile, taken, version_of
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.repeated import (
    LOAD,
    is_overridden,
    is_unchanged,
    may_load,
    served_again,
)
from safelora_vllm.integration.server.visibility import check_visible, look_up, unknown
from safelora_vllm.policy import CAPS
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import AdapterRecord, Version
from safelora_vllm.store.audit_log import DELETE_VERSION, EXAM, AuditLog
from safelora_vllm.tenants.principal import Principal, check_name
from safelora_vllm.tenants.quotas import allowed

_NO_REASON = "an override of the exam needs a reason, which the report and the audit log keep"


@dataclass
class Manager:
    """All changes that callers make, in one API server process.

    roots: folders that loads by path may read; none means every folder. max_adapter_bytes: largest file
    that is received. hub: whether uploads may name a hub repository.
    """

    reconciler: Reconciler
    audit: AuditLog
    is_base_model: Callable[[str], bool]
    roots: tuple[Path, ...] = ()
    max_adapter_bytes: int = ServerSettings.max_adapter_bytes
    hub: bool = False

    def __post_init__(self) -> None:
        self._commits = Commits(self.reconciler, self.audit)

    def start(self) -> None:
        """Begin what is done beside the calls. It ends with the reconciler."""
        self.reconciler.background.spawn(self._commits.count_refusals())

    async def add(
        self,
        who: Principal,
        name: str,
        source: Path,
        *,
        replace: bool = False,
        action: str = "upload",
        exam_override: str = "",
    ) -> Entry:
        """Let a folder or archive pass the gate and serve it under ``name``, as a new version.

        The content that the name serves already is not a new version; with ``replace`` it is where other
        rules hold now, but for vLLM's own call (action `LOAD`), which controllers repeat. That call also
        gives new content to a name whose adapter is refused. One that is unavailable for a moment stays.

        Args:
            who: the caller. name: for the adapter. source: its folder or archive.
            replace: what the name has. action: for the audit log.
            exam_override: an admin's reason to serve it whatever its exam says.

        Raises:
            UsageError: nothing there, or a name that cannot be used. Forbidden: not this caller's name, or no
                admin wants the override.
            AlreadyLoaded: the name is taken and ``replace`` is false. ChangedMeanwhile: by another server.
            QuotaExceeded: the tenant's.
            AdapterRefused: the gate refuses, with all its reasons.
            Unavailable: the gate, the store or the engine is out of order.
        """
        self.check(who, name)
        exam_override = self.check_override(who, exam_override, name)
        async with self._commits.changing(who, name, action) as start:
            self._commits.check_share(who)
            previous = await self._commits.record(name)
            policy = previous.live.next_policy if previous else {}
            allowance = await asyncio.to_thread(allowed, self.reconciler.names, who, name, previous)
            judged = await self.reconciler.copies.admit(
                str(source), name, policy, allowance, bool(exam_override)
            )
            # An override makes a version of its own, also where the content is the same.
            if not exam_override and (not replace or action == LOAD):
                same = await served_again(self.reconciler, previous, judged)
                if same is not None:
                    # Controllers that repeat vLLM's own call get what is served; a refusal is on record.
                    with suppress(AdapterRefused) if action == LOAD else nullcontext():
                        if not is_overridden(previous, judged):
                            await self._commits.check_accepted(who, name, action, judged)
                    return same
            elif not exam_override and is_unchanged(self.reconciler, previous, judged):
                served = self.reconciler.registry[name]
                await self._commits.unchanged(who, name, action, judged)
                return served
            loads = action == LOAD
            if previous and not replace and not (loads and may_load(self.reconciler, previous, judged)):
                if await self._commits.record(name) is None:
                    raise changed_meanwhile(name)
                raise taken(name)
            await self._commits.check_accepted(who, name, action, judged)
            override = bool(exam_override)
            version = version_of(judged, who, policy, reason=exam_override, exam_override=override)
            return await self._commits.commit(who, name, action, judged, previous, version, start)

    async def roll_back(self, who: Principal, name: str, number: int) -> Entry:
        """Serve an earlier version's content again, as a new version.

        Raises:
            UnknownAdapter, Forbidden, UsageError: no such version. AdapterRefused: the policy is
            stricter than it was. ChangedMeanwhile: by another server, or removed. TooManyChanges.
        """
        async with self._commits.changing(who, name, "rollback") as start:
            record = await self._commits.known(who, name)
            earlier = record.version(number)
            # A stricter policy set since then stays. One that an admin loosened for that content comes back,
            # but for admins only: it may have been taken back.
            mine = {} if earlier.override and who.kind != "admin" else earlier.policy
            policy = record.live.next_policy or mine
            override = earlier.override and policy == earlier.policy and who.kind == "admin"
            await self._check_signer(who, name, earlier)
            self._commits.count(who)  # before the work
            exam_override = earlier.exam_override and who.kind == "admin"
            judged = await self.reconciler.copies.ensure(
                earlier.digest, name, policy, override, exam_override
            )
            judged = judged.signed(earlier.signed_by)
            reason = f"rollback to version {number}"
            await self._commits.check_accepted(who, name, "rollback", judged, override, reason)
            version = version_of(
                judged, who, policy, override, record.live.next_policy, reason, exam_override
            )
            return await self._commits.commit(
                who, name, "rollback", judged, record, version, start, earlier=earlier
            )

    async def set_policy(
        self, who: Principal, name: str, values: dict[str, Any], override: bool, reason: str
    ) -> Entry:
        """Judge an adapter by rules of its own. Empty ``values``: by its tenant's or the server's again.

        Raises:
            UnknownAdapter. PolicyError: values out of range, or without effect.
            UsageError: less strict than those without ``override`` and a reason.
            AdapterRefused: refused under the new policy; the old one stays. ChangedMeanwhile: by another
            server.
        """
        async with self._commits.changing(who, name, "policy") as start:
            record = await self._commits.known(who, name)
            default = await asyncio.to_thread(self.reconciler.copies.policy, name)
            wanted = default.with_values(values)
            wanted.check_effective(field for field in values if values[field] != getattr(default, field))
            loosened = not wanted.at_least_as_strict(default)
            if loosened and not (override and reason.strip()):
                own = default != self.reconciler.copies.state.policy
                whose = "the tenant's in the keys file" if own else "the server's"
                raise UsageError(
                    f"this policy is less strict than {whose}, or cannot be "
                    "compared with it (another method, or another energy of csulora); give both "
                    '"override": true and a "reason", '
                    "which the report and the audit log keep"
                )
            # All of the rule, so that it means the same when the server's policy is another one. A cap that
            # nobody overrode is the server's, whatever that will be.
            policy = wanted.to_mapping() if values else {}
            if values and (default.opinion or "opinion" in values):
                policy["opinion"] = wanted.opinion  # an override, of the exam too, may be about that
            if loosened:
                policy = {field: policy[field] for field in policy if field not in CAPS or field in values}
            live = record.live
            exam_override = live.exam_override  # it is of this content, whatever its policy is
            judged = await self.reconciler.copies.ensure(live.digest, name, policy, loosened, exam_override)
            judged = judged.signed(live.signed_by)
            await self._commits.check_accepted(who, name, "policy", judged, loosened, reason)
            kept = reason or (live.reason if exam_override else "")
            version = version_of(judged, who, policy, loosened, live.next_policy, kept, exam_override)
            return await self._commits.commit(who, name, "policy", judged, record, version, start)

    async def set_exam_override(self, who: Principal, name: str, override: bool, reason: str) -> Entry:
        """Serve what a name has whatever its exam says, by the policy that holds without an exam, with a
        second opinion where the ladder has one; or not any more: then it is judged anew, and withdrawn until
        it passes.

        Raises:
            UnknownAdapter. UsageError: no reason, or nothing to override.
            ChangedMeanwhile: by another server.
            AdapterRefused: by the gate; without the override also by the exam.
        """
        async with self._commits.changing(who, name, EXAM, waits=override) as start:
            record = await self._commits.known(who, name)
            live, copies = record.live, self.reconciler.copies
            if override:
                if not (reason := self.check_override(who, reason, name)):
                    raise UsageError(_NO_REASON)
                judged = await copies.ensure(live.digest, name, live.policy, live.override, True)
                judged = judged.signed(live.signed_by)
                await self._commits.check_accepted(who, name, EXAM, judged, live.override, reason)
                version = version_of(
                    judged, who, live.policy, live.override, live.next_policy, reason, exam_override=True
                )
                return await self._commits.commit(who, name, EXAM, judged, record, version, start)
            if not live.exam_override:
                raise UsageError(f"{name} has no override of its exam: there is nothing to take back")
            await self._commits.take_back_override(who, name, live, reason)
        await self.reconciler.prepare(name)
        entry = look_up(self.reconciler.registry, who, name)
        entry.current()
        return entry

    def check_override(self, who: Principal, reason: str, name: str | None = None) -> str:
        """The reason of an override of the exam; empty where none is wanted.

        Raises:
            Forbidden: the caller is no admin.
            UsageError: the reason is blank, or no exam is enforced for the name.
        """
        if reason and who.kind != "admin":
            raise Forbidden("an override of the exam needs an admin key")
        if reason and not reason.strip():
            raise UsageError(_NO_REASON)
        if reason and name is not None and not self.reconciler.copies.exam.terms(name).enforced:
            raise UsageError(f"no exam is enforced for {name}: there is nothing to override")
        return reason.strip()

    async def remove(self, who: Principal, name: str, action: str = "delete") -> None:
        """Stop serving a name on every server; its weights are freed when its last request has ended.

        Raises:
            UnknownAdapter, Forbidden.
        """
        if self._static(name) and who.kind == "admin":
            raise UsageError(f"{name} comes from --lora-modules; start the server without it")
        check_visible(who, name)
        # The first upload of a name serves nothing yet: as in vLLM, the name is removed when that has ended.
        is_new = await self._commits.record(name) is None
        async with self._commits.changing(who, name, action, waits=is_new):
            await self._commits.known(who, name)
            await self._commits.remove(who, action, name, lambda _: None)

    async def remove_version(self, who: Principal, name: str, number: int) -> None:
        """Forget an old version, so that it does not count any more.

        Raises:
            UnknownAdapter, Forbidden. UsageError: no such version, or the one that is served.
        """
        async with self._commits.changing(who, name, DELETE_VERSION, waits=False):
            await self._commits.known(who, name)

            def change(record: AdapterRecord | None) -> AdapterRecord:
                if record is None:
                    raise unknown(name)
                return record.without(number)

            await self._commits.remove(who, DELETE_VERSION, name, change, version=number)

    async def refused_source(self, who: Principal, name: str, action: str, codes: Sequence[str]) -> None:
        """Record that a remote source was refused. codes: of the reasons."""
        await self._commits.refused(who, action, name, "source", decision="refused", reasons=list(codes))

    async def _check_signer(self, who: Principal, name: str, earlier: Version) -> None:
        """Whether a version that is to be served again is signed as today's keys file requires.

        Raises:
            AdapterRefused: it is not. The refusal is in the audit log.
        """
        signing = await asyncio.to_thread(self.reconciler.copies.signing, name)
        if signing is None or not signing.required or earlier.signed_by in signing.keys:
            return
        found = f"was signed with {earlier.signed_by}" if earlier.signed_by else "is not signed"
        error = refuse(
            "signature",
            f"version {earlier.version} of {name} {found}: expected {signing.expected}, because this "
            "tenant's uploads have to be signed (require_signature). Sign its content and upload it again",
        )
        refused = {"decision": "refused", "digest": earlier.digest, "reasons": error.codes}
        await self._commits.refused(who, "rollback", name, "gate", **refused)
        raise error

    def check_root(self, path: str) -> Path:
        """The path of a load by path.

        Raises:
            UsageError: no path. Forbidden: it lies outside of the folders that the operator allows.
        """
        if len(path) > 4096 or "\0" in path:
            raise UsageError("a path has at most 4,096 characters and no zero byte")
        try:
            resolved = Path(path).resolve()
        except (OSError, RuntimeError) as error:  # too long a name, or links in a ring
            raise UsageError(f"{path!r:.300} cannot be followed: {error}") from None
        if self.roots and not any(resolved.is_relative_to(root) for root in self.roots):
            raise Forbidden(f"{path!r:.300} is outside of the server's --adapter-root folders")
        return resolved

    def check(self, who: Principal, name: str) -> None:
        """Whether the caller may give a name to an adapter, before anything of it is received.

        Raises:
            UsageError, Forbidden, AlreadyLoaded.
        """
        check_name(name)
        if not who.may_manage(name):
            own = f"{who.tenant}/NAME" if who.tenant else "TENANT/NAME"
            raise Forbidden(f"this key may not change {name!r:.200}: expected a name of its own, {own}")
        if self.is_base_model(name):
            raise UsageError(f"{name!r:.200} is the base model's name; choose another")
        if self._static(name):
            raise AlreadyLoaded(f"{name} comes from --lora-modules; choose another name")

    def _static(self, name: str) -> bool:
        """Whether a name comes from ``--lora-modules``."""
        entry = self.reconciler.registry.get(name)
        return entry is not None and entry.folder is not None
