"""A run over a folder: here, in processes or on a cluster; and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from safelora_vllm.bulk.catalogue import ACCEPTED, FAILED, REFUSED, Catalogue, ProjectionRecord, written_to
from safelora_vllm.bulk.inputs import AdapterInput, find_inputs
from safelora_vllm.bulk.job import Job, Outcome, Worker
from safelora_vllm.bulk.on_ray import on_ray
from safelora_vllm.bulk.processes import in_processes
from safelora_vllm.errors import UsageError
from safelora_vllm.files import remove_leftovers
from safelora_vllm.gate.admit import GateSettings

_GATE = logging.getLogger("vllm.safelora.gate")


@dataclass(frozen=True)
class BulkReport:
    """What became of the adapters of a folder.

    Attributes:
        folder: with the results.
        records: one for each adapter, by name.
        unchanged: names of those for which an earlier run had done everything.
        ignored: names of files that are neither a folder nor an archive.
    """

    folder: Path
    records: tuple[ProjectionRecord, ...]
    unchanged: frozenset[str]
    ignored: tuple[str, ...]

    def count(self, answer: str) -> int:
        """Number of adapters with this answer."""
        return sum(record.answer == answer for record in self.records)

    @property
    def accepted(self) -> bool:
        """Whether all of them were accepted."""
        return self.count(ACCEPTED) == len(self.records)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The records in their JSON form, with ``unchanged``."""
        return [{**r.to_dict(), "unchanged": r.name in self.unchanged} for r in self.records]


def run(
    folder: Path,
    out: Path,
    settings: GateSettings,
    jobs: int | None,
    projector_memory: int | None,
    address: str | None,
) -> BulkReport:
    """Project the adapters of a folder into another one.

    Raises:
        UsageError: no adapters, two of one name, or ``out`` cannot be used.
        SafeLoRAError: an error that is no adapter's. The adapters before it are recorded.
    """
    adapters, ignored = find_inputs(folder)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{out} is inside {folder}: give a folder outside of it as `out`")
    catalogue = Catalogue(out)
    catalogue.create()
    for adapter in adapters:
        catalogue.check_mine(adapter.name)
    for place in (out, catalogue.folder):
        remove_leftovers(place)
    with _scratch(out) as scratch:
        job = Job(
            projectors=str(settings.cache.folder.resolve()),
            out=str(out.resolve()),
            scratch=scratch,
            policy=dataclasses.asdict(settings.policy),
            device=str(settings.device),
            base_model=settings.base_model,
            revision=settings.revision,
            projector_memory=projector_memory,
        )
        adapters = [dataclasses.replace(found, path=str(Path(found.path).absolute())) for found in adapters]
        outcomes: Generator[Outcome]
        if address is not None:
            outcomes = on_ray(job, adapters, jobs, address)
        elif (jobs or 1) > 1:
            outcomes = in_processes(job, adapters, jobs or 1)
        else:
            outcomes = _here(job, adapters)
        done = []
        with contextlib.closing(outcomes):
            for outcome in tqdm(outcomes, total=len(adapters), desc="Adapters", unit="adapter"):
                if outcome.record.answer == FAILED:  # where no process lived to record it
                    catalogue.put(outcome.record, None)
                done.append(outcome)
    places = {adapter.name: place for place, adapter in enumerate(adapters)}
    done.sort(key=lambda outcome: places[outcome.record.name])
    return BulkReport(
        out,
        tuple(outcome.record for outcome in done),
        frozenset(outcome.record.name for outcome in done if outcome.unchanged),
        tuple(ignored),
    )


def _here(job: Job, adapters: Sequence[AdapterInput]) -> Generator[Outcome]:
    """One after the other in this process."""
    threads, level = torch.get_num_threads(), _GATE.level
    try:
        torch.set_num_threads(1)
        _GATE.setLevel(logging.ERROR)  # the catalogue has the answers
        worker = Worker(job)
        for adapter in adapters:
            yield worker.do(adapter)
    finally:
        torch.set_num_threads(threads)
        _GATE.setLevel(level)


@contextlib.contextmanager
def _scratch(out: Path) -> Generator[str]:
    """A folder of this run; what a killed run leaves of it, `remove_leftovers` removes."""
    with written_to(out):
        scratch = tempfile.TemporaryDirectory(dir=out.resolve(), prefix=".new-", ignore_cleanup_errors=True)
    with scratch as folder:
        yield folder


__all__ = ["ACCEPTED", "FAILED", "REFUSED", "BulkReport", "ProjectionRecord", "run"]
