"""Projecting adapters on a Ray cluster, whose machines see the same folders under the same paths."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Generator, Sequence
from typing import Any

from safelora_vllm.bulk.inputs import AdapterInput
from safelora_vllm.bulk.job import Job, Outcome, Worker, not_judged
from safelora_vllm.bulk.messages import answer, ending, job_of, outcome_of
from safelora_vllm.errors import SafeLoRAError, UsageError


def on_ray(job: Job, adapters: Sequence[AdapterInput], jobs: int | None, address: str) -> Generator[Outcome]:
    """The outcomes, as they come. Ray gives an adapter whose process dies to one more.

    Args:
        job: what each process is told.
        adapters: to project.
        jobs: how many at once; None: as many as the cluster has processors.
        address: of the cluster, as ``ray.init`` takes it; ``local`` starts one here.

    Raises:
        UsageError: Ray is not installed, or the cluster does not answer.
        SafeLoRAError: an error that is no adapter's. The adapters before it are recorded.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"Ray cannot be imported ({error}): install it with pip install '.[ray]' in the "
            "checkout, or leave `ray` out"
        ) from error
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # of many classes, by what the address is
            raise UsageError(
                f"the Ray cluster {address!r} cannot be used ({error}): check its address"
            ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray prints which of its processes died
            yield from _outcomes(ray, job, adapters, jobs)
    finally:
        if mine:
            ray.shutdown()


def _outcomes(ray: Any, job: Job, adapters: Sequence[AdapterInput], jobs: int | None) -> Generator[Outcome]:
    gpus = 1 if job.device.startswith("cuda") else 0
    project = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1)(_project)
    at_once = jobs or max(1, int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)))
    told, waiting = json.dumps(dataclasses.asdict(job)), list(reversed(adapters))
    running: dict[Any, AdapterInput] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            adapter = waiting.pop()
            running[project.remote(told, dataclasses.asdict(adapter))] = adapter
        (done,), _ = ray.wait(list(running), num_returns=1)
        adapter = running.pop(done)
        try:
            found = ray.get(done)
        except ray.exceptions.RayError as error:
            words = str(error).strip().splitlines() or [""]
            yield not_judged(adapter, f"Ray says: {type(error).__name__}: {words[0]}")
            continue
        yield outcome_of(found)


def _project(job: str, adapter: dict[str, Any]) -> dict[str, Any]:
    """Runs in the cluster's processes; each of them opens the projectors once."""
    try:
        return answer(_worker(job), adapter)
    except SafeLoRAError as error:
        return ending(error)


@functools.lru_cache(maxsize=1)
def _worker(job: str) -> Worker:
    from safelora_vllm.bulk.worker_process import quiet

    quiet()
    return Worker(job_of(json.loads(job)))
