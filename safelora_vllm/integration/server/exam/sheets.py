"""What an exam asks: one half of the probes, the aligned model's answers to it, and the verdicts by it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelora_vllm.errors import ExamUnavailable
from safelora_vllm.exam.probes import Halves, Probes
from safelora_vllm.exam.reference import Reference
from safelora_vllm.integration.server.exam.engine_model import EngineModel
from safelora_vllm.integration.server.exam.references import exam_digest_parts, kept_reference
from safelora_vllm.store import PublishedStore
from safelora_vllm.store.verdict_pruning import mark_used
from safelora_vllm.store.verdicts import Verdicts

_SECONDS = 600.0  # for the aligned model to answer all probes
_MARK_SECONDS = 3600.0  # between two notes that the exam is in use


class Sheet:
    """One half of the probes.

    digest: of all that scores depend on besides the copy. verdicts: what copies scored.
    """

    def __init__(
        self,
        root: Path,
        model: EngineModel,
        published: PublishedStore,
        probes: Probes,
        parts: Sequence[Any],
        harmless: Sequence[str] = (),
    ) -> None:
        """parts: what the digest is of besides the probes. harmless: prompts that are to be answered."""
        text = json.dumps([*exam_digest_parts(probes), *parts])
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.verdicts = Verdicts(root, self.digest, published)
        self._root, self._model, self._probes, self._harmless = root, model, probes, harmless
        self._known: Reference | None = None
        self._asking, self._marked = asyncio.Lock(), -math.inf

    async def reference(self) -> Reference:
        """The aligned model's answers. It is asked once for a store.

        Raises:
            UsageError: it does not refuse enough of the probes. ExamUnavailable: it takes too long.
        """
        async with self._asking:
            if self._known is None:
                try:
                    async with asyncio.timeout(_SECONDS):
                        known = await kept_reference(
                            self._root, self.digest, self._model, self._probes, self._harmless
                        )
                except TimeoutError as error:
                    raise ExamUnavailable(
                        f"the served model did not answer {self.count} probes in {_SECONDS:.0f} s: expected "
                        "a faster machine, or fewer probes (--exam-probes)"
                    ) from error
                known.require_usable()
                self._known = known
        return self._known

    def mark_used(self) -> None:
        """Note now and then, in the store, that a server has this exam: else it is removed some day."""
        if time.monotonic() - self._marked >= _MARK_SECONDS:
            self._marked = time.monotonic()
            mark_used(self._root, self.digest)

    @property
    def count(self) -> int:
        """How many probes there are, whether the model refuses them or not."""
        return len(self._probes.prompts)


@dataclass(frozen=True)
class Sheets:
    """first: what is asked before a copy is served. held_out: what it is asked later."""

    first: Sheet
    held_out: Sheet

    @classmethod
    def of(
        cls,
        root: Path,
        model: EngineModel,
        published: PublishedStore,
        halves: Halves,
        parts: Sequence[Any],
        harmless: Sequence[str] = (),
    ) -> Sheets:
        """Both, of which none was asked yet."""
        first = Sheet(root, model, published, halves.first, parts, harmless)
        # Another exam even where its probes are the same: a verdict by it is one about what was served.
        held_out = Sheet(root, model, published, halves.held_out, [*parts, "held out"])
        return cls(first, held_out)
