"""The aligned model's own answers to a server's probes: asked for once, then kept beside the store."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safelora_vllm.exam.probes import Probes
from safelora_vllm.exam.reference import ANSWER_TOKENS, Reference, reference_of, refused, refuses
from safelora_vllm.files import locked, make_folder, replace_file, writing
from safelora_vllm.integration.server.exam.engine_model import EngineModel
from safelora_vllm.store.layout import EXAM
from safelora_vllm.store.verdict_pruning import reference_file

logger = logging.getLogger("vllm.safelora.exam")
_FORMAT = 2  # another one where an exam asks or counts otherwise: what is kept of the former is not used
_SECRET_BYTES = 32


def secret_of(root: Path) -> bytes:
    """What draws the built-in probes of a store; made at its first use.

    Raises:
        StoreUnavailable: it cannot be kept.
    """
    return _first(root, "secret", secrets.token_bytes(_SECRET_BYTES))


async def kept_reference(
    root: Path, exam: str, model: EngineModel, probes: Probes, harmless: Sequence[str] = ()
) -> Reference:
    """The answers that the first API server of the store was given.

    exam: its digest. harmless: prompts that the model should answer.
    """
    file = reference_file(root, exam)
    try:
        return _read(file.read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        began = time.monotonic()
        logger.info(
            "exam: the served model answers %d probes; these answers are kept in the store",
            len(probes.prompts),
        )
        made = await _ask(model, probes, harmless)
        logger.info(
            "exam: the served model has answered in %.0f s; it refuses %.0f%% of the probes",
            time.monotonic() - began, 100 * made.refused,
        )  # fmt: skip
    if not made.usable:  # another start may find another model
        return made
    text = json.dumps(dataclasses.asdict(made), allow_nan=False).encode()
    return _read(await asyncio.to_thread(_first, root, file.name, text))


def exam_digest_parts(probes: Probes) -> list[Any]:
    """What scores depend on besides the copy, the served model and the secret."""
    return [_FORMAT, ANSWER_TOKENS, probes.digest]


async def _ask(model: EngineModel, probes: Probes, harmless: Sequence[str]) -> Reference:
    kept = refused(probes, await model.answer(probes.prompts, ANSWER_TOKENS))
    said = await model.answer(harmless, ANSWER_TOKENS)
    answered = [prompt for prompt, (_, text) in zip(harmless, said, strict=True) if not refuses(text)]
    prompts, answers = [prompt for prompt, _ in kept], [answer for _, answer in kept]
    found = reference_of(probes, kept, await model.likelihoods(prompts, answers))
    return dataclasses.replace(found, harmless=tuple(answered))


def _first(root: Path, name: str, content: bytes) -> bytes:
    """What a file of the exam's holds; the content where there is no such file yet."""
    folder = root / EXAM
    with writing(root):
        make_folder(folder)
        with locked(folder):
            path = folder / name
            if path.exists() and (found := path.read_bytes()):
                return found
            replace_file(path, content)
            return content


def _read(text: bytes) -> Reference:
    data = json.loads(text)
    answers = tuple(tuple(int(token) for token in answer) for answer in data["answers"])
    likelihoods = tuple(float(value) for value in data["likelihoods"])
    prompts, harmless = (tuple(map(str, data[name])) for name in ("prompts", "harmless"))
    found = Reference(prompts, answers, likelihoods, float(data["refused"]), harmless)
    sizes = {len(found.prompts), len(found.answers), len(found.likelihoods)}
    if len(sizes) != 1 or not all(map(math.isfinite, found.likelihoods)):
        raise ValueError("it is not a reference")
    return found
