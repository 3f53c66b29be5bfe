"""What the processes of a run say to each other, as JSON: a job, adapters, outcomes, what ends the run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from safelora_vllm import errors
from safelora_vllm.bulk.catalogue import ProjectionRecord
from safelora_vllm.bulk.inputs import AdapterInput
from safelora_vllm.bulk.job import Job, Outcome, Worker
from safelora_vllm.errors import SafeLoRAError

READY: dict[str, Any] = {"ready": True}
# Of an adapter itself nothing is raised: these say that no adapter can be projected.
_ENDING = {
    error.__name__: error
    for error in (errors.UsageError, errors.PolicyError, errors.CheckpointError, errors.ProjectorCacheError)
}


def job_of(message: dict[str, Any]) -> Job:
    """The job in a message that ``dataclasses.asdict`` made."""
    return Job(**message)


def answer(worker: Worker, message: dict[str, Any]) -> dict[str, Any]:
    """What a worker says to an adapter."""
    try:
        outcome = worker.do(AdapterInput(**message))
    except SafeLoRAError as error:
        return ending(error)
    return {"record": outcome.record.to_dict(), "unchanged": outcome.unchanged}


def ending(error: SafeLoRAError) -> dict[str, Any]:
    """An error that ends the run."""
    return {"error": type(error).__name__, "message": str(error)}


def outcome_of(message: dict[str, Any]) -> Outcome:
    """What an answer says.

    Raises:
        SafeLoRAError: it ends the run.
    """
    if "error" in message:
        raise _ENDING.get(message["error"], SafeLoRAError)(message["message"])
    return Outcome(ProjectionRecord.from_dict(message["record"]), message["unchanged"])


def line(message: Any) -> bytes:
    """One line of JSON."""
    data = message if isinstance(message, dict) else dataclasses.asdict(message)
    return json.dumps(data).encode() + b"\n"
