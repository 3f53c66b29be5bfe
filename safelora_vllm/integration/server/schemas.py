"""Bodies of our routes, as they stand in ``/openapi.json``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from safelora_vllm.adapters.beside import SIGNATURE
from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import Reason
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.uploads import ARCHIVE
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.store import Version
from safelora_vllm.store.verdicts import Examined

_NAME = Field(description="NAME, or TENANT/NAME for a tenant's adapter", max_length=300)


class LoadRequest(BaseModel):
    """vLLM's body of ``POST /v1/load_lora_adapter``."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    """vLLM's body of ``POST /v1/unload_lora_adapter``."""

    lora_name: str
    lora_int_id: int | None = None


class UploadByPath(BaseModel):
    """An adapter that lies on the server's machine, inside an ``--adapter-root`` folder."""

    model_config = ConfigDict(extra="forbid")

    name: str = _NAME
    path: str = Field(description="folder that PEFT saved, or a .tar, .tar.gz or .zip of it")


class UploadFromSource(BaseModel):
    """An adapter in object storage or behind a presigned URL, which the operator lets the caller read."""

    model_config = ConfigDict(extra="forbid")

    name: str = _NAME
    source: str = Field(
        description="s3://, gs://, az:// or https:// address of the folder that PEFT saved, or of an archive",
        max_length=4096,
    )
    digest: str | None = Field(
        None,
        description="what is expected: of a folder the digest that `inspect` shows, of an archive sha256:HEX",
        max_length=80,
    )


class Rollback(BaseModel):
    """Which version's content to serve again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, le=2**53)


class PolicyChange(BaseModel):
    """Rules for one adapter, instead of the server's. An empty ``policy`` goes back to the server's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    policy: dict[str, Any] = Field(description="fields of the server's policy that differ for this adapter")
    override: bool = Field(False, description="allow rules that are less strict than the server's")
    reason: str = Field("", max_length=1000, description="why; needed with override")


class ExamOverride(BaseModel):
    """Whether an adapter is served whatever its exam says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    override: bool = Field(description="false takes it back: the adapter is judged anew, and has to pass")
    reason: str = Field("", max_length=1000, description="why; needed with override")


class FailedRung(BaseModel):
    """What an exam found on a rung on which an adapter failed, in nats per token."""

    rung: str
    drop: float = Field(description="mean loyalty drop")
    bound: float = Field(description="its upper confidence bound, compared with the threshold")
    worst: float = Field(description="mean of the tenth of the probes that drops most")
    probes: int = Field(description="that were asked")
    threshold: float = Field(description="the largest bound that passes")
    again: bool = Field(description="it passed the first half of the probes and failed the held-out half")


class ErrorDetail(BaseModel):
    """OpenAI's error object; a refusal has its reasons besides."""

    message: str
    type: str
    param: str | None = None
    code: int
    reasons: list[Reason] | None = Field(
        None, description="every cause at once: a machine-readable code and a sentence"
    )
    exam_rungs: list[FailedRung] | None = Field(
        None, description="for admins, of an adapter that failed its exam: each rung that was tried"
    )


class ErrorBody(BaseModel):
    """Every error of these routes."""

    error: ErrorDetail


class AdapterSummary(BaseModel):
    """What the gate decided about the version that is served."""

    adapter: str
    digest: str
    projectors: str
    policy: dict[str, Any]
    accepted: bool
    reasons: list[Reason]
    total_norm: float = Field(description="of the upload, relative to the weights of all modules together")
    signed: bool = Field(description="the upload had a signature that was verified")
    signed_by: str = Field(description="id of the key that it was signed with; else empty")
    version: int | None = Field(description="null for an adapter of --lora-modules")
    override: bool = Field(description="an admin allowed rules that are less strict")
    exam_override: bool = Field(description="an admin has it served whatever its exam says")
    reason: str = Field(description="why, as the admin said")


class TrafficInfo(BaseModel):
    """Requests for one adapter. Of the last hour: ``requests`` that ended, ``generated_tokens``."""

    requests: int
    generated_tokens: int
    running: int
    waiting: int
    second_opinion_refusals: int = Field(
        description="requests since the server started in which the aligned model's refusal was served"
    )


class ExamFigures(BaseModel):
    """What one exam found of a copy, in nats per token. Figures are for admins only."""

    passed: bool
    by_opinion: bool | None = Field(
        description="it passed since it has a second opinion; its score alone would have failed"
    )
    drop: float | None = Field(description="mean loyalty drop")
    bound: float | None = Field(description="its upper confidence bound, compared with the threshold")
    worst: float | None = Field(description="mean of the tenth of the probes that drops most")
    seconds: float | None = Field(description="that the exam took")
    at: float | None = Field(description="when it ended: seconds since 1970, UTC")
    over_refusal: float | None = Field(
        description="share of harmless prompts that it refuses and the aligned model does not; asked of what "
        "passes its first exam. Nothing follows from it"
    )


class ExamInfo(ExamFigures):
    """What the first exam of the copy that is served found, and the newest re-examination."""

    again: ExamFigures | None = Field(description="by the held-out probes; null where there was none")


class ReExamination(ExamFigures):
    """Answer to a re-examination."""

    adapter: str
    probes: int = Field(description="that were asked")
    threshold: float = Field(
        description="the largest bound that passes without a second opinion, nats per token"
    )
    withdrawn: bool = Field(description="it failed and is not served any more, until it is judged anew")


class ExamState(BaseModel):
    """Whether adapters are examined."""

    mode: str = Field(description="off, report or enforce")
    cause: str = Field(
        description="for admins: why it is off although it was asked for, or why a changed file of probes is "
        "not in force; else empty"
    )


class Figures(BaseModel):
    """What the gate did to the version that is served, over all of its modules."""

    modules: int
    projected: int
    least_retained: float | None = Field(description="of all modules; null where every delta is zero")
    total_norm: float


class AdapterReport(AdapterSummary):
    """The same, with figures, module by module too."""

    figures: Figures | None = Field(description="null with --tenant-reports summary, for all but admins")
    exam: ExamInfo | None = Field(description="null where it was not examined")
    traffic: TrafficInfo | None = Field(
        description="for admins and the adapter's tenant; null before the first request"
    )
    modules: list[ModuleReport] = Field(description="none for tenants where the operator keeps them")


class AdapterList(BaseModel):
    """All adapters that the caller may use."""

    object: str = "list"
    exam: ExamState
    data: list[AdapterSummary]


class VersionInfo(BaseModel):
    """One upload or change of rules."""

    version: int
    digest: str
    bytes: int
    rank: int
    created: float = Field(description="seconds since 1970, UTC")
    by: str = Field(description="id of the key")
    policy: dict[str, Any]
    override: bool
    exam_override: bool
    reason: str
    refused: list[Reason] = Field(description="why it is not served, as it was judged last; else empty")
    signed_by: str = Field(description="id of the key that it was signed with; else empty")


class VersionList(BaseModel):
    """The newest versions of a name; ``current`` is served."""

    name: str
    current: int
    versions: list[VersionInfo]


class Removed(BaseModel):
    """Answer to a removal, as OpenAI's API has it for its objects."""

    id: str
    object: str = "adapter"
    deleted: bool = True


class RemovedVersion(BaseModel):
    """Answer to the removal of an old version."""

    id: str
    version: int
    object: str = "adapter.version"
    deleted: bool = True


def report_of(entry: Entry, shown: Report, by_module: bool = True) -> dict[str, Any]:
    """The body of `AdapterReport`, of an adapter that is served.

    shown: its report. by_module: with each module's figures.
    """
    return {**summary_of(entry, shown), "modules": shown.to_dict()["modules"] if by_module else []}


def summary_of(entry: Entry, shown: Report) -> dict[str, Any]:
    """The body of `AdapterSummary`, of an adapter that is served. shown: its report."""
    live = entry.version
    return {
        **replace(shown, modules=[], signed_by=live.signed_by if live else "").to_dict(),
        "version": live.version if live else None,
        "override": live.override if live else False,
        "exam_override": entry.exam_override,
        "reason": live.reason if live else "",
    }


def exam_figures(found: Examined, shown: bool) -> dict[str, float | None]:
    """Of `ExamFigures`, all but whether it passed. shown: to the caller."""
    score = found.score
    figures: dict[str, float | None] = {"drop": score.drop, "bound": score.bound, "worst": score.worst}
    figures |= {"seconds": found.seconds, "at": found.at, "over_refusal": found.over_refusal}
    return {name: value if shown else None for name, value in figures.items()}


def version_info(version: Version) -> dict[str, Any]:
    """The body of `VersionInfo`."""
    return {name: getattr(version, name) for name in VersionInfo.model_fields}


UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name"],
                "description": f"{CONFIG}, {WEIGHTS} and maybe {SIGNATURE}; or one {ARCHIVE}, or a hub_id",
                "properties": {
                    "name": {"type": "string", "maxLength": 300},
                    CONFIG: {"type": "string", "format": "binary"},
                    WEIGHTS: {"type": "string", "format": "binary"},
                    SIGNATURE: {"type": "string", "format": "binary"},
                    ARCHIVE: {
                        "type": "string",
                        "format": "binary",
                        "description": ".tar, .tar.gz or .zip of the folder that PEFT saved",
                    },
                    "hub_id": {"type": "string", "description": "where the operator allows it"},
                    "revision": {"type": "string"},
                },
            }
        },
        "application/json": {
            "schema": {"anyOf": [UploadByPath.model_json_schema(), UploadFromSource.model_json_schema()]}
        },
    },
}
