"""Uploading, replacing, rolling back, re-judging and removing adapters, each one straight function.

Order of every change: the gate publishes, the workers load, the store's name is changed (the moment from
which it counts, on all servers), this process serves it, the audit log has it. What fails before the name
is changed leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from safelora_vllm.errors import (
    AdapterRefused,
    AlreadyLoaded,
    ChangedMeanwhile,
    Forbidden,
    QuotaExceeded,
    SafeLoRAError,
    UsageError,
)
from safelora_vllm.integration.server.decisions import audit_fields, log, version_fields
from safelora_vllm.integration.server.published_copies import Copies, Judged
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.schemas import report_of
from safelora_vllm.integration.server.usage import usage_of
from safelora_vllm.integration.server.visibility import look_up, unknown
from safelora_vllm.policy import CAPS
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import AdapterRecord, Version
from safelora_vllm.store.audit_log import DELETE_VERSION, AuditLog
from safelora_vllm.tenants.keys_file import Tenant
from safelora_vllm.tenants.principal import Principal, check_name
from safelora_vllm.tenants.quotas import allowed, check_quota, own_records


@dataclass
class Manager:
    """All changes that callers make, in one API server process.

    roots: folders that loads by path may read; none means every folder. max_adapter_bytes: largest file
    that is received. hub: whether uploads may name a hub repository. tenants: of the keys file, as it is now.
    tenant_reports: whether others than admins see the figures of each module.
    """

    reconciler: Reconciler
    audit: AuditLog
    is_base_model: Callable[[str], bool]
    roots: tuple[Path, ...] = ()
    max_adapter_bytes: int = ServerSettings.max_adapter_bytes
    hub: bool = False
    tenants: Callable[[], Mapping[str, Tenant]] = dict
    tenant_reports: str = ServerSettings.tenant_reports
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    async def add(
        self, who: Principal, name: str, source: Path, *, replace: bool = False, action: str = "upload"
    ) -> Entry:
        """Let a folder or archive pass the gate and serve it under ``name``, as a new version.

        Raises:
            UsageError: nothing there, or a name that cannot be used. Forbidden: not this caller's name.
            AlreadyLoaded: the name is taken and ``replace`` is false. ChangedMeanwhile: by another server.
            QuotaExceeded: the tenant's.
            AdapterRefused: the gate refuses, with all its reasons.
            Unavailable: the gate, the store or the engine is out of order.
        """
        self.check(who, name)
        async with self._changing(who, name, action) as start:
            previous = await self._record(name)
            if previous is not None and not replace:
                raise _taken(name)
            policy = previous.live.next_policy if previous else {}
            allowance = await asyncio.to_thread(allowed, self.reconciler.names, who, name, previous)
            judged = await self._copies.admit(str(source), name, policy, allowance)
            await self._check_accepted(who, name, action, judged)
            version = _version(judged, who, policy)
            return await self._commit(who, name, action, judged, previous, version, start)

    async def roll_back(self, who: Principal, name: str, number: int) -> Entry:
        """Serve an earlier version's content again, as a new version.

        Raises:
            UnknownAdapter, Forbidden, UsageError: no such version. AdapterRefused: the policy is
            stricter than it was. ChangedMeanwhile: by another server.
        """
        async with self._changing(who, name, "rollback") as start:
            record = await self._known(who, name)
            earlier = record.version(number)
            # A stricter policy set since then stays. One that an admin loosened for that content comes back,
            # but for admins only: it may have been taken back.
            mine = {} if earlier.override and who.kind != "admin" else earlier.policy
            policy = record.live.next_policy or mine
            override = earlier.override and policy == earlier.policy and who.kind == "admin"
            judged = await self._copies.ensure(earlier.digest, name, policy, override)
            reason = f"rollback to version {number}"
            await self._check_accepted(who, name, "rollback", judged, override, reason)
            version = _version(judged, who, policy, override, record.live.next_policy, reason)
            return await self._commit(who, name, "rollback", judged, record, version, start)

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
        async with self._changing(who, name, "policy") as start:
            record = await self._known(who, name)
            default = await asyncio.to_thread(self._copies.policy, name)
            wanted = default.with_values(values)
            wanted.check_effective(field for field in values if values[field] != getattr(default, field))
            loosened = not wanted.at_least_as_strict(default)
            if loosened and not (override and reason.strip()):
                own = default != self._copies.state.policy
                whose = "the tenant's in the keys file" if own else "the server's"
                raise UsageError(
                    f"this policy is less strict than {whose}, or cannot be "
                    "compared with it (another method, or another energy of csulora); give both "
                    '"override": true and a "reason", '
                    "which the report and the audit log keep"
                )
            # All of the rule, so that it means the same when the server's policy is another one. A cap that
            # nobody overrode is the server's, whatever that will be.
            policy = dataclasses.asdict(wanted) if values else {}
            if loosened:
                policy = {field: policy[field] for field in policy if field not in CAPS or field in values}
            judged = await self._copies.ensure(record.live.digest, name, policy, loosened)
            await self._check_accepted(who, name, "policy", judged, loosened, reason)
            version = _version(judged, who, policy, loosened, record.live.next_policy, reason)
            return await self._commit(who, name, "policy", judged, record, version, start)

    async def remove(self, who: Principal, name: str, action: str = "delete") -> None:
        """Stop serving a name on every server; its weights are freed when its last request has ended.

        Raises:
            UnknownAdapter, Forbidden.
        """
        if self._static(name) and who.kind == "admin":
            raise UsageError(f"{name} comes from --lora-modules; start the server without it")
        async with self._changing(who, name, action):
            await self._known(who, name)
            await asyncio.to_thread(self.reconciler.names.update, name, lambda _: None)
            await self.reconciler.sync()
            await self._log(who, action, name, decision="removed")

    async def remove_version(self, who: Principal, name: str, number: int) -> None:
        """Forget an old version, so that it does not count any more.

        Raises:
            UnknownAdapter, Forbidden. UsageError: no such version, or the one that is served.
        """
        async with self._changing(who, name, DELETE_VERSION):
            await self._known(who, name)

            def change(record: AdapterRecord | None) -> AdapterRecord:
                if record is None:
                    raise unknown(name)
                return record.without(number)

            await asyncio.to_thread(self.reconciler.names.update, name, change)
            await self.reconciler.sync()
            await self._log(who, DELETE_VERSION, name, decision="removed", version=number)

    async def usage(self, who: Principal, tenant: str | None) -> dict[str, Any]:
        """The body of `TenantUsage`. tenant: whose an admin wants to see.

        Raises:
            UsageError: an admin names none, or one that does not exist. Forbidden: a tenant names another.
        """
        if who.kind == "tenant" and tenant not in (None, who.tenant):
            raise Forbidden("this key sees the usage of its own tenant only: leave tenant out")
        owner, known = who.tenant or tenant, self.tenants()
        if owner is None:
            raise UsageError("whose usage is not said: expected ?tenant=NAME with an admin's key")
        records = await asyncio.to_thread(own_records, self.reconciler.names, owner)
        if owner not in known and not records and who.kind == "admin":
            raise UsageError(
                f"{owner!r:.200} is not a tenant: the keys file has {', '.join(known) or 'none'}"
            )
        quota = known[owner].quota if owner in known else who.quota
        policy = await asyncio.to_thread(self._copies.policy, f"{owner}/")
        refusals = await asyncio.to_thread(self.audit.refusals, owner)
        return usage_of(owner, quota, policy, records, self.reconciler.registry, refusals)

    def find(self, who: Principal, name: str) -> Entry:
        """A served adapter that the caller may see.

        Raises:
            UnknownAdapter. Unavailable or AdapterRefused: it cannot be served at the moment.
        """
        entry = look_up(self.reconciler.registry, who, name)
        entry.current()
        return entry

    def report(self, who: Principal, entry: Entry) -> dict[str, Any]:
        """The body of `AdapterReport` for a caller, of an adapter that is served."""
        return report_of(entry, who.kind == "admin" or self.tenant_reports == "full")

    async def versions(self, who: Principal, name: str) -> AdapterRecord:
        """All versions that the store keeps of a name that the caller may see."""
        record = await self._record(name) if who.may_use(name) else None
        if record is None:
            raise unknown(name)
        return record

    def check_root(self, path: str) -> Path:
        """The path of a load by path.

        Raises:
            UsageError: no path. Forbidden: it lies outside of the folders that the operator allows.
        """
        if len(path) > 4096 or "\0" in path:
            raise UsageError("a path has at most 4,096 characters and no zero byte")
        resolved = Path(path).resolve()
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

    @property
    def _copies(self) -> Copies:
        return self.reconciler.copies

    def _static(self, name: str) -> bool:
        """Whether a name comes from ``--lora-modules``."""
        entry = self.reconciler.registry.get(name)
        return entry is not None and entry.folder is not None

    @asynccontextmanager
    async def _changing(self, who: Principal, name: str, action: str) -> AsyncIterator[float]:
        """One change of a name at a time in this process, from the moment that it gives on.

        What a quota stops goes to the audit log.
        """
        if not who.may_use(name):  # before the lock: waiting for it would tell that there is such a name
            raise unknown(name)
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            try:
                yield time.perf_counter()
            except QuotaExceeded as error:
                await self._log(who, action, name, decision="refused", reasons=["quota"])
                raise QuotaExceeded(
                    f"{error}. What counts are the names {who.tenant}/...; GET /v1/usage lists them"
                ) from None

    async def _record(self, name: str) -> AdapterRecord | None:
        return await asyncio.to_thread(self.reconciler.names.get, name)

    async def _known(self, who: Principal, name: str) -> AdapterRecord:
        record = await self._record(name) if who.may_use(name) else None
        if record is None:
            raise unknown(name)
        if not who.may_manage(name):
            raise Forbidden(f"this key may use {name}, but not change it")
        return record

    async def _check_accepted(
        self, who: Principal, name: str, action: str, judged: Judged, override: bool = False, reason: str = ""
    ) -> None:
        """A refusal goes to the audit log and to the caller."""
        if not judged.report.accepted:
            asked = {"override": override or judged.override, "reason": reason}
            asked = {field: value for field, value in asked.items() if value}
            await self._log(who, action, name, **audit_fields(judged.report, "refused"), **asked)
            raise AdapterRefused(judged.report.reasons)

    async def _commit(
        self,
        who: Principal,
        name: str,
        action: str,
        judged: Judged,
        before: AdapterRecord | None,
        new: Version,
        start: float,
    ) -> Entry:
        """Load what was judged and make it the newest version of what ``before`` still is."""
        pool, report = self.reconciler.pool, judged.report
        new = dataclasses.replace(new, id=await pool.new_id())
        request = pool.request(name, new.key, new.id)
        try:
            await pool.load(request, judged.judgement.bytes)
        except AdapterRefused as error:
            await self._log(who, action, name, **{**audit_fields(report, "refused"), "reasons": error.codes})
            raise
        try:
            timed = dataclasses.replace(new, load_seconds=time.perf_counter() - start)
            record = await asyncio.to_thread(self._update, who, name, before, timed)
        except SafeLoRAError:
            await pool.release(request, wanted=lambda _: False)
            raise
        await self.reconciler.sync()
        done = version_fields(record.live, judged.override)
        await self._log(who, action, name, **done, **audit_fields(report, "accepted"))
        return self.find(who, name)

    def _update(self, who: Principal, name: str, before: AdapterRecord | None, new: Version) -> AdapterRecord:
        def change(record: AdapterRecord | None) -> AdapterRecord:
            """Under the store's lock: two servers cannot exceed a quota together, nor undo each other."""
            if (record and record.unjudged) != (before and before.unjudged):
                if before is None:
                    raise _taken(name)
                raise ChangedMeanwhile(f"{name} was changed meanwhile; look at it and try again")
            after = (record or AdapterRecord(name)).with_version(new)
            check_quota(self.reconciler.names, who, after)
            return after

        record = self.reconciler.names.update(name, change)
        assert record is not None
        return record

    async def _log(self, who: Principal, action: str, name: str, **details: Any) -> None:
        await log(self.audit, who.key_id, action, name, **details)


def _version(
    judged: Judged,
    who: Principal,
    policy: dict[str, Any],
    override: bool = False,
    before: dict[str, Any] | None = None,
    reason: str = "",
) -> Version:
    """before: the policy that held for the name's next content, which an override leaves in force."""
    report = judged.report
    return Version(
        version=0,
        digest=report.digest,
        bytes=judged.judgement.bytes,
        rank=max((module.rank for module in report.modules), default=0),
        created=time.time(),
        by=who.key_id,
        policy=policy,
        override=override,
        base_policy=before or {} if override else {},
        reason=reason,
        key=judged.judgement.accepted_key(),
        ruleset_digest=judged.ruleset,
    )


def _taken(name: str) -> AlreadyLoaded:
    return AlreadyLoaded(f"{name} is already loaded; replace it (?replace=true, load_inplace) or remove it")
