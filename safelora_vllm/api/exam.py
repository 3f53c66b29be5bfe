"""The exam without a server: a model in transformers, adapters projected for each rung and asked."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safelora_vllm.adapters.read import Limits, read_adapter
from safelora_vllm.api.adapters import write_projected
from safelora_vllm.api.opened import opened_cache, usable_device, with_base_model
from safelora_vllm.exam import ladder as ladders
from safelora_vllm.exam import probes as probe_sets
from safelora_vllm.exam.probes import languages_in
from safelora_vllm.exam.reference import Reference, reference
from safelora_vllm.exam.score import Score
from safelora_vllm.exam.sitting import Verdict, sit, threshold_for
from safelora_vllm.exam.with_transformers import Model
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint


@dataclass(frozen=True)
class Examination:
    """An aligned model that passed its self-check, with its probes and a ladder of policies.

    Example:
        >>> from safelora_vllm.api.exam import Examination
        >>> examination = Examination.of("aligned", "projectors")
        >>> verdict = examination.examine("my-adapter", threshold=0.02)
        >>> verdict.policy, verdict.rungs[-1].score.drop
    """

    model: Model
    cache: ProjectorCache
    ladder: tuple[Policy, ...]
    reference: Reference
    folder: str

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        projectors: str | os.PathLike[str] | ProjectorCache,
        *,
        ladder: str | None = None,
        caps: Policy | None = None,
        probes: str | os.PathLike[str] | None = None,
        count: int | None = None,
        languages: Sequence[str] = ("en",),
        secret: bytes = b"",
        device: str = "cpu",
    ) -> Examination:
        """Load the aligned model and ask it the probes.

        Args:
            model: folder of the aligned model that the projectors were built for.
            projectors: a projector cache, or its folder.
            ladder: rungs as `safelora_vllm.exam.ladder.parse` reads them. None: the default ones that the
                cache can serve.
            caps: whose norm caps every rung has. None: the default policy's.
            probes: a file of JSON lines with a ``prompt`` each. None: built-in ones.
            count, languages, secret: of the built-in ones; see `safelora_vllm.exam.probes.drawn`. Without
                a count, as many as a server asks. With a secret, the half of a file that a server asks first.
            device: where the model runs.

        Raises:
            UsageError: the model is not usable or does not refuse the probes, or an argument is wrong.
            PolicyError: a rung is no policy, or the cache cannot serve it.
            ProjectorCacheError: the cache is missing, damaged, or made for another model.
        """
        cache = opened_cache(projectors)
        folder = os.fspath(model)
        cache.check_model(Checkpoint(folder).fingerprint(), folder)
        rungs = ladders.usable(cache, ladder, caps or Policy())
        chosen = _chosen(probes, count, languages_in(",".join(languages)), secret)
        loaded = Model(model, device)
        known = reference(loaded, chosen)
        known.require_usable()
        return cls(loaded, cache, tuple(rungs), known, folder)

    def examine(
        self,
        adapter: str | os.PathLike[str],
        threshold: float,
        begun: Callable[[Policy], None] = lambda _: None,
    ) -> Verdict:
        """The first rung on which an adapter passes. It is read once: each rung is asked of the same bytes.

        Args:
            adapter: a folder that PEFT saved, or an archive of one.
            threshold: the largest bound of the loyalty drop that passes, nats per token.
            begun: is called with each rung before it is asked.

        Raises:
            AdapterRefused: the gate refuses it before any exam.
            AdapterNotFound: there is nothing at the path.
            Unavailable: the model gives no usable likelihood.
        """
        with _snapshot(adapter) as (folder, digest):

            def score(policy: Policy) -> Score:
                begun(policy)
                return self.score(folder, policy)

            verdict = sit(self.ladder, score, threshold)
        return replace(verdict, digest=digest)

    def score(self, adapter: str | os.PathLike[str], policy: Policy) -> Score:
        """How far the adapter, as this policy would serve it, is from the aligned model."""
        known = self.reference
        with self._published(adapter, policy) as folder, self.model.adapted(folder):
            said = self.model.likelihoods(known.prompts, known.answers)
        return known.score(said)

    def threshold_for(self, honest: Sequence[str | os.PathLike[str]]) -> float:
        """The smallest threshold with which all these adapters pass on the mildest rung."""
        return threshold_for([self.score(adapter, self.ladder[0]) for adapter in honest])

    @contextlib.contextmanager
    def _published(self, adapter: str | os.PathLike[str], policy: Policy) -> Iterator[Path]:
        """What the gate would publish, in a folder for as long as it is needed."""
        with tempfile.TemporaryDirectory(prefix="safelora-exam-") as scratch:
            out = Path(scratch) / "adapter"
            # The rungs were checked with the ladder.
            settings = GateSettings(self.cache, policy, usable_device("cpu"))
            write_projected(adapter, with_base_model(settings, self.folder), out)
            yield out


def _chosen(
    file: str | os.PathLike[str] | None, count: int | None, languages: tuple[str, ...], secret: bytes
) -> probe_sets.Probes:
    """The probes to ask: with a server's secret those that its first exams ask."""
    if file:
        given = probe_sets.from_file(file)
        return probe_sets.Halves.of(secret, given).first if secret else given
    if count is None:
        return probe_sets.Halves.built_in(secret, languages).first
    return probe_sets.drawn(secret, count, languages=languages)


@contextlib.contextmanager
def _snapshot(adapter: str | os.PathLike[str]) -> Iterator[tuple[Path, str]]:
    """A copy of an adapter that nobody changes during an exam, and the digest of its content."""
    raw = read_adapter(os.fspath(adapter), Limits())
    with tempfile.TemporaryDirectory(prefix="safelora-exam-") as scratch:
        folder = Path(scratch) / "upload"
        folder.mkdir()
        for name, content in raw.files.items():
            (folder / name).write_bytes(content)
        yield folder, raw.digest
