"""The gate: adapter folder or archive in, published folder and report out, or a refusal.

    read → signature → vet → measure → cap → select → project → publish

One straight function. There is no other place where an adapter is judged. Nothing here knows vLLM or HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from safelora_vllm.adapters.canonical import Weights, canonical_files, vet
from safelora_vllm.adapters.read import Limits, RawAdapter, read_adapter
from safelora_vllm.errors import AdapterRefused, codes_of
from safelora_vllm.gate.address import Frame, address, ruleset_digest
from safelora_vllm.gate.caps import check_norms, check_sound, check_total, coherence
from safelora_vllm.methods.judge import JudgedModule, judge
from safelora_vllm.policy import NOTHING, Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.signatures.check import signer_of
from safelora_vllm.signatures.rule import SigningRule
from safelora_vllm.store import PublishedStore, RawStore
from safelora_vllm.tenants.quotas import Allowance

logger = logging.getLogger("vllm.safelora.gate")
_FORMAT = 6  # raise it when the same input would be published as other bytes


@dataclass(frozen=True)
class GateSettings:
    """Everything that a gate's answer depends on, besides the adapter.

    device: where projections run. dtype: of the published weights; vLLM's LoRA dtype, so that its
    own cast changes nothing. base_model, revision: written into published configs.
    """

    cache: ProjectorCache
    policy: Policy
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    limits: Limits = field(default_factory=Limits)
    base_model: str = ""
    revision: str | None = None

    @property
    def frame(self) -> Frame:
        """The rules without the policy."""
        return [
            _FORMAT,
            self.cache.id,
            str(self.dtype),
            self.base_model,
            self.limits.max_rank,
            # Only where they are given, so that older addresses stay.
            *([self.revision] if self.revision else []),
            *(f"target module {name}" for name in self.limits.target_modules),
        ]

    @property
    def ruleset_digest(self) -> str:
        """A digest of everything but the adapter: the same rules publish the same bytes."""
        return ruleset_digest(self.frame, self.policy)

    def key(self, digest: str) -> str:
        """The address of a published adapter: its content and the rules, nothing else."""
        return address(self.ruleset_digest, digest)

    def under(self, values: Mapping[str, Any]) -> GateSettings:
        """The same settings with some of the policy's fields replaced."""
        return dataclasses.replace(self, policy=self.policy.with_values(values)) if values else self


@dataclass
class Stages:
    """Seconds spent per stage of one run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Measure the block under the stage's name, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Admission:
    """The gate's answer. ``key`` and ``folder`` are set for an accepted adapter.

    cached: the same content was published before, so that nothing was computed. nbytes: see `charged`.
    """

    report: Report
    key: str | None
    folder: Path | None
    cached: bool
    stages: Stages
    nbytes: int = 0


def admit(
    folder: str | Path,
    name: str,
    settings: GateSettings,
    store: PublishedStore,
    raw_store: RawStore | None = None,
    allowance: Allowance | None = None,
    signing: SigningRule | None = None,
) -> Admission:
    """Judge one adapter, folder or archive, and publish what may be served.

    What was accepted is also put into ``raw_store``, if there is one, as far as the ``allowance`` goes.
    ``signing`` says which signature it has to have; the report names the key.

    Refusals are answers, not exceptions: ``report.accepted`` is False and ``report.reasons`` says why.

    Raises:
        AdapterNotFound: there is no such folder or archive.
        QuotaExceeded: it is over the allowance; nothing was stored.
        StoreUnavailable: the store cannot be written.
        ProjectorCacheError: the projector cache is damaged.
    """
    stages = Stages()

    def refused(error: AdapterRefused, digest: str) -> Admission:
        report = Report.refused(name, digest, settings.cache.id, settings.policy, error)
        return _answer(Admission(report, None, None, False, stages))

    try:
        with stages.time("read"):
            raw = read_adapter(folder, settings.limits, beside=signing is not None)
    except AdapterRefused as error:
        return refused(error, "")
    signer = ""
    if signing is not None:
        try:
            with stages.time("signature"):
                signer = signer_of(raw, signing)
        except AdapterRefused as error:
            return refused(error, raw.digest)
    key, nbytes = settings.key(raw.digest), sum(map(len, raw.files.values()))
    if allowance is not None:
        allowance.check_bytes(raw.digest, nbytes)
    with stages.time("lookup"):
        known = store.find(key)
    if known is not None:
        nbytes = charged(known, nbytes, settings.cache)
        if allowance is not None:
            allowance.check(known, nbytes)
        store.touch(key)
        _keep(raw, raw_store, stages)
        known = known.named(name).signed(signer)
        return _answer(Admission(known, key, store.path(key), True, stages, nbytes))
    report, weights = evaluate(raw, name, settings, stages)
    report = report.signed(signer)
    if weights is None:
        return _answer(Admission(report, None, None, False, stages))
    nbytes = charged(report, nbytes, settings.cache)
    if allowance is not None:
        allowance.check(report, nbytes)
    try:
        with stages.time("publish"):
            files = canonical_files(weights, settings.base_model, settings.dtype, settings.revision)
            # The stored report has no name and no signer: the same content may be served under several.
            published = store.publish(key, files, report.named("").signed(""))
    except AdapterRefused as error:
        return refused(error, raw.digest)
    _keep(raw, raw_store, stages)
    return _answer(Admission(report, key, published, False, stages, nbytes))


def charged(report: Report, nbytes: int, cache: ProjectorCache) -> int:
    """What content counts in a quota, bytes: the upload's as if every module had the largest rank.

    So it is in its published copy: vLLM reads one rank of all modules.
    """
    rows = {module.name: sum(cache.modules[module.name].shape) for module in report.modules}
    own = sum(module.rank * rows[module.name] for module in report.modules)
    padded = max((module.rank for module in report.modules), default=0) * sum(rows.values())
    return math.ceil(nbytes * padded / own) if own else nbytes


def evaluate(
    raw: RawAdapter, name: str, settings: GateSettings, stages: Stages | None = None
) -> tuple[Report, Weights | None]:
    """Vet, measure, decide and project. Returns the report and the weights to serve, if any.

    In report-only mode the weights are the canonical, unprojected ones, the module table says what
    enforcing would have done, and ``reasons`` what it would have refused for.
    """
    stages, policy, cache = stages or Stages(), settings.policy, settings.cache
    try:
        with stages.time("vet"):
            weights = vet(raw, cache.modules, settings.limits)
    except AdapterRefused as error:
        return Report.refused(name, raw.digest, cache.id, policy, error), None
    with stages.time("project"), torch.inference_mode():
        coherences, relative_norms, norms, modules, weights_served = {}, {}, [], [], {}
        for module in judge(weights, cache, policy, settings.device, settings.dtype):
            name_of, norm = module.entry.name, module.came.norm
            coherences[name_of] = coherence(module)
            # The caps hold for what came and for what would be served: Ĉ enlarges where ‖V‖ is above 1.
            growth = max(1.0, module.served.retained or 0.0)
            relative_norms[name_of] = growth * module.relative_norm
            norms.append((norm, growth * norm))
            modules.append(_module_report(module))
            weights_served[name_of] = (module.a, module.b)
    if broken := check_sound(coherences):  # in report-only mode too: nothing can be measured or served
        return Report.refused(name, raw.digest, cache.id, policy, AdapterRefused(broken)), None
    total, largest = (math.hypot(*column) / cache.aligned_norm for column in zip(*norms, strict=True))
    reasons = [*check_norms(relative_norms, policy), *check_total(largest, policy)]
    accepted = not reasons or not policy.enforcing
    report = Report(name, raw.digest, cache.id, policy, accepted, reasons, modules, total)
    return report, weights_served if accepted else None


def _keep(raw: RawAdapter, store: RawStore | None, stages: Stages) -> None:
    if store is not None:
        with stages.time("keep"):
            store.keep(raw.digest, raw.files)


def _module_report(module: JudgedModule) -> ModuleReport:
    similarity = module.similarity
    return ModuleReport(
        name=module.entry.name,
        rank=module.rank,
        similarity=similarity.middle if similarity else None,
        similarity_error=similarity.error if similarity else 0.0,
        null_similarity=module.entry.null_similarity,
        retained=module.served.retained,
        relative_norm=module.relative_norm,
        decision="projected" if module.projected else "kept",
        uncertain=module.uncertain,
    )


def _answer(admission: Admission) -> Admission:
    """One log line per decision."""
    report = admission.report
    share = f"{report.count('projected')} of {len(report.modules)} modules"
    if report.uncertain:
        share += f" ({report.uncertain} of uncertain similarity)"
    idle = "; it changes nothing: each module has an A or a B of zeros" if report.changes_nothing else ""
    if not report.accepted:
        codes = ",".join(codes_of(report.reasons))
        logger.warning("adapter %r refused: %s (%s)", report.adapter, codes, report.reasons[0].message)
    elif report.policy.enforcing:
        how = NOTHING if report.policy.selects_none else f"{share} projected by {report.policy.method}"
        known = ", published before" if admission.cached else ""
        logger.info("adapter %r accepted: %s%s%s", report.adapter, how, known, idle)
    else:
        logger.warning(
            "REPORT-ONLY MODE: adapter %r is served UNPROJECTED; enforcing would have projected %s%s%s",
            report.adapter, share, " and refused it" if report.reasons else "", idle,
        )  # fmt: skip
    return admission
