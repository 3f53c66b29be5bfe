"""Begins the exam of an API server: probes, the aligned model's answers, and whether they are a measure."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safelora_vllm.errors import GuardError, SafeLoRAError
from safelora_vllm.exam import ladder as ladders
from safelora_vllm.exam.probes import Halves, from_file, harmless, languages_in
from safelora_vllm.exam.reference import Reference
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateState
from safelora_vllm.integration.seams.server import vllm_version
from safelora_vllm.integration.server.chat_format import ChatFormat
from safelora_vllm.integration.server.engine import Pool
from safelora_vllm.integration.server.exam.counts import Counts
from safelora_vllm.integration.server.exam.engine_model import EngineModel
from safelora_vllm.integration.server.exam.examiner import Examiner
from safelora_vllm.integration.server.exam.modes import Exam
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.exam.references import secret_of
from safelora_vllm.integration.server.exam.renewal import Renewal, stamp_of
from safelora_vllm.integration.server.exam.sheets import Sheets
from safelora_vllm.integration.server.exam.terms import Terms
from safelora_vllm.policy import Policy, chooses
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint, locate_model
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import PublishedStore
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.failed_tenants import FailedTenants
from safelora_vllm.tenants.rules import SERVERS, TenantRules

logger = logging.getLogger("vllm.safelora.exam")


async def start_exam(
    settings: ServerSettings,
    args: Namespace,
    pool: Pool,
    gate: GateClient,
    state: GateState,
    audit: AuditLog,
    tenant_rules: Callable[[str], TenantRules] = lambda _: SERVERS,
) -> NoExam:
    """The exam that the settings ask for. Call it before requests are counted.

    Args:
        settings, args: of the server.
        pool: loads what is examined.
        gate: its client; state: its `state` answer.
        audit: what the server itself decides.
        tenant_rules: those of the tenant that owns a name, as they are now.

    Raises:
        GuardError: the exam is to be enforced, and cannot be.
    """
    if settings.exam == "off":
        return NoExam()
    try:
        examiner, served, renewal = await _examiner(settings, args, pool, gate, state)
        terms = await _terms(settings)
    except Exception as error:  # the engine raises what it likes
        cause = str(error) if isinstance(error, SafeLoRAError) else f"{type(error).__name__}: {error}"
        if settings.exam == "enforce":
            raise GuardError(
                f"--exam enforce: {cause}. No adapter could be served; repair this, or start with --exam off"
            ) from error
        logger.warning("the exam is off: %s", cause)
        return NoExam(cause, tenant_rules)
    asked = f"{len(served.prompts)} of {examiner.sheets.first.count} probes, threshold {terms.threshold:g}"
    ladder = f", ladder {','.join(map(ladders.name_of, terms.ladder))}" if terms.enforced else ""
    logger.info("exam: %s, %s%s", terms.mode, asked, ladder)
    warnings = [ladders.hardly_tried(terms.ladder)]
    if terms.enforced and not terms.named and (settings.second_opinion or state.policy.opinion):
        warnings.append(ladders.projects_after(state.policy, terms.ladder))
    for found in filter(None, warnings):
        logger.warning("%s", found)
    lora = getattr(getattr(pool.engine_client, "vllm_config", None), "lora_config", None)
    if terms.enforced and getattr(lora, "max_loras", 2) == 1:
        logger.warning(
            "--exam enforce with --max-loras 1: an exam waits until no other adapter is in use, and gives up "
            "after two minutes. Expected --max-loras 2 or more"
        )
    return Exam(examiner, audit, terms, tenant_rules, renewal)


async def _examiner(
    settings: ServerSettings, args: Namespace, pool: Pool, gate: GateClient, state: GateState
) -> tuple[Examiner, Reference, Renewal | None]:
    """The examiner, what the aligned model answers to the first half of the probes, and their file."""
    engine, root, published = pool.engine_client, Path(state.store), PublishedStore(state.store)
    chat = await ChatFormat.of(engine, args)
    served = str(getattr(engine.model_config, "model", "the model"))
    model = EngineModel(engine, chat.tokenizer, served, chat.template, chat.options)
    secret = await asyncio.to_thread(secret_of, root)
    parts = [secret.hex(), *await asyncio.to_thread(model_parts, engine, served, state)]
    parts.append(str(chat.template or chat.tokenizer.chat_template))
    if chat.options:  # a verdict without them is of another form of prompt
        parts.append(json.dumps(chat.options, sort_keys=True, default=str))
    languages = languages_in(settings.exam_languages)

    def sheets_now() -> Sheets:
        file = settings.exam_probes
        halves = Halves.of(secret, from_file(file)) if file else Halves.built_in(secret, languages)
        return Sheets.of(root, model, published, halves, parts, harmless(languages))

    renewal = None
    if settings.exam_probes:
        file = Path(settings.exam_probes)
        renewal = Renewal(file, sheets_now, await asyncio.to_thread(stamp_of, file))
    sheets = await asyncio.to_thread(sheets_now)
    reference = await sheets.first.reference()
    counts = Counts(Path(gate.socket_path).parent)
    return Examiner(model, pool, published, sheets, counts, FailedTenants(root)), reference, renewal


async def _terms(settings: ServerSettings) -> Terms:
    """What the settings say."""
    policy = Policy.from_mapping(settings.policy)
    cache = await asyncio.to_thread(ProjectorCache, settings.projectors)
    rungs = await asyncio.to_thread(ladders.usable, cache, settings.ladder, policy)
    chosen, named = chooses(settings.policy), settings.ladder is not None
    return Terms(settings.exam, settings.exam_threshold, tuple(rungs), chosen, named)


_HOW = {
    "model_config": ("revision", "dtype", "quantization", "logprobs_mode", "hf_overrides"),
    "parallel_config": ("tensor_parallel_size", "pipeline_parallel_size"),
    "cache_config": ("cache_dtype",),
    "speculative_config": ("method", "model", "num_speculative_tokens"),
}
_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def model_parts(engine: Any, served: str, state: GateState) -> list[Any]:
    """What tells the served model, and how it is served, from others."""
    config = engine.model_config
    folder = _folder(served, getattr(config, "revision", None))
    try:
        fingerprint: Any = Checkpoint(folder).fingerprint() if folder else served
    except (SafeLoRAError, OSError):  # a format of its own: the operator trusts it
        fingerprint = served
    tokenizer = str(getattr(config, "tokenizer", "") or served)
    text = folder if tokenizer == served else _folder(tokenizer, getattr(config, "tokenizer_revision", None))
    files = [[tokenizer, *(_sha256(of / name) for name in _FILES)] for of in (folder, text) if of]
    of_engine = getattr(engine, "vllm_config", None)
    parts = {part: getattr(of_engine, part, None) for part in _HOW} | {"model_config": config}
    how = {part: [str(getattr(parts[part], name, "")) for name in names] for part, names in _HOW.items()}
    return [state.projectors, fingerprint, files, how, vllm_version()]


def _folder(name: str, revision: str | None) -> Path | None:
    """Where a model's files are; None where they cannot be seen."""
    try:
        return locate_model(f"{name}@{revision}" if revision and not Path(name).is_dir() else name)
    except (SafeLoRAError, OSError):
        return None


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
