"""What all processes of a run do with each adapter: the gate, and its answer into the catalogue."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, joined_digest, read_adapter
from safelora_vllm.bulk.catalogue import ACCEPTED, FAILED, REFUSED, Catalogue, ProjectionRecord, unwritable
from safelora_vllm.bulk.inputs import AdapterInput
from safelora_vllm.errors import AdapterNotFound, AdapterRefused, Reason, SafeLoRAError, StoreUnavailable
from safelora_vllm.files import sha256_of
from safelora_vllm.gate.admit import Admission, GateSettings, admit
from safelora_vllm.gate.memory import placed
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.sizes import groups_of_cache
from safelora_vllm.store import PublishedStore

logger = logging.getLogger("vllm.safelora.bulk")


@dataclass(frozen=True)
class Job:
    """What each process of a run is told, in plain values. Paths are absolute.

    scratch: a folder on the disk of ``out`` for results that are being written. projector_memory: most
    bytes of projectors and of the work of an adapter; None: as many as they take.
    """

    projectors: str
    out: str
    scratch: str
    policy: dict[str, Any]
    device: str = "cpu"
    base_model: str = ""
    revision: str | None = None
    projector_memory: int | None = None


@dataclass(frozen=True)
class Outcome:
    """An adapter's record. unchanged: it is that of an earlier run, and nothing was done."""

    record: ProjectionRecord
    unchanged: bool = False


class Worker:
    """A gate with its projectors in memory.

    Raises:
        ProjectorCacheError, PolicyError: the cache is damaged, or has not what the policy reads.
        UsageError: the memory is too little.
    """

    def __init__(self, job: Job) -> None:
        policy, cache = Policy.from_mapping(job.policy), ProjectorCache(job.projectors)
        device, parts = torch.device(job.device), parts_read(policy, cache.thin)
        self._settings = GateSettings(cache, policy, device, base_model=job.base_model, revision=job.revision)
        placement = None
        if job.projector_memory is not None:
            max_rank = self._settings.limits.max_rank
            placement = placed(groups_of_cache(cache, parts), policy, device, max_rank, job.projector_memory)[
                1
            ]
        cache.load(device, placement, **asdict(parts))
        self._ruleset = self._settings.ruleset_digest
        self._scratch = job.scratch
        self._catalogue = Catalogue(Path(job.out))

    def do(self, adapter: AdapterInput) -> Outcome:
        """Project one adapter and record it, unless that was done before.

        Raises:
            ProjectorCacheError: the cache is damaged.
            UsageError: the results cannot be written.
        """
        started = time.perf_counter()
        if adapter.problem:
            reason = Reason("not_regular_file", adapter.problem)
            return self._put(_record(adapter, REFUSED, [reason], started), None)
        try:
            known = self._catalogue.get(adapter.name)
            if known is not None and self._is_done(known, adapter):
                return Outcome(known, unchanged=True)
            return self._admitted(adapter, started)
        except AdapterNotFound as error:
            return self._put(_record(adapter, FAILED, [Reason("not_found", str(error))], started), None)
        except StoreUnavailable as error:
            raise unwritable(self._catalogue.out, error.__cause__ or error) from error
        except SafeLoRAError:
            raise
        except Exception as error:  # of one adapter; the others go on
            logger.exception("adapter %r could not be judged", adapter.name)
            reason = Reason("internal_error", f"{type(error).__name__}: {error}; report it with the log")
            return self._put(_record(adapter, FAILED, [reason], started), None)

    def _admitted(self, adapter: AdapterInput, started: float) -> Outcome:
        with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as scratch:
            admission = admit(adapter.path, adapter.name, self._settings, PublishedStore(scratch))
            report = admission.report
            record = ProjectionRecord(
                adapter.name,
                ACCEPTED if report.accepted else REFUSED,
                tuple(report.reasons),
                report.digest,
                self._ruleset,
                _output_digest(admission),
                len(report.modules),
                report.count("projected"),
                time.perf_counter() - started,
                report.uncertain,
            )
            return self._put(record, admission.folder)

    def _put(self, record: ProjectionRecord, folder: Path | None) -> Outcome:
        self._catalogue.put(record, folder)
        return Outcome(record)

    def _is_done(self, known: ProjectionRecord, adapter: AdapterInput) -> bool:
        """Whether the same content was judged by the same rules, and the result is still there."""
        judged = known.answer in (ACCEPTED, REFUSED) and known.ruleset_digest == self._ruleset
        if not judged:
            return False
        try:
            found = read_adapter(adapter.path, self._settings.limits).digest
        except (AdapterRefused, AdapterNotFound):
            return False  # it is judged at once, and says so again
        return found == known.digest and self._catalogue.intact(known)


def not_judged(adapter: AdapterInput, cause: str) -> Outcome:
    """Of an adapter whose processes ended before they had an answer."""
    return Outcome(ProjectionRecord(adapter.name, FAILED, (Reason("worker_died", cause),)))


def _record(adapter: AdapterInput, answer: str, reasons: list[Reason], started: float) -> ProjectionRecord:
    return ProjectionRecord(adapter.name, answer, tuple(reasons), seconds=time.perf_counter() - started)


def _output_digest(admission: Admission) -> str:
    if admission.folder is None:
        return ""
    return joined_digest(*(sha256_of(admission.folder / file) for file in (CONFIG, WEIGHTS)))
